"""What the supervisor of a node is told. Torch-free."""

from pathlib import Path

import msgspec

from keepwarm.launch.node.slot_table import Wish

VACANCY_TIMEOUT_S = 600.0
"""Seconds that a slot may stay vacant."""
LOOPBACK = "127.0.0.1"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """One node's place in a run."""

    folder: Path
    """Of the run, absolute, on storage that all nodes share."""
    slots: int
    node: str
    """Name, unique in the run."""
    host: str = LOOPBACK
    """Address at which the other nodes reach this one."""
    ranks_per_node: int
    wish: Wish = "any"
    resume: bool = False
    patience: float = VACANCY_TIMEOUT_S
    module: str = "keepwarm.trainer"
    """What workers run."""
