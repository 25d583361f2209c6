"""Which CPUs ranks get: what a job says of them, and what that comes to on this machine if it has GPUs."""

import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from keepwarm.ft.memory.cpus import SYSFS, format_cpus, near_cpus
from keepwarm.trainer.distributed.affinity import choose
from keepwarm.trainer.job.spec import JobSpec


@dataclass(frozen=True)
class RankCpus:
    """A rank of a node, its GPU and its CPUs."""

    local_rank: int
    gpu: str
    """PCI address."""
    cpus: str
    why: str
    """Why these are not the ones near its GPU, if others are."""


def gpus_of(sysfs: Path = SYSFS) -> list[str]:
    """Return the PCI addresses of this machine's GPUs of NVIDIA that have a driver, in order."""
    drivers = (sysfs / "bus" / "pci" / "devices").glob("*/driver")
    return sorted(driver.parent.name for driver in drivers if driver.resolve().name == "nvidia")


def rank_cpus(job: JobSpec, allowed: Set[int], sysfs: Path = SYSFS) -> list[RankCpus]:
    """Return what each rank would get here, CUDA counting GPUs in the order of their addresses; empty without GPUs."""
    if job.cluster.device == "cpu" or job.cluster.numa == "off":
        return []
    found = []
    for local_rank, gpu in enumerate(gpus_of(sysfs)[: job.layout.ranks_per_node]):
        choice = choose(near_cpus(gpu, sysfs), allowed, job.numerics.threads_per_rank)
        found.append(RankCpus(local_rank, gpu, format_cpus(choice.cpus), choice.why))
    return found


def lines(job: JobSpec, here: list[RankCpus]) -> list[str]:
    """Return what `keepwarm plan` prints."""
    threads = job.numerics.threads_per_rank
    text = f"CPUs of each rank: {threads} thread{'' if threads == 1 else 's'} (numerics.threads_per_rank)"
    if job.cluster.device != "cpu":
        bound = "bound to those near it" if job.cluster.numa == "auto" else "not bound"
        text += f"; with a GPU, {bound} (cluster.numa: {job.cluster.numa})"
    rows = [
        f"  here rank {one.local_rank} of a node, on GPU {one.gpu}: {one.cpus}{f' ({one.why})' if one.why else ''}"
        for one in here
    ]
    return [text, *rows]


def of_this_machine(job: JobSpec) -> list[RankCpus]:
    """Return what each rank would get on the machine of this process."""
    return rank_cpus(job, os.sched_getaffinity(0))
