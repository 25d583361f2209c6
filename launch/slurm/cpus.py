"""CPUs of each rank of a job that leaves them to the cluster: its share of those of a node."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keepwarm.launch.slurm import commands
from keepwarm.text import counted
from keepwarm.trainer.job.cluster import SlurmSpec
from keepwarm.trainer.job.slurm.sbatch_options import keys_set, option_names
from keepwarm.trainer.job.spec import JobSpec

KEY = "slurm.cpus_per_rank"
_FITTING = 0.9
"""Share of the nodes of a partition that the CPUs asked for must leave eligible."""
_CHOOSING = ("constraint", "nodelist", "reservation")
"""Keys that may leave the job with the smallest nodes of its partition."""
_COUNTING = (
    "hint", "threads-per-core", "core-spec", "thread-spec", "cores-per-socket", "sockets-per-node", "extra-node-info",
)  # fmt: skip
"""Options of sbatch with which a task gets other CPUs than as many of a node's."""


@dataclass(frozen=True, kw_only=True)
class Cpus:
    """What jobs may use of a node."""

    usable: int
    """Without those that the cluster keeps for itself."""
    threads_per_core: int = 1


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What the nodes and partitions of a cluster have."""

    nodes: Mapping[str, Cpus]
    most: Mapping[str, int]
    """CPUs that one job may use of a node of a partition, where it limits them."""


def ask_offer() -> Offer:
    """Ask the controller. Raises ClusterError."""
    return parse_offer(
        commands.ask("scontrol", "show", "node", "--oneliner"),
        commands.ask("scontrol", "show", "partition", "--oneliner"),
    )


def parse_offer(nodes: str, partitions: str) -> Offer:
    """Parse the output of `scontrol show node` and `scontrol show partition`, one line for each. Pure."""
    found: dict[str, Cpus] = {}
    for values in map(commands.settings, nodes.splitlines()):
        if "NodeName" in values and (usable := values.get("CPUEfctv") or values.get("CPUTot")):
            threads = int(values.get("ThreadsPerCore", "1"))
            found[values["NodeName"]] = Cpus(usable=int(usable), threads_per_core=threads)
    listed = [commands.settings(line) for line in partitions.splitlines()]
    limits = {each["PartitionName"]: each.get("MaxCPUsPerNode", "") for each in listed if "PartitionName" in each}
    return Offer(nodes=found, most={name: int(limit) for name, limit in limits.items() if limit.isdigit()})


def share(job: JobSpec, nodes: Sequence[commands.Node], offer: Offer) -> tuple[int, str]:
    """Return the CPUs of each rank on most of the nodes that the job may get, and from what they follow. Pure.

    A job that takes some of a node's GPUs takes as large a part of its CPUs.
    """
    slurm, ranks, threads = job.cluster.slurm, job.layout.ranks_per_node, job.numerics.threads_per_rank
    if counting := [name for name in option_names(slurm.extra) if name in _COUNTING]:
        return threads, f"numerics.threads_per_rank, as cluster.slurm.extra sets --{counting[0]}"
    each: dict[str, tuple[int, str]] = {}
    for node in nodes:
        if node.gpus >= slurm.gpus and all(commands.has(node.resources, one) for one in slurm.gres):
            found = _share_of(node, offer, slurm.gpus, ranks)
            each[node.name] = min(each.get(node.name, found), found)
    fitting = sorted(each.values(), reverse=True)
    least = max(job.layout.nodes + slurm.spares, math.ceil(_FITTING * len(fitting)))
    place = len(fitting) if _is_choosing(slurm) else min(least, len(fitting))
    count, why = fitting[place - 1] if fitting else (0, "")
    if count < threads:
        return threads, "numerics.threads_per_rank"
    return count, f"{why}, with {counted(ranks, 'rank')} on each"


def _share_of(node: commands.Node, offer: Offer, gpus: int, ranks: int) -> tuple[int, str]:
    cpus = offer.nodes.get(node.name, Cpus(usable=node.cpus))
    usable = min(cpus.usable, offer.most.get(node.partition, cpus.usable))
    why = f"{usable} CPUs of a node of partition {node.partition}"
    if 0 < gpus < node.gpus:
        usable, why = usable * gpus // node.gpus, f"{why} for {gpus} of its {node.gpus} GPUs"
    # SLURM gives a task whole cores.
    return usable // ranks // cpus.threads_per_core * cpus.threads_per_core, why


def _is_choosing(slurm: SlurmSpec) -> bool:
    return any(getattr(slurm, key) or key in keys_set(slurm.extra) for key in _CHOOSING)
