"""Options of a node's supervisor. Torch-free."""

from pathlib import Path

import msgspec

from keepwarm.launch.node.slot_table import RequestedSlot
from keepwarm.trainer.job.run_folder import RUN_FILE

VACANCY_TIMEOUT_S = 600.0
"""Seconds that a slot may stay vacant."""
LOOPBACK = "127.0.0.1"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """One node's place in a run."""

    folder: Path
    """Absolute path of the run folder, on storage that all nodes share."""
    slots: int
    node: str
    """Name, unique in the run."""
    host: str = LOOPBACK
    """Address at which the other nodes reach this one."""
    domain: str = ""
    """Failure domain of the node."""
    ranks_per_node: int
    requested_slot: RequestedSlot = "any"
    resume: bool = False
    vacancy_timeout: float = VACANCY_TIMEOUT_S
    spec: str = RUN_FILE
    """Name of the spec in the run folder: `run.json`, or one proposed beside it."""
    module: str = "keepwarm.trainer"
    """Module that workers run."""
