"""`keepwarm submit`: from a job file to a job in SLURM's queue."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console

from launch import kubernetes, slurm
from launch.errors import ClusterError
from launch.node_check import MARK
from launch.preflight import check_data_exists, check_engine, check_installation
from launch.run_folder import Mode, prepared
from launch.slurm_job import RECORD
from launch.slurm_script import SCRIPT, cpus_per_rank, in_container, options, render
from launch.train import continued, job_file
from trainer.spec import JobSpec
from trainer.spec_file import load_job

PROBE_WAIT = 5
"""Seconds that a node is waited for that could say whether it sees the run folder."""


def submit_here(path: Path, overrides: Sequence[str], mode: Mode, *, chain: int = 1, dry_run: bool = False) -> None:
    """Validate the job against its files and the cluster, make its run folder, hand it to SLURM.

    Args:
        path: a job file; with mode `resume` also a run folder.
        chain: jobs that run one after the other, each continuing the one before; for runs longer than the limit.
        dry_run: print the script and the command; write and submit nothing.

    Raises:
        SpecError, DataError, OutputError, PreflightError, ClusterError: nothing was submitted.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    check_installation()
    job = continued(path, overrides, console) if mode == "resume" else load_job(job_file(path), overrides)
    check_engine(job)
    check_data_exists(job.data)
    folder = Path(job.output)
    try:
        offered = slurm.nodes()
    except ClusterError as error:
        if not dry_run:
            raise
        console.print(f"keepwarm: not checked against a cluster: {error}")
    else:
        check_cluster(job, offered, frozenset(_excluded(job)))
    if dry_run:
        print(render(job, folder), end="")
        print(f"\n# {shlex.join(command(folder, chain))}")
        return
    if mode != "new":
        _refuse_while_going(folder)
    with prepared(job, mode) as folder:
        (folder / "logs").mkdir(exist_ok=True)
        (folder / SCRIPT).write_text(render(job, folder), encoding="utf-8")
        _probe(job, folder, console)
        record = {"submitted": time.time(), "resume": mode == "resume", "jobs": list[str]()}
        _write(folder, record)
        for _ in range(chain):
            record["jobs"] = [*jobs_of(folder), slurm.ask(*command(folder, chain)).strip().partition(";")[0]]
            _write(folder, record)
    console.print(f"keepwarm: {job.name}: submitted as job {', '.join(jobs_of(folder))}; outputs in {folder}")
    print(jobs_of(folder)[0])


def show_manifests(path: Path, overrides: Sequence[str]) -> None:
    """Print what Kubernetes would be given; writes nothing. Data files may lie where only the pods see them.

    Raises:
        SpecError: the job does not fit together, or lacks what Kubernetes needs.
    """
    check_installation()
    job = load_job(job_file(path), overrides)
    check_engine(job)
    print(kubernetes.render(job), end="")


def command(folder: Path, chain: int = 1) -> list[str]:
    """The sbatch command for a rendered script."""
    singleton = ["--dependency=singleton"] if chain > 1 else []
    return ["sbatch", "--parsable", f"--chdir={folder}", *singleton, str(folder / SCRIPT)]


def jobs_of(folder: Path) -> list[str]:
    """Identities of the SLURM jobs of a run, as last submitted; none when it never was."""
    try:
        return [str(job) for job in json.loads((folder / RECORD).read_text(encoding="utf-8"))["jobs"]]
    except FileNotFoundError:
        return []


def _write(folder: Path, record: object) -> None:
    beside = folder / f".{RECORD}"
    beside.write_text(json.dumps(record) + "\n", encoding="utf-8")
    beside.replace(folder / RECORD)


def check_cluster(job: JobSpec, offered: Sequence[slurm.Node], excluded: Collection[str] = ()) -> None:
    """Raise ClusterError, naming the key, when the cluster cannot give what the job asks for, however long it waits."""
    asked = job.cluster.slurm
    known = slurm.partitions(offered)
    if asked.partition is None and not any(node.default for node in offered):
        raise ClusterError(f"cluster.slurm.partition: this cluster has no default one: choose of {', '.join(known)}")
    wanted = asked.partition.split(",") if asked.partition else [node.partition for node in offered if node.default]
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


def _excluded(job: JobSpec) -> list[str]:
    return slurm.host_names(",".join(job.cluster.slurm.exclude))


def _refuse_while_going(folder: Path) -> None:
    for identity in jobs_of(folder):
        found = slurm.job(identity)
        if found is not None and found.state in slurm.GOING:
            raise ClusterError(
                f"{folder}: job {identity} of this run is {found.state}; keepwarm cancel {folder} ends it first"
            )


def _probe(job: JobSpec, folder: Path, console: Console) -> None:
    """Ask one free node whether it sees the run folder. With none free, the job asks all of them when it starts."""
    only = [
        text for text in options(job, folder) if text.startswith(("--partition", "--account", "--qos", "--exclude"))
    ]
    asked = [
        *("srun", "--nodes=1", "--ntasks=1", "--time=2", f"--immediate={PROBE_WAIT}", "--job-name=keepwarm-probe"),
        *("--chdir=/", *only, *in_container(job.cluster.slurm, folder, sys.executable)),
        *("-P", "-m", "launch.node_check", str(folder)),
    ]
    try:
        done = subprocess.run(
            asked, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        console.print("keepwarm: no node answered whether it sees the run folder; the job asks again when it starts")
        return
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
    if not lines:
        why = done.stderr.strip().splitlines()[-1:] or ["no answer"]
        console.print(
            f"keepwarm: no node was asked whether it sees the run folder ({why[0]}); the job asks when it starts"
        )
