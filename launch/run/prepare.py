"""Prepare a run folder: create, resume or refuse it, and list the values that overrides of a resumed run change."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.job.files import load_run, save_job
from keepwarm.trainer.job.run_folder import RUN_FILE, RunFolder
from keepwarm.trainer.job.spec import JobSpec

Mode = Literal["new", "resume", "force"]


@contextlib.contextmanager
def prepared(job: JobSpec, mode: Mode) -> Iterator[Path]:
    """Write the job's `run.json` to its run folder and yield the folder, locked for this process.

    If the body raises before any training, a folder created here is removed.

    Raises:
        OutputError: the folder cannot be created or written, holds something else, exists in mode `new`, holds no
            run in mode `resume`, or another process trains in it.
    """
    folder = Path(job.output)
    _admit(folder, mode)
    made = not folder.is_dir()
    with contextlib.ExitStack() as stack:
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_held(folder))
        try:
            with _explained(folder):
                if mode == "force":
                    _clear(folder)
                save_job(job, RunFolder(folder).run_file)
            yield folder
        except BaseException:
            if mode != "resume" and not RunFolder(folder).has_begun:
                _undo(folder, made)
            raise


def stored_job(folder: Path, overrides: list[str]) -> tuple[JobSpec, JobSpec]:
    """Return the job stored in a run folder, before and after overrides.

    Raises:
        OutputError: there is no run in the folder.
        SpecError: an override does not fit the job.
    """
    file = RunFolder(folder).run_file
    if not file.is_file():
        raise OutputError(
            f"{folder}: there is no run to resume ({RUN_FILE} is missing); leave out --resume to start one"
        )
    return load_run(file), load_run(file, overrides)


def changes(before: JobSpec, after: JobSpec) -> list[str]:
    """Return `KEY: before -> after` for every changed value."""
    old, new = _flat(before.model_dump(mode="json")), _flat(after.model_dump(mode="json"))
    keys = [*old, *(key for key in new if key not in old)]
    return [f"{key}: {_shown(old, key)} -> {_shown(new, key)}" for key in keys if old.get(key) != new.get(key)]


def _admit(folder: Path, mode: Mode) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: output must be a folder, this is a file; choose another with output=PATH")
    try:
        used = folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise OutputError(f"{folder}: cannot be read: {error.strerror}") from error
    if mode == "new" and used:
        raise OutputError(f"{folder}: the run folder exists; --resume continues it, --force starts over")
    if mode == "force" and used and not RunFolder(folder).exists:
        raise OutputError(f"{folder}: --force empties run folders only, and this has no {RUN_FILE}; choose another")


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{folder}: the run folder cannot be used: {error.strerror or error}") from error


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{folder}: another keepwarm process trains in this folder") from error
        yield
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    # Remove run.json last, so that an interrupted clearing can be repeated.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RUN_FILE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _undo(folder: Path, made: bool) -> None:
    with contextlib.suppress(OSError):
        _clear(folder)
        if made:
            folder.rmdir()


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}" if key else name).items()
        }
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {k: v for i, inner in enumerate(value) for k, v in _flat(inner, f"{key}.{i}").items()}
    return {key: value}


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "absent"
