"""Choose the CPUs of a rank on a GPU: those of the GPU's NUMA node. Torch-free."""

import logging
from collections.abc import Set
from pathlib import Path

import msgspec

from keepwarm.ft.memory.cpus import SYSFS, bind, format_cpus, near_cpus, unbound_cpus


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The CPUs that a rank may use."""

    cpus: frozenset[int]
    why: str = ""
    """Why these are not the ones near its GPU, although others are; empty if they are, or if all are equally near."""


def choose(near: Set[int], allowed: Set[int], threads: int) -> Choice:
    """Return the CPUs for a rank of `threads` threads. `near`: those near its GPU; empty: not known. Pure."""
    everything, both = frozenset(allowed), frozenset(near & allowed)
    if not near or both == everything:
        return Choice(cpus=everything)
    if len(both) < threads:
        usable = f"of the CPUs {format_cpus(near)} near its GPU it may use {format_cpus(both) or 'none'}"
        return Choice(cpus=everything, why=f"{usable}, too few for numerics.threads_per_rank = {threads}")
    return Choice(cpus=both)


def bind_near(address: str, threads: int, sysfs: Path = SYSFS) -> Choice:
    """Bind this process to the CPUs near the GPU at a PCI address, unless they are too few, and return its CPUs."""
    allowed = unbound_cpus()
    choice = choose(near_cpus(address, sysfs), allowed, threads)
    if choice.why:
        logging.warning("this rank stays unbound: %s", choice.why)
    elif choice.cpus != allowed:
        try:
            bind(choice.cpus)
        except OSError as error:
            logging.warning("this rank stays unbound: CPUs %s: %s", format_cpus(choice.cpus), error.strerror)
            return Choice(cpus=allowed, why=str(error.strerror))
    return choice
