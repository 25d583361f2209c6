"""Prepare a run folder: create, resume or refuse it, and list the values that overrides of a resumed run change."""

import contextlib
import json
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from keepwarm.files import locked_folder
from keepwarm.ft.errors import FtError
from keepwarm.ft.transport.identity import remember, separate
from keepwarm.launch.run.inputs import inputs, refuse_inputs_inside
from keepwarm.parallel.spec import OptimizerSpec
from keepwarm.trainer.errors import OutputError, SpecError
from keepwarm.trainer.job.files import load_run, save_job
from keepwarm.trainer.job.run_folder import RUN_FILE, RunFolder
from keepwarm.trainer.job.spec import JobSpec

Mode = Literal["new", "resume", "force"]


@contextlib.contextmanager
def prepared(job: JobSpec, mode: Mode, *, submitted: bool = False) -> Iterator[Path]:
    """Write the job to its run folder, locked for this process, and yield the file to start the ranks with: `run.json`,
    or in mode `resume`, if the job differs from the run's spec, a proposal that replaces `run.json` once all ranks have
    accepted it.

    A proposal that was not accepted is deleted at the end of the block; with `submitted` it waits for a batch job. If
    the body raises before any training, a folder created here is removed.

    Raises:
        OutputError: the folder cannot be created or written, holds something else or an input of the job, exists in
            mode `new`, holds no run in mode `resume`, or another process trains in it.
    """
    folder = Path(job.output)
    check_output(job, mode)
    made = not folder.is_dir()
    with contextlib.ExitStack() as stack:
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_held(folder))
        if mode == "resume":
            with _explained(folder):
                separate(folder)
            yield stack.enter_context(_proposed(job, folder, submitted=submitted))
            return
        try:
            with _explained(folder):
                if mode == "force" and (left := RunFolder(folder).clear()):
                    names = ", ".join(path.name for path in left)
                    print(f"keepwarm: {folder}: left in place, as keepwarm did not write it: {names}", file=sys.stderr)
                save_job(job, RunFolder(folder).run_file)
                remember(folder)
            yield RunFolder(folder).run_file
        except BaseException:
            if not RunFolder(folder).has_begun:
                _undo(folder, made)
            raise


@contextlib.contextmanager
def _proposed(job: JobSpec, folder: Path, *, submitted: bool) -> Iterator[Path]:
    """Yield the file to resume a run with, and delete a proposal that was not accepted."""
    run = RunFolder(folder)
    unchanged = job == load_run(run.run_file)
    with _explained(folder):
        run.proposed_file.unlink(missing_ok=True)  # of a start that was killed
        if submitted:
            run.submitted_file.unlink(missing_ok=True)
    if unchanged:
        yield run.run_file
        return
    file = run.submitted_file if submitted else run.proposed_file
    save_job(job, file)
    try:
        yield file
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    if not submitted:
        file.unlink(missing_ok=True)


def stored_job(folder: Path, overrides: list[str]) -> tuple[JobSpec, JobSpec]:
    """Return the job stored in a run folder, before and after overrides.

    Raises:
        OutputError: there is no run in the folder.
        SpecError: an override does not fit the job, or changes what a run keeps from its first start.
    """
    file = RunFolder(folder).run_file
    if not file.is_file():
        raise OutputError(
            f"{folder}: there is no run to resume ({RUN_FILE} is missing); leave out --resume to start one"
        )
    before, after = load_run(file), load_run(file, overrides, resubmit=True)
    for key, reason in _KEPT.items():
        old, new = getattr(before, key), getattr(after, key)
        if old != new:
            raise SpecError(f"override {key}={new}: a run keeps {key} = {old}: {reason}; start a new run to change it")
    if (why := _lacking_state(before.optimizer, after.optimizer)) is not None:
        raise SpecError(f"override optimizer.{why}; start a new run, with init_from={folder}, to change it")
    return before, after


