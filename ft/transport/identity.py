"""What makes a run folder a run of its own: its secret, and the place where that was made, by which a copy is known.

    RUN/secret                   shared by all processes of the run; its digest names the run among agents
    RUN/place.json               path and inodes of the folder and of the secret when the run was last started
    RUN/secret-after-<digest>    in a copy: its own secret, in place of the one with this digest that it came with

A folder that was moved has the same inodes; one that is mounted elsewhere, or on a file system whose inodes do not
last, has the same inodes or the same path. A copy has neither. Before it is started, it leaves behind what belongs to
the processes of the original: its agents, memory, supervisors, stores and jobs.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import sys
import time
from pathlib import Path

import msgspec

from keepwarm.files import READABLE, atomic_create, atomic_write
from keepwarm.ft.transport.auth import SECRET, create_secret, load_secret

PLACE = "place.json"
SUCCESSOR = "secret-after-"
"""Start of a file name; the first process that creates it decides on the secret of a copy."""
OF_ONE_START = (
    "agents", "nodes", "submission.json", "run.submitted.json", "run.proposed.json", "cancelled-[0-9]*"
)  # fmt: skip
"""What in a run folder belongs to the processes and jobs of one run."""
TAKE_OVER_S = 30.0
"""How long a process leaves the separation of a copy to another one that has begun it."""
POLL_INTERVAL_S = 0.05


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run folder is."""

    path: str
    inodes: tuple[int, int]
    """Of the folder and of its secret; 0 for what is not there."""
    secret: str
    """Digest of the secret."""


def copied_from(folder: Path) -> str | None:
    """Return the path of the run of which a folder is a copy that was not started yet; None if it is no such copy."""
    recorded = _recorded(folder)
    return None if recorded is None or _same(recorded, *_where(folder)) else recorded.path


def separate(folder: Path) -> None:
    """Make a copy of a run a run of its own, and say so; do nothing to any other folder.

    Of several processes, on several nodes too, all go on with the same secret.

    Raises:
        AuthenticationFailed: other users can read or replace the secret.
        OSError: the folder cannot be written.
    """
    recorded = _recorded(folder)
    if recorded is None or _same(recorded, *_where(folder)):
        return
    here = _place(folder)
    if not here.inodes[1]:
        _leave_behind(folder)
    elif here.secret == recorded.secret:
        successor = folder / f"{SUCCESSOR}{here.secret}"
        began = atomic_create(successor, secrets.token_hex(32).encode())
        secret = load_secret(successor)
        if not began and _separated(folder, secret):
            return
        _leave_behind(folder)
        atomic_write(folder / SECRET, secret, durable=True)  # last: another process goes on from here
        print(
            f"keepwarm: {folder}: this is a copy of {recorded.path} and becomes a run of its own: it continues from "
            "its checkpoints on disk, and what the original holds in memory stays with the original",
            file=sys.stderr,
            flush=True,
        )
    _record(folder)


_held: dict[Path, bytes] = {}


def hold_secret(folder: Path, secret: bytes) -> None:
    """Let `held_secret` return the secret of a run, in this process and its forks: it is read from storage once."""
    _held[folder] = _held[folder.resolve()] = secret


def held_secret(folder: Path) -> bytes | None:
    """Return the secret of a run if the process that this one was forked from has it. No file is used."""
    return _held.get(folder)


def claim_secret(folder: Path) -> bytes:
    """Return the secret of a run, made by the first process that asks for it. A copy of a run gets its own.

    Raises as `separate`, if there is no secret yet or the folder is a copy.
    """
    separate(folder)
    secret = create_secret(folder / SECRET)
    remember(folder)
    return secret


def remember(folder: Path) -> None:
    """Note where a run folder is, by which its copies are known. One that is full or read-only keeps its run."""
    with contextlib.suppress(OSError):
        _record(folder)


def _separated(folder: Path, secret: bytes) -> bool:
    """Wait until another process has separated a copy; return False if it does not."""
    end = time.monotonic() + TAKE_OVER_S
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if (folder / SECRET).read_bytes() == secret:
                return True
        time.sleep(POLL_INTERVAL_S)
    return False


def _leave_behind(folder: Path) -> None:
    for pattern in OF_ONE_START:
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _recorded(folder: Path) -> Place | None:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((folder / PLACE).read_bytes(), type=Place)
    return None


def _where(folder: Path) -> tuple[str, tuple[int, int]]:
    """Return path and inodes; those who may not read the secret can do this."""
    secret = folder / SECRET
    return os.path.realpath(folder), (folder.stat().st_ino, secret.stat().st_ino if secret.exists() else 0)


def _place(folder: Path) -> Place:
    path, inodes = _where(folder)
    content = (folder / SECRET).read_bytes() if inodes[1] else b""
    return Place(path=path, inodes=inodes, secret=hashlib.sha256(b"keepwarm secret " + content).hexdigest()[:16])


def _same(recorded: Place, path: str, inodes: tuple[int, int]) -> bool:
    return recorded.path == path or recorded.inodes == inodes


def _record(folder: Path) -> None:
    """Note the present place, unless it is noted already."""
    content = msgspec.json.encode(_place(folder))
    with contextlib.suppress(FileNotFoundError):
        if (folder / PLACE).read_bytes() == content:
            return
    atomic_write(folder / PLACE, content, mode=READABLE)
