"""Atomic replacement of files: readers see the old content or the new, never half of one."""

import os
import secrets
from pathlib import Path


def atomic_write(path: Path, content: bytes, *, mode: int = 0o600, durable: bool = False) -> None:
    """Replace `path` with `content` by writing a temporary sibling and renaming it.

    The temporary file is created with `mode` and is removed if anything fails; `path` is then what it was. With
    `durable` the bytes and the directory entry are flushed to the disk first, so that they survive a loss of power.

    Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename or a removal in it survives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
