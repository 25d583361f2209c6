"""`keepwarm submit`: from a job file to a job in SLURM's queue."""

import json
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from keepwarm.files import READABLE, atomic_write
from launch import kubernetes, slurm
from launch.cluster_check import check_offered, probe
from launch.errors import ClusterError
from launch.preflight import PACKAGES, check_engine, check_installation, check_job
from launch.prepare import Mode, prepared
from launch.slurm_job import RECORD
from launch.slurm_script import CODE, SCRIPT, render
from launch.train import continued, job_file
from trainer.run_folder import RunFolder
from trainer.spec import JobSpec
from trainer.spec_file import load_job


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
    check_job(job)
    folder = Path(job.output)
    check_offered(job, console, dry_run=dry_run)
    if dry_run:
        print(render(job, folder), end="")
        print(f"\n# {shlex.join(command(folder, chain))}")
        return
    if mode != "new":
        _refuse_while_going(folder)
    with prepared(job, mode) as folder:
        RunFolder(folder).logs.mkdir(exist_ok=True)
        (folder / SCRIPT).write_text(render(job, folder), encoding="utf-8")
        copy_code(job, folder)
        probe(job, folder, console)
        record = {"submitted": time.time(), "resume": mode == "resume", "jobs": list[str]()}
        write_record(folder, record)
        for _ in range(chain):
            record["jobs"] = [*jobs_of(folder), slurm.ask(*command(folder, chain)).strip().partition(";")[0]]
            write_record(folder, record)
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


def write_record(folder: Path, record: object) -> None:
    """What was submitted from a run folder."""
    atomic_write(folder / RECORD, (json.dumps(record) + "\n").encode(), mode=READABLE)


def copy_code(job: JobSpec, folder: Path) -> None:
    """Where the job asks for it, the code that runs here becomes what the nodes will run, whatever happens to it here.

    A copy that is there from before is replaced.
    """
    copy = folder / CODE
    if copy.is_dir():
        shutil.rmtree(copy)
    if job.cluster.slurm.copy_code:
        source = Path(__file__).parents[1]
        for package in PACKAGES:
            shutil.copytree(source / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))


def _refuse_while_going(folder: Path) -> None:
    for identity in jobs_of(folder):
        found = slurm.job(identity)
        if found is not None and found.state in slurm.GOING:
            raise ClusterError(
                f"{folder}: job {identity} of this run is {found.state}; keepwarm cancel {folder} ends it first"
            )
