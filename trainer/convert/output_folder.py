"""Folders that appear under their name complete or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from keepwarm.files import sync_directory
from keepwarm.trainer.errors import OutputError


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a hidden folder next to `final`, which is renamed when the block ends without an error.

    Otherwise it is deleted; leftovers of a killed process are deleted by the next one that writes to the same name.
    Writers must sync their files.

    Raises:
        OutputError: `final` exists and is not an empty folder, or the disk is full or read-only.
    """
    final = Path(os.path.abspath(final))  # noqa: PTH100 - resolve() would follow a link to where it points
    if final.is_symlink() or (final.exists() and (not final.is_dir() or any(final.iterdir()))):
        raise OutputError(f"{final} exists already: delete it or choose another name")
    tmp = final.with_name(f".{final.name}.partial-{os.getpid()}")
    with contextlib.ExitStack() as stack:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            _sweep(final)
            tmp.mkdir()
            stack.callback(shutil.rmtree, tmp, ignore_errors=True)
            stack.callback(os.close, _locked(tmp))
            yield tmp
            sync_directory(tmp)
            tmp.rename(final)
            sync_directory(final.parent)
        except (OSError, RuntimeError) as error:
            why = _write_failure(error, final)
            if why is None:
                raise
            raise OutputError(f"{why}; nothing was written to {final}") from error


def _write_failure(error: BaseException, final: Path) -> str | None:
    """Describe a disk error. After a failed write, torch's archives may only report an unexpected position."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return f"{cause.filename or final}: {cause.strerror or cause}"
    if "inline_container" in str(error):
        return f"{final}: the disk did not take all that was written ({str(error).splitlines()[0]})"
    return None


def write_file(path: Path, content: bytes) -> None:
    """Write and sync a new file."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _locked(folder: Path) -> int:
    """Return a descriptor that holds the lock of a folder; raise `BlockingIOError` if a living process has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(final: Path) -> None:
    prefix = f".{final.name}.partial-"
    for left in [path for path in final.parent.iterdir() if path.name.startswith(prefix)]:
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            descriptor = _locked(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
