"""Check a job against the cluster before submission: partitions, nodes, GPUs, visibility of the run folder."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from keepwarm.launch.errors import ClusterError
from keepwarm.launch.run.node_check import MARK
from keepwarm.launch.slurm import commands, cpus, domains
from keepwarm.launch.slurm.script import cpus_per_rank, environment_lines, in_container, interpreter, options
from keepwarm.trainer.job.spec import JobSpec

PROBE_WAIT = 5
"""Seconds to wait for a free node to probe for the run folder."""
NODE_CHECK = "keepwarm.launch.run.node_check"
NOT_FOUND = 127
"""Exit code of a shell that does not find a program."""
_PLACE = ("--partition", "--account", "--qos", "--reservation", "--constraint", "--exclude")
_HELD = ("--hold", "-H")


def completed(jobs: Sequence[JobSpec], *, dry_run: bool) -> list[JobSpec]:
    """Return the jobs with what they leave to the cluster, and its sources; in a dry run without a cluster as they are.

    Raises ClusterError.
    """
    if all(job.cluster.slurm.cpus_per_rank is not None for job in jobs):
        return list(jobs)
    try:
        offered, offer = commands.nodes(), cpus.ask_offer()
    except ClusterError:
        if not dry_run:
            raise
        return list(jobs)
    return [_with_cpus(job, offered, offer) for job in jobs]


def _with_cpus(job: JobSpec, offered: Sequence[commands.Node], offer: cpus.Offer) -> JobSpec:
    cluster = job.cluster
    if cluster.slurm.cpus_per_rank is not None:
        return job
    wanted, excluded = _partitions(job, offered), _excluded(job)
    nodes = [node for node in offered if node.partition in wanted and node.name not in excluded]
    count, why = cpus.share(job, nodes, offer)
    changed = {
        "slurm": cluster.slurm.model_copy(update={"cpus_per_rank": count}),
        "sources": {**(cluster.sources or {}), cpus.KEY: why},
    }
    return job.model_copy(update={"cluster": cluster.model_copy(update=changed)})


def check_offered(job: JobSpec, *, dry_run: bool) -> list[str]:
    """Check as `check_cluster` and return remarks for the user; in a dry run, an absent cluster is a remark."""
    try:
        offered = commands.nodes()
    except ClusterError as error:
        if not dry_run:
            raise
        return [f"not checked against a cluster: {error}"]
    check_cluster(job, offered, excluded := frozenset(_excluded(job)))
    left = [node for node in offered if node.name not in excluded]
    why, wanted = waits_for(job, left), _partitions(job, left)
    found = [] if why is None else [f"the job will wait: {why}"]
    return [*found, *domains.remarks(job, [node.name for node in left if node.partition in wanted])]


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
    if asked.gpus > gpus:
        key = "gpus_per_node" if asked.gpus_per_node else "gres"
        value = asked.gpus_per_node or ",".join(asked.gres)
        raise ClusterError(f"cluster.slurm.{key} = {value}: the nodes of {where} have {gpus or 'none'}")
    _check_notice(job, nodes)
    most, each = max(node.cpus for node in nodes), job.layout.ranks_per_node * cpus_per_rank(job)
    if each > most:
        raise ClusterError(
            f"{job.layout.ranks_per_node} ranks on a node need {each} CPUs, the nodes of {where} have {most}; "
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


def _check_notice(job: JobSpec, nodes: Sequence[commands.Node]) -> None:
    """Raise ClusterError if the ranks would have to save before they have started."""
    slurm = job.cluster.slurm
    times = [slurm.time] if slurm.time else [node.default_time for node in nodes]
    limit = min((one for time in times if (one := commands.seconds_of(time)) is not None), default=None)
    if limit is not None and slurm.save_before_limit >= limit:
        whose = "cluster.slurm.time" if slurm.time else "the default of the partition; cluster.slurm.time sets another"
        raise ClusterError(
            f"cluster.slurm.save_before_limit = {slurm.save_before_limit}: the state would be saved so many seconds "
            f"before the time limit, which is {limit} s ({whose}): make it shorter, or the limit longer"
        )


def probe_command(job: JobSpec, folder: Path) -> list[str]:
    """Return the command that checks one node, with the environment of the job and what decides where it may run."""
    slurm = job.cluster.slurm
    own = [text for text in options(job, folder) if text.startswith(_PLACE)]
    words = [word for text in (*own, *slurm.extra) for word in shlex.split(text)]
    program = [*in_container(slurm, folder, interpreter(slurm, sys.executable)), "-P", "-m", NODE_CHECK, str(folder)]
    script = "\n".join(
        ("set -e", *environment_lines(slurm, sys.executable), *slurm.setup, f"exec {shlex.join(program)}")
    )
    return [
        *("srun", "--nodes=1", "--ntasks=1", "--time=2", f"--immediate={PROBE_WAIT}", "--job-name=keepwarm-probe"),
        *("--chdir=/", "--export=NONE", *(word for word in words if word not in _HELD)),
        *("/bin/bash", "-l", "-c", script),
    ]


def probe(job: JobSpec, folder: Path) -> list[str]:
    """Check on one free node that the run folder is visible; return remarks for the user.

    If no node is free, the check is left to the job, which checks all of its nodes when it starts.

    Raises:
        ClusterError: the run folder or keepwarm is not visible on the node.
    """
    asked = probe_command(job, folder)
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
    if done.returncode == NOT_FOUND:
        program = interpreter(job.cluster.slurm, sys.executable)
        raise ClusterError(
            f"{program} is not on the nodes: install keepwarm on storage that all nodes share, or name an image in "
            "cluster.slurm.container"
        )
    if lines:
        return []
    why = done.stderr.strip().splitlines()[-1:] or ["no answer"]
    return [f"no node was asked whether it sees the run folder ({why[0]}); the job asks when it starts"]
