"""`keepwarm train`: run a job on this machine, from its file to the end of its ranks."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from keepwarm.launch.local.nodes import run_on_nodes
from keepwarm.launch.local.ranks import RankOptions, run_ranks
from keepwarm.launch.run.inputs import refuse_inputs_inside
from keepwarm.launch.run.node_check import gpu_count
from keepwarm.launch.run.preflight import check_job
from keepwarm.launch.run.prepare import Mode, changes, prepared, stored_job, waiting
from keepwarm.side_writer import protect_streams
from keepwarm.text import counted
from keepwarm.trainer.distributed.in_process_restart import supports_in_process_restart
from keepwarm.trainer.errors import OutputError, SpecError
from keepwarm.trainer.job.files import load_job, spec_files
from keepwarm.trainer.job.run_folder import SUBMITTED_FILE, RunFolder
from keepwarm.trainer.job.spec import JobSpec


def train_here(path: Path, overrides: Sequence[str], mode: Mode, *, nodes: int | None = None, spares: int = 0) -> None:
    """Validate the job, make its run folder and run its ranks to the end; on emulated nodes if `nodes` is given.

    `path` is a job file; with mode `resume` also a run folder.

    Raises:
        SpecError, DataError, OutputError, PreflightError: nothing was started.
        RanksFailed: a rank ended early.
    """
    protect_streams()
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    job = continued(path, overrides, console) if mode == "resume" else new_job(path, overrides, mode)
    if mode == "resume":
        _leave_waiting(job, overrides, console)
    if nodes is None and not spares:
        run_here(job, mode, console)
    else:
        run_on_nodes(job, mode, console, nodes=job.layout.nodes if nodes is None else nodes, spares=spares)


def run_here(job: JobSpec, mode: Mode, console: Console) -> None:
    """Make the run folder of a validated job and run its ranks to the end; raises as `train_here`."""
    check_job(job)
    protect_streams()
    with prepared(job, mode) as spec:
        folder = spec.parent
        world_size = job.layout.world_size
        console.print(f"keepwarm: {job.name}: starting {counted(world_size, 'rank')}; outputs in {folder}")
        if (advice := idle_cores(world_size, job.numerics.threads_per_rank)) is not None:
            console.print(f"keepwarm: {advice}")
        run_ranks(
            [str(spec), *(["--resume"] if mode == "resume" else [])],
            RankOptions(
                world_size=world_size,
                threads_per_rank=job.numerics.threads_per_rank,
                logs=RunFolder(folder).logs,
                max_restarts=job.cluster.max_restarts if job.snapshot != "off" else 0,
                reusable=supports_in_process_restart(job),
            ),
        )


def idle_cores(ranks: int, threads: int) -> str | None:
    """Return a sentence on the cores that this many ranks leave unused here; None if none, or if GPUs do the work."""
    cores = len(os.sched_getaffinity(0))
    more = cores // ranks
    if more <= threads or gpu_count():
        return None
    used = f"{ranks * threads} of {counted(cores, 'core')} {'is' if ranks * threads == 1 else 'are'} used"
    return f"{used}; numerics.threads_per_rank={more} uses {'all' if more * ranks == cores else more * ranks}"


def new_job(path: Path, overrides: Sequence[str], mode: Mode) -> JobSpec:
    """Load the job of a run that does not continue another.

    Raises:
        SpecError: the job is wrong, or `path` is a run folder.
        OutputError: mode `force` would delete a file that describes the job.
    """
    job = load_job(job_file(path), overrides)
    if mode == "force":
        refuse_inputs_inside(Path(job.output), spec_files(path, overrides))
    return job


def job_file(path: Path) -> Path:
    """Return `path`; raise `SpecError` if it is a run folder, since a new run needs a job file."""
    if RunFolder(path).exists:
        raise SpecError(f"{path}: this is a run folder; --resume continues it")
    return path


def continued(path: Path, overrides: Sequence[str], console: Console) -> JobSpec:
    """Return the job of an existing run with overrides applied; print what they change and which edits are not used."""
    if path.is_dir():
        for text in overrides:
            key, _, place = text.removeprefix("--").partition("=")
            if key == "output" and Path(place).resolve() != path.resolve():
                raise SpecError(f"override {text}: a run stays in its folder; copy {path} and resume the copy")
        before, after = stored_job(path, list(overrides))
    else:
        wanted = load_job(path, overrides)
        folder = Path(wanted.output)
        kept = [text for text in overrides if not text.removeprefix("--").startswith("output=")]
        before, after = stored_job(folder, kept)
        for line in changes(after, wanted):
            console.print(f"keepwarm: not used, as the run keeps its own spec: {line}; override it to change it")
    for line in changes(before, after):
        console.print(f"keepwarm: changed for the rest of the run, once its ranks accept it: {line}")
    return after


def _leave_waiting(job: JobSpec, overrides: Sequence[str], console: Console) -> None:
    """Print the changes that wait for a submitted job, which this start does not use.

    Raises:
        OutputError: this start has overrides too, which that job would undo.
    """
    changed = waiting(Path(job.output))
    if not changed:
        return
    file = Path(job.output) / SUBMITTED_FILE
    if overrides:
        raise OutputError(
            f"{file}: a submitted job is to resume this run with {'; '.join(changed)}, and would undo other changes: "
            "wait for it, or cancel it and delete this file"
        )
    for line in changed:
        console.print(f"keepwarm: not used, as it waits for a submitted job in {file}: {line}")
