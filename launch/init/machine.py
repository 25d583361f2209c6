"""What a first job is planned for: the GPUs of this machine, or those that the user names, or its CPUs."""

import os
from dataclasses import dataclass, replace

from keepwarm.files import within
from keepwarm.launch.errors import OptionError
from keepwarm.launch.run import gpu_health
from keepwarm.launch.run.node_check import visible_gpus
from keepwarm.parallel.cards import CARDS, Card

ASSUMED = "H100"
"""The card whose speeds and memory are taken where it is not known."""
_SECONDS = 10.0
_MOST_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The devices of a job."""

    gpus: int
    """0: none, the job trains on the CPU."""
    card: Card
    is_assumed: bool
    """The kind of GPU is not known."""
    threads: int
    """Cores of this machine that one rank on the CPU uses."""

    @property
    def per_node(self) -> int:
        return min(self.card.per_node, self.gpus)


def machine(gpus: int | None, gpu: str | None, gpus_per_node: int | None) -> Machine:
    """Return the machine that the options describe; what they leave open is that of this one.

    Raises:
        OptionError: the kind of GPU is not known, or GPUs do not fill nodes.
    """
    here = len(visible_gpus(os.environ))
    count = here if gpus is None else gpus
    name = gpu.upper() if gpu is not None else _kind() if here else None
    if gpu is not None and name not in CARDS:
        raise OptionError(f"--gpu {gpu}: not known; choose from {', '.join(CARDS)}")
    card = CARDS[name or ASSUMED]
    card = replace(card, per_node=gpus_per_node or card.per_node)
    if count > card.per_node and count % card.per_node:
        raise OptionError(f"--gpus {count}: do not fill whole nodes of {card.per_node}; see --gpus-per-node")
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    return Machine(gpus=count, card=card, is_assumed=name is None, threads=threads)


def _kind() -> str | None:
    """Return the name of this machine's GPUs if plans know it; None without NVML, or if it does not answer."""
    seen = within(gpu_health.look, _SECONDS)
    names = {gpu.name.upper() for gpu in seen.gpus} if seen is not None else set()
    return next((name for name in CARDS if names and all(name in one for one in names)), None)
