"""`keepwarm submit`: submit a job file to a batch system."""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from pathlib import Path

from rich.console import Console

from keepwarm.launch.batch.jobs import jobs_of
from keepwarm.launch.batch_system import BatchSystem, Request, batch_system
from keepwarm.launch.errors import ClusterError, OptionError
from keepwarm.launch.local.train import continued, new_job
from keepwarm.launch.run.preflight import check_engine, check_job
from keepwarm.launch.run.prepare import Mode, check_output, prepared, waiting
from keepwarm.launch.run.submission import Submission
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.spec import JobSpec


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """Options of `keepwarm submit`. Raises OptionError if they conflict."""

    backend: str = "slurm"
    """Name of the batch system."""
    mode: Mode = "new"
    chain: int = 1
    """Number of consecutive jobs, each continuing the previous one; for runs longer than the time limit."""
    sweep: Sequence[str] = ()
    max_parallel: int | None = None
    probe: bool = False
    """Ask a node beforehand whether it sees the run folder; the job checks its nodes when it starts in any case."""
    dry_run: bool = False
    """Print the script and the command without writing or submitting anything."""

    def __post_init__(self) -> None:
        if self.probe and self.dry_run:
            raise OptionError("--check asks a node, and --dry-run asks nothing: give one of the two")
        if self.sweep and (self.mode != "new" or self.chain > 1):
            raise OptionError("--sweep starts new runs; continue one with keepwarm submit SWEEP/0 --resume")
        if self.max_parallel is not None and not self.sweep:
            raise OptionError("--max-parallel limits the runs of a sweep: give --sweep, or leave it out")


def submit_run(path: Path, overrides: Sequence[str], options: SubmitOptions) -> None:
    """Validate a job against its files and the batch system, create its run folder and submit it.

    `path` is a job file; to resume, also a run folder.

    Raises:
        SpecError, DataError, OutputError, PreflightError, ClusterError: nothing was submitted.
    """
    console = messages()
    system = batch_system(options.backend)
    resume = options.mode == "resume"
    job = continued(path, overrides, console) if resume else new_job(path, overrides, options.mode)
    (job,), taken = completed(system, [job], dry_run=options.dry_run)
    request = Request(job=job, folder=Path(job.output), mode=options.mode, chain=options.chain, probe=options.probe)
    admit(system, request, console, dry_run=options.dry_run)
    if options.dry_run:
        check_output(job, request.mode)
        say(console, taken)
        print(system.render(request), end="")
        if command := system.command(request):
            print(f"\n# {shlex.join(command)}")
            if options.chain > 1:
                print(f"# {options.chain} times, each after the end of the one before")
        return
    if request.mode != "new":
        _refuse_while_active(request.folder)
        for line in waiting(request.folder) if resume else ():
            console.print(f"keepwarm: no longer waiting for an earlier submission: {line}")
    with prepared(job, request.mode, submitted=True) as spec:
        folder = spec.parent
        RunFolder(folder).logs.mkdir(exist_ok=True)
        (folder / system.script).write_text(system.render(request), encoding="utf-8")
        say(console, system.stage(request, folder))
        record = Submission(batch_system=system.name, submitted=time.time(), resume=resume)
        # The job reads this when it starts, which may be before its ID is known here.
        record.write(folder)
        for _ in range(request.chain):
            link = replace(request, after=record.jobs[-1] if record.jobs else None)
            record = record.with_job(system.submit(link))
            record.write(folder)
    say(console, taken)
    console.print(
        f"keepwarm: {job.name}: submitted as job {', '.join(record.jobs)}; outputs in {shlex.quote(str(folder))}"
    )
    print(record.jobs[0])


def messages() -> Console:
    """Return the console for messages to the user, separate from a command's result on stdout."""
    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def say(console: Console, lines: Sequence[str]) -> None:
    """Print remarks to the user."""
    for line in lines:
        console.print(f"keepwarm: {line}")


def completed(system: BatchSystem, jobs: Sequence[JobSpec], *, dry_run: bool) -> tuple[list[JobSpec], list[str]]:
    """Return jobs that are submitted together with what they leave to the batch system, and what the first one gets.

    Raises ClusterError.
    """
    done = system.completed(jobs, dry_run=dry_run)
    before, after = (each[0].cluster for each in (jobs, done))
    values, known = after.model_dump(mode="json"), before.sources or {}
    taken = {key: source for key, source in (after.sources or {}).items() if source != known.get(key)}
    return done, [
        f"cluster.{key} = {json.dumps(reduce(getitem, key.split('.'), values))}: {source}"
        for key, source in taken.items()
    ]


def admit(
    system: BatchSystem, request: Request, console: Console, *, dry_run: bool, others: Sequence[JobSpec] = ()
) -> None:
    """Check a request against this machine and the batch system, and print the batch system's remarks.

    `others` are the further runs of an array.

    Raises:
        PreflightError, DataError, ClusterError: the job cannot run; the message gives the reason.
    """
    if request.array is not None and not system.has_arrays:
        raise ClusterError(f"--sweep: keepwarm submits no arrays to {system.title}; submit the runs one by one")
    if request.chain > 1 and not system.has_chains:
        raise ClusterError(f"--chain: keepwarm submits no chains to {system.title}; continue the run with --resume")
    check = check_job if system.sees_files else check_engine
    for job in (request.job, *others):
        check(job)
    say(console, system.check(request, dry_run=dry_run))


def _refuse_while_active(folder: Path) -> None:
    for job in jobs_of(folder):
        if job.active:
            raise ClusterError(
                f"{folder}: job {job.id} of this run is {job.state}; keepwarm cancel {shlex.quote(str(folder))} ends "
                "it first"
            )
