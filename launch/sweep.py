"""`keepwarm submit --sweep`: one run for each combination of values, as the tasks of one SLURM array job."""

import contextlib
import itertools
import json
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from launch import slurm, submit
from launch.cluster_check import check_offered, probe
from launch.preflight import check_installation, check_job
from launch.prepare import prepared
from launch.slurm_script import SCRIPT, Array, render
from launch.train import job_file
from trainer.errors import OutputError, SpecError
from trainer.run_folder import RunFolder
from trainer.spec import JobSpec
from trainer.spec_file import load_job
from trainer.spec_yaml import parse_value

TABLE = "sweep.json"
"""In the folder of a sweep: the values of each run, by its folder's name."""


def combinations(sweeps: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of the values that are asked for as `KEY=[VALUE, VALUE]`, the last key changing fastest.

    Raises:
        SpecError: a text is something else, or names a key again.
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


def submit_sweep(
    path: Path, overrides: Sequence[str], sweeps: Sequence[str], *, at_once: int | None, dry_run: bool
) -> None:
    """Make a run folder for every combination, below the job's output, and hand them to SLURM as one array job.

    Raises:
        SpecError, DataError, OutputError, PreflightError, ClusterError: nothing was submitted.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    check_installation()
    base = load_job(job_file(path), overrides)
    root, values = Path(base.output), combinations(sweeps)
    jobs = [_member(path, overrides, base, number, each) for number, each in enumerate(values)]
    array = Array(members=len(jobs), at_once=at_once)
    scripts = {render(job.model_copy(update={"name": base.name}), root, array=array) for job in jobs}
    if len(scripts) > 1:
        raise SpecError("--sweep: all runs of an array get the same nodes; submit runs of different layouts one by one")
    for job in jobs:
        check_job(job)
    check_offered(jobs[0], console, dry_run=dry_run)
    (script,) = scripts
    if dry_run:
        print(script, end="")
        print("".join(f"\n# {root / str(number)}: {_shown(each)}" for number, each in enumerate(values)))
        print(f"# {shlex.join(submit.command(root))}")
        return
    if root.exists():
        raise OutputError(f"{root}: the folder exists, and a sweep starts anew; choose another with output=PATH")
    root.mkdir(parents=True)
    try:
        number_of = _submit(root, script, jobs, values, console)
    except BaseException:
        shutil.rmtree(root)
        raise
    console.print(f"keepwarm: {base.name}: {len(jobs)} runs submitted as job {number_of}; outputs in {root}")
    print(number_of)


def _member(path: Path, overrides: Sequence[str], base: JobSpec, number: int, values: dict[str, Any]) -> JobSpec:
    own = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    output, name = str(Path(base.output) / str(number)), f"{base.name}-{number}"
    return load_job(path, [*overrides, *own, f"output={json.dumps(output)}", f"name={json.dumps(name)}"])


def _submit(
    root: Path, script: str, jobs: Sequence[JobSpec], values: Sequence[dict[str, Any]], console: Console
) -> str:
    (root / SCRIPT).write_text(script, encoding="utf-8")
    (root / TABLE).write_text(json.dumps(dict(enumerate(values)), indent=1) + "\n", encoding="utf-8")
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(prepared(job, "new")) for job in jobs]
        for folder in folders:
            RunFolder(folder).logs.mkdir()
        submit.copy_code(jobs[0], root)
        probe(jobs[0], folders[0], console)
        # The tasks read this when they start, which may be before sbatch has said their number.
        records = [{"submitted": time.time(), "resume": False, "jobs": list[str]()} for _ in folders]
        for folder, record in zip(folders, records, strict=True):
            submit.write_record(folder, record)
        identity = slurm.ask(*submit.command(root)).strip().partition(";")[0]
        for number, (folder, record) in enumerate(zip(folders, records, strict=True)):
            submit.write_record(folder, record | {"jobs": [f"{identity}_{number}"]})
    return identity


def _shown(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
