"""Runtime folder of a live agent on its node, and cleanup of those left by dead agents."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from keepwarm.ft.errors import AgentError

LOCK = "lock"


def take_lock(folder: Path) -> int:
    """Lock the folder for this process. The kernel releases the lock when the process ends for any reason."""
    claimed = _claim(folder / f".{LOCK}.{os.getpid()}", folder)
    try:
        # Link the file into place with the lock held: a concurrent sweep never sees an unheld lock.
        os.link(folder / f".{LOCK}.{os.getpid()}", folder / LOCK)
    except FileExistsError:
        os.close(claimed)
        claimed = _claim(folder / LOCK, folder)
    finally:
        (folder / f".{LOCK}.{os.getpid()}").unlink(missing_ok=True)
    return claimed


def _claim(path: Path, folder: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AgentError(f"{folder}: its agent runs already") from None
    return descriptor


def sweep(root: Path, mine: Path) -> list[Path]:
    """Remove the folders of dead agents of other runs. Their memory is already gone.

    Folders of the same run are left to their successors, one of which may be starting right now.
    """
    gone = []
    run = mine.name.rpartition("-")[0]
    for folder in root.iterdir():
        same_run = bool(run) and folder.name.rpartition("-")[0] == run
        if folder == mine or same_run or not (folder / LOCK).exists():
            continue
        with contextlib.suppress(AgentError, OSError):
            clear(folder, take_lock(folder))
            gone.append(folder)
    return gone


def clear(folder: Path, lock: int) -> None:
    """Remove a folder whose lock is held, together with the lock."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
