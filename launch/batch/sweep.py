"""`keepwarm submit --sweep`: submit one run per combination of values, as tasks of one array job."""

import contextlib
import itertools
import json
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from keepwarm.launch.batch.runs import FINISHED, runs_in
from keepwarm.launch.batch.submit import SubmitOptions, admit, completed, messages, say, submit_run
from keepwarm.launch.batch.sweep_folder import TABLE, runs_of
from keepwarm.launch.batch_system import Array, BatchSystem, Request, batch_system
from keepwarm.launch.local.train import job_file
from keepwarm.launch.run.prepare import prepared
from keepwarm.launch.run.submission import Submission
from keepwarm.trainer.errors import OutputError, SpecError
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.url import path_override
from keepwarm.trainer.job.yaml import parse_value


def combinations(sweeps: Sequence[str]) -> list[dict[str, Any]]:
    """Return every combination of the values given as `KEY=[VALUE, VALUE]`; the last key varies fastest.

    Raises:
        SpecError: an argument has another form, repeats a key, or sets `output` or `name`.
    """
    asked: dict[str, list[Any]] = {}
    for text in sweeps:
        key, found, values = text.partition("=")
        parsed = parse_value(values, f"--sweep {text}") if found else None
        if not key or not isinstance(parsed, list) or not parsed:
            raise SpecError(f"--sweep {text}: expected KEY=[VALUE, VALUE], as stages.0.lr.max=[1e-3, 3e-4]")
        if key in asked or key in ("output", "name"):
            raise SpecError(f"--sweep {key}: " + ("given twice" if key in asked else "every run has its own anyway"))
        asked[key] = parsed
    return [dict(zip(asked, values, strict=True)) for values in itertools.product(*asked.values())]


def submit_sweep(path: Path, overrides: Sequence[str], options: SubmitOptions) -> None:
    """Create a run folder per combination below the job's output, and submit all runs as one array job.

    Raises:
        SpecError, DataError, OutputError, PreflightError, ClusterError: nothing was submitted.
    """
    console = messages()
    system = batch_system(options.backend)
    base = load_job(job_file(path), overrides)
    values = combinations(options.sweep)
    jobs = [_member(path, overrides, base, number, each) for number, each in enumerate(values)]
    jobs, taken = completed(system, jobs, dry_run=options.dry_run)
    array = Array(members=len(jobs), max_parallel=options.max_parallel)
    request = Request(job=_named(jobs[0], base.name), folder=Path(base.output), array=array, probe=options.probe)
    admit(system, request, console, dry_run=options.dry_run, others=jobs[1:])
    script = system.render(request)
    if any(system.render(replace(request, job=_named(job, base.name))) != script for job in jobs):
        raise SpecError("--sweep: all runs of an array get the same nodes; submit runs of different layouts one by one")
    if options.dry_run:
        say(console, taken)
        _print_dry_run(system, request, script, values)
        return
    root = request.folder
    if root.exists():
        raise OutputError(f"{root}: the folder exists, and a sweep starts new runs; choose another with output=PATH")
    root.mkdir(parents=True)
    try:
        (root / system.script).write_text(script, encoding="utf-8")
        (root / TABLE).write_text(json.dumps(dict(enumerate(values)), indent=1) + "\n", encoding="utf-8")
        job_id = _submit(system, request, jobs, console)
    except BaseException:
        shutil.rmtree(root)
        raise
    say(console, taken)
    console.print(
        f"keepwarm: {base.name}: {len(jobs)} runs submitted as job {job_id}; outputs in {shlex.quote(str(root))}"
    )
    print(job_id)


def resume_sweep(folder: Path, overrides: Sequence[str], options: SubmitOptions) -> None:
    """Submit each run of a sweep that has neither finished nor an active job, as a job of its own.

    Raises:
        OutputError: there is nothing to resume.
        Other errors as `submit_run`, for the first run that cannot be submitted.
    """
    rows = [(run, row) for run in runs_of(folder) for row in runs_in(run) if Path(row.folder) == run]
    left = [run for run, row in rows if row.state not in FINISHED and (row.job is None or not row.job.active)]
    if not left:
        raise OutputError(f"{folder}: each run of this sweep has finished or has an active job")
    for run in left:
        submit_run(run, overrides, options)


def _member(path: Path, overrides: Sequence[str], base: JobSpec, number: int, values: dict[str, Any]) -> JobSpec:
    own = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    output = path_override("output", Path(base.output) / str(number))
    return load_job(path, [*overrides, *own, output, f"name={json.dumps(f'{base.name}-{number}')}"])


def _named(job: JobSpec, name: str) -> JobSpec:
    """Return the job under the sweep's name, which the script shared by all runs uses."""
    return job.model_copy(update={"name": name})


def _print_dry_run(system: BatchSystem, request: Request, script: str, values: Sequence[dict[str, Any]]) -> None:
    print(script, end="")
    print("".join(f"\n# {request.folder / str(number)}: {_shown(each)}" for number, each in enumerate(values)))
    if command := system.command(request):
        print(f"# {shlex.join(command)}")


def _submit(system: BatchSystem, request: Request, jobs: Sequence[JobSpec], console: Console) -> str:
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(prepared(job, "new")).parent for job in jobs]
        for folder in folders:
            RunFolder(folder).logs.mkdir()
        say(console, system.stage(request, folders[0]))
        record = Submission(batch_system=system.name, submitted=time.time(), resume=False)
        # The tasks read this when they start, which may be before their IDs are known here.
        for folder in folders:
            record.write(folder)
        job_id = system.submit(request)
        for number, folder in enumerate(folders):
            record.with_job(system.member(job_id, number)).write(folder)
    return job_id


def _shown(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
