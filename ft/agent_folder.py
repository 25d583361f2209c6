"""What an agent leaves in the file system of its node while it lives, and how the rest is swept."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from ft.agent_config import LOCK
from ft.errors import AgentError


def take_lock(folder: Path) -> int:
    """Claim the folder for this process; the kernel gives it up when the process ends, however it ends."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AgentError(f"{folder}: its agent runs already") from None
    return descriptor


def sweep(root: Path, mine: Path) -> list[Path]:
    """Remove the folders of agents that are dead; memory has gone with them."""
    gone = []
    for folder in root.iterdir():
        if folder == mine or not (folder / LOCK).exists():
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