def _lacking_state(before: OptimizerSpec, after: OptimizerSpec) -> str | None:
    """Return which key asks for an optimizer whose moments a run does not have, and why; None if it has them."""
    stateless = after.name == "sgd" and not after.momentum
    if stateless or (before.name == after.name and bool(before.momentum) == bool(after.momentum)):
        return None
    if before.name != after.name:
        return f"name={after.name}: the checkpoints of the run hold the moments of {before.name}"
    return f"momentum={after.momentum:g}: the checkpoints of the run hold no momentum"


_KEPT = {
    "seed": "its ledger, saved in every checkpoint, orders the data by it",
    "init_from": "it was read at the first start alone",
}
"""Keys that a resumed run does not read again, each with the reason."""


def waiting(folder: Path) -> list[str]:
    """Return the changes with which a submitted job is to resume the run in a folder, and which it has not yet begun
    with; `KEY: before -> after` for each.
    """
    file = RunFolder(folder).submitted_file
    return changes(load_run(RunFolder(folder).run_file), load_run(file)) if file.is_file() else []


def changes(before: JobSpec, after: JobSpec) -> list[str]:
    """Return `KEY: before -> after` for every changed value."""
    sources = {"cluster": {"sources": True}}
    old, new = (job.model_dump(mode="json", exclude=sources) for job in (before, after))
    return list(_changes(old, new, ""))


def _changes(old: Any, new: Any, key: str) -> Iterator[str]:
    below = f"{key}." if key else ""
    if isinstance(old, dict) and isinstance(new, dict) and old and new:
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _changes(old.get(name, _ABSENT), new.get(name, _ABSENT), f"{below}{name}")
    elif all(isinstance(value, list) and value and isinstance(value[0], dict) for value in (old, new)):
        for place, pair in enumerate(zip_longest(old, new, fillvalue=_ABSENT)):
            yield from _changes(*pair, f"{below}{place}")
    elif old != new:
        yield f"{key}: {_shown(old)} -> {_shown(new)}"


_ABSENT = object()


def _shown(value: Any) -> str:
    """Return a value as JSON, a section without what it leaves out: absent, null and empty values."""
    if isinstance(value, dict):
        return json.dumps({name: inner for name, inner in value.items() if inner not in (None, [], {})})
    return "absent" if value is _ABSENT else json.dumps(value)


def check_output(job: JobSpec, mode: Mode) -> None:
    """Raise OutputError if the run folder does not fit the mode, or `force` would delete an input of the job."""
    folder = Path(job.output)
    _admit(folder, mode)
    if mode == "force":
        refuse_inputs_inside(folder, inputs(job))


def _admit(folder: Path, mode: Mode) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: output must be a folder, this is a file; choose another with output=PATH")
    try:
        used = folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise OutputError(f"{folder}: cannot be read: {error.strerror}") from error
    if mode == "new" and used:
        if RunFolder(folder).exists:
            raise OutputError(
                f"{folder}: the run folder exists; keepwarm train --resume continues it, --force starts over"
            )
        raise OutputError(f"{folder}: the folder exists and holds no run; choose another with output=PATH")
    if mode == "resume" and not RunFolder(folder).exists:
        raise OutputError(f"{folder}: there is no run to resume ({RUN_FILE} is missing)")
    if mode == "force" and used and not RunFolder(folder).exists:
        raise OutputError(f"{folder}: --force clears run folders only, and this has no {RUN_FILE}; choose another")


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, FtError) as error:
        why = getattr(error, "strerror", None) or error
        raise OutputError(f"{folder}: the run folder cannot be used: {why}") from error


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(folder))
        except BlockingIOError as error:
            raise OutputError(f"{folder}: another keepwarm process trains in this folder") from error
        yield


def _undo(folder: Path, made: bool) -> None:
    with contextlib.suppress(OSError):
        left = RunFolder(folder).clear()
        if made and not left:
            folder.rmdir()
