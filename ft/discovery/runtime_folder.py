"""What an agent leaves in the file system of its node while it lives, and how the rest is swept."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from keepwarm.ft.discovery.config import LOCK
from keepwarm.ft.errors import AgentError


def take_lock(folder: Path) -> int:
    """Claim the folder for this process; the kernel gives it up when the process ends, however it ends."""
    claimed = _claim(folder / f".{LOCK}.{os.getpid()}", folder)
    try:
        # Linked into place with the lock held: an agent that sweeps meanwhile never sees a lock that nobody holds.
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
    """Remove the folders of dead agents of other runs; memory has gone with them.

    Those of the same run are left to the agents that follow them: one of them may be starting right now.
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
    """Remove a folder whose lock is held, and the lock with it."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
