"""Check a job against the cluster before submission: partitions, nodes, GPUs, visibility of the run folder."""

import json
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from keepwarm.launch.errors import ClusterError
from keepwarm.launch.run.node_check import MARK
from keepwarm.launch.slurm import commands
from keepwarm.launch.slurm.script import cpus_per_rank, in_container, options
from keepwarm.trainer.job.spec import JobSpec

PROBE_WAIT = 5
"""Seconds to wait for a free node to probe for the run folder."""


def check_offered(job: JobSpec, *, dry_run: bool) -> list[str]:
    """Check as `check_cluster` and return remarks for the user; in a dry run, an absent cluster is a remark."""
    try:
        offered = commands.nodes()
    except ClusterError as error:
        if not dry_run:
            raise
        return [f"not checked against a cluster: {error}"]
    check_cluster(job, offered, excluded := frozenset(_excluded(job)))
    why = waits_for(job, [node for node in offered if node.name not in excluded])
    return [] if why is None else [f"the job will wait: {why}"]


def waits_for(job: JobSpec, offered: Sequence[commands.Node]) -> str | None:
    """Return why the job would have to wait even on an idle cluster; None if it would start at once. Pure."""
    wanted = _partitions(job, offered)
    there = {node.name: node for node in offered if node.partition in wanted}
    needed = job.layout.nodes + job.cluster.slurm.spares
    away = [node for node in there.values() if not node.usable]
    if len(there) - len(away) >= needed:
        return None
    states = ", ".join(f"{node.name} is {node.state}" for node in away)
    return f"it needs {needed} nodes, of {len(there)} only {len(there) - len(away)} are fit: {states}"


def check_cluster(job: JobSpec, offered: Sequence[commands.Node], excluded: Collection[str] = ()) -> None:
    """Raise ClusterError, naming the key, if the cluster can never provide what the job requests."""
    asked = job.cluster.slurm
    known = commands.partitions(offered)
    if asked.partition is None and not any(node.default for node in offered):
        raise ClusterError(f"cluster.slurm.partition: this cluster has no default one: choose of {', '.join(known)}")
    wanted = _partitions(job, offered)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        there = ", ".join(sorted(known))
        raise ClusterError(f"cluster.slurm.partition = {unknown[0]}: no such partition; there are {there}")
    nodes = [node for node in offered if node.partition in wanted and node.name not in excluded]
    needed, where = job.layout.nodes + asked.spares, f"partition {','.join(dict.fromkeys(wanted))}"
    if len({node.name for node in nodes}) < needed:
        spares = f" and cluster.slurm.spares = {asked.spares}" if asked.spares else ""
        raise ClusterError(
            f"the layout has {job.layout.nodes} nodes{spares}, {needed} together, but {where} has "
            f"{len({node.name for node in nodes})}; change parallel.*, cluster.ranks_per_node or the partition"
        )
    gpus = max(node.gpus for node in nodes)
    if (asked.gpus_per_node or 0) > gpus:
        raise ClusterError(
            f"cluster.slurm.gpus_per_node = {asked.gpus_per_node}: the nodes of {where} have {gpus or 'none'}"
        )
    cpus, each = max(node.cpus for node in nodes), job.layout.ranks_per_node * cpus_per_rank(job)
    if each > cpus:
        raise ClusterError(
            f"{job.layout.ranks_per_node} ranks on a node need {each} CPUs, the nodes of {where} have {cpus}; "
            "change cluster.ranks_per_node, cluster.slurm.cpus_per_rank or numerics.threads_per_rank"
        )
    _check_alike(job, [node for node in nodes if node.gpus >= asked.gpus and node.cpus >= each], where)


def _partitions(job: JobSpec, offered: Sequence[commands.Node]) -> list[str]:
    """Return the partitions that may run the job."""
    asked = job.cluster.slurm.partition
    return asked.split(",") if asked else list(dict.fromkeys(node.partition for node in offered if node.default))


def _excluded(job: JobSpec) -> list[str]:
    return commands.host_names(",".join(job.cluster.slurm.exclude))


def _check_alike(job: JobSpec, fit: Sequence[commands.Node], where: str) -> None:
    """Raise ClusterError if too few nodes have what each needs, or the job may get nodes with different GPUs.

    `fit` are the nodes with enough CPUs and GPUs of any type.
    """
    asked, needed = job.cluster.slurm, job.layout.nodes + job.cluster.slurm.spares
    fit = [node for node in fit if all(commands.has(node.resources, one) for one in asked.gres)]
    if (count := len({node.name for node in fit})) < needed:
        wanted = [f"{job.layout.ranks_per_node * cpus_per_rank(job)} CPUs", *asked.gres]
        wanted += [f"{asked.gpus_per_node} GPUs"] if asked.gpus_per_node else []
        raise ClusterError(
            f"the job needs {needed} nodes with {' and '.join(wanted)}, and {where} has {count or 'none'}: change "
            "cluster.ranks_per_node, cluster.slurm.gres or the partition"
        )
    is_chosen = asked.constraint or asked.nodelist or any(re.match("gpu:[A-Za-z]", one) for one in asked.gres)
    if needed == 1 or not asked.gpus or is_chosen:
        return
    for partition in dict.fromkeys(node.partition for node in fit):
        holders: dict[str, list[str]] = {}
        for node in fit:
            for kind in sorted(commands.gpu_types(node.resources)) if node.partition == partition else ():
                holders.setdefault(kind, []).append(node.name)
        if len(holders) > 1:
            places = "; ".join(f"{kind or 'no type'} on {', '.join(names)}" for kind, names in holders.items())
            raise ClusterError(
                f"the nodes of partition {partition} have different GPUs ({places}): name one type, as in "
                f"cluster.slurm.gres=gpu:{max(holders)}:{asked.gpus}, or the nodes with constraint or nodelist"
            )


def probe(job: JobSpec, folder: Path) -> list[str]:
    """Check on one free node that the run folder is visible; return remarks for the user.

    If no node is free, the check is left to the job, which checks all of its nodes when it starts.

    Raises:
        ClusterError: the run folder or keepwarm is not visible on the node.
    """
    only = [
        text for text in options(job, folder) if text.startswith(("--partition", "--account", "--qos", "--exclude"))
    ]
    asked = [
        *("srun", "--nodes=1", "--ntasks=1", "--time=2", f"--immediate={PROBE_WAIT}", "--job-name=keepwarm-probe"),
        *("--chdir=/", *only, *in_container(job.cluster.slurm, folder, sys.executable)),
        *("-P", "-m", "keepwarm.launch.run.node_check", str(folder)),
    ]
    try:
        done = subprocess.run(
            asked, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return ["no node answered whether it sees the run folder; the job asks again when it starts"]
    lines = [json.loads(line.partition(MARK)[2]) for line in done.stdout.splitlines() if MARK in line]
    if lines and lines[0]["spec"] is None:
        raise ClusterError(
            f"{folder}: node {lines[0]['node']} does not see the run folder: choose an output on storage that all "
            "nodes share"
        )
    if "execve" in done.stderr and "No such file" in done.stderr:
        raise ClusterError(
            f"{sys.executable} is not on the nodes: install keepwarm on storage that all nodes share, or name an image "
            "in cluster.slurm.container"
        )
    if lines:
        return []
    why = done.stderr.strip().splitlines()[-1:] or ["no answer"]
    return [f"no node was asked whether it sees the run folder ({why[0]}); the job asks when it starts"]
