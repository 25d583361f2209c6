"""Durable checkpoints: one safetensors file per rank and a JSON manifest, either complete and verified or absent.

A folder `iter_0000100` holds

    rank_00000.safetensors      (or .safetensors.zst)  the pieces of one rank; the header describes each of them
    manifest.json               identity, free-form `meta`, and checksums of every header and tensor

It is written under a temporary name, synced and renamed. The newest checkpoint is the complete one with the largest
(epoch, step); the file `latest` beside it is a hint for people and for stores that cannot be listed. Nothing is
pickled, and every length in a file is checked against the file before use.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from keepwarm.files import READABLE, atomic_write, sync_directory
from keepwarm.ft.errors import DurableError
from keepwarm.ft.format.manifest import MANIFEST, VERSION, Manifest, check_age, read_manifest
from keepwarm.ft.format.reader import BLOCK, compare, read_header, read_part

LATEST = "latest"
_REPLACED = "tmp-old-"
_ASSEMBLING = ".assembling"
_FINAL = re.compile(r"iter_(\d{7,})")
_HEAD_BYTES = 4096
_HEAD = re.compile(rb'\s*\{\s*"version":\s*\d+,\s*"run":\s*"(?:[^"\\]|\\.)*",\s*"epoch":\s*(\d+),\s*"step":\s*(\d+),')
"""Beginning of a manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Identity of the state in a checkpoint: step `step` of a run's epoch, in the pieces of a layout."""

    run: str
    epoch: int
    step: int
    layout: str


def write_manifest(directory: Path, identity: Identity, *, ranks: int, meta: Mapping[str, Any]) -> Manifest:
    """Collect the part headers of all `ranks` into the manifest. Raise if one is missing or belongs elsewhere."""
    parts = []
    for rank in range(ranks):
        found = sorted(directory.glob(f"rank_{rank:05d}.safetensors*"))
        if len(found) != 1:
            raise DurableError(f"{directory}: {len(found)} parts of rank {rank}, needed exactly one")
        part = read_header(found[0])
        if part.rank != rank:
            raise DurableError(f"{found[0]}: was written by rank {part.rank}")
        check_age(part, identity.epoch, identity.step, str(found[0]))
        parts.append(part)
    manifest = Manifest(version=VERSION, **asdict(identity), meta=dict(meta), parts=tuple(parts))
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    atomic_write(directory / MANIFEST, text, mode=READABLE, durable=True)
    return manifest


def verify(directory: Path, progress: Callable[[int, int], object] | None = None) -> Manifest:
    """Verify every byte of a checkpoint against the manifest. Raise `DurableError` naming the file.

    `progress` is called with the bytes read so far and the total bytes of the checkpoint.
    """
    manifest = read_manifest(directory)
    done, total = 0, sum(part.data_bytes for part in manifest.parts)
    # Reuse one buffer: fresh memory for every block would cost more than reading it.
    memory = np.empty(BLOCK, np.uint8)
    for part in manifest.parts:
        for entry, blocks in read_part(directory, part, memory):
            seen = xxhash.xxh3_64()
            for block in blocks:
                seen.update(block)
            compare(directory, part, entry, seen.hexdigest())
            done += entry.stop - entry.start
            if progress is not None:
                progress(done, total)
    return manifest


def folder(root: Path, step: int) -> Path:
    """Return the folder of the published checkpoint of a step."""
    return root / f"iter_{step:07d}"


def staging(root: Path, epoch: int, step: int, writer: str = "agents") -> Path:
    """Return the staging folder, the same on every node. `writer` keeps agents and workers apart on one step."""
    return root / f"tmp-{epoch}-{step}-{writer}"


@contextlib.contextmanager
def _sole_publisher(root: Path) -> Iterator[None]:
    """Allow one process at a time to publish or rename. The kernel releases the lock if the process dies."""
    descriptor = os.open(root / ".publishing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def assembling(tmp: Path) -> Iterator[bool]:
    """Yield whether this process alone may complete or drop a staging folder, for as long as the block lasts.

    False: another process does so, or the folder is gone. The kernel releases the claim of a process that dies.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = os.open(tmp, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            claim = os.open(_ASSEMBLING, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=folder)
            stack.callback(os.close, claim)
            mine = _locked(claim) and tmp.is_dir() and os.path.samestat(tmp.stat(), os.fstat(folder))
        except FileNotFoundError:
            mine = False
        yield mine
        if mine:
            with contextlib.suppress(OSError):  # by descriptor: the folder may have its final name by now
                os.unlink(_ASSEMBLING, dir_fd=folder)


def _locked(descriptor: int) -> bool:
    """Lock a file unless another process holds it. A file system without locks grants every claim."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
            raise
    return True


def publish(tmp: Path, final: Path) -> bool:
    """Rename a complete, verified checkpoint to its final name and point `latest` at it.

    Return False, and leave `latest` alone, if a checkpoint with a newer (epoch, step) is there: readers prefer that
    one. A checkpoint of the same step from an earlier epoch is replaced, one from a later epoch stays.
    """
    with _sole_publisher(final.parent):
        return _publish(tmp, final)


def _publish(tmp: Path, final: Path) -> bool:
    manifest = read_manifest(tmp)
    mine = manifest.epoch, manifest.step
    sync_directory(tmp)
    there = _age(final)
    if there is not None and there > mine:
        shutil.rmtree(tmp)
        return False
    newest = latest(final.parent)
    forward = newest is None or mine >= (_age(newest) or mine)
    if final.exists():
        old = final.with_name(f"{_REPLACED}{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        tmp.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        tmp.rename(final)
    sync_directory(final.parent)
    if forward:
        _point_to(final)
    return forward


def _point_to(final: Path) -> None:
    """Move `latest` to a checkpoint that has its name. Without the file, readers compare all checkpoints."""
    latest_file = final.parent / LATEST
    try:
        atomic_write(latest_file, f"{final.name}\n".encode(), mode=READABLE, durable=True)
    except OSError:
        latest_file.unlink(missing_ok=True)


def published(root: Path, epoch: int, step: int) -> bool:
    """Return whether the checkpoint of a step is there, from this epoch or a later one."""
    return (_age(folder(root, step)) or (-1, -1)) >= (epoch, step)


def _undo_replacement(root: Path) -> None:
    """Restore the name of a checkpoint that a killed publisher moved away without replacing it."""
    replaced = [path for path in root.glob(f"{_REPLACED}*") if (path / MANIFEST).is_file()]
    if not replaced:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(root / ".publishing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # The holder is alive and will finish.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in replaced:
                final = root / path.name.removeprefix(_REPLACED)
                if path.exists() and not final.exists():
                    path.rename(final)
        finally:
            os.close(descriptor)


def latest(root: Path) -> Path | None:
    """Return the complete checkpoint with the largest (epoch, step), or None."""
    _undo_replacement(root)
    for _, path in reversed(_by_age(root)):
        with contextlib.suppress(DurableError):
            read_manifest(path)
            return path
    return None


def newest_epoch(root: Path) -> int:
    """Return the largest epoch of a checkpoint under `root`, or -1 if there is none."""
    return max((epoch for (epoch, _), _ in _by_age(root)), default=-1)


def checkpoints(root: Path) -> list[Path]:
    """Return complete checkpoints under `root`, ascending in (epoch, step), skipping unreadable manifests."""
    found = []
    for _, path in _by_age(root):
        with contextlib.suppress(DurableError):
            read_manifest(path)
            found.append(path)
    return found


def _by_age(root: Path) -> list[tuple[tuple[int, int], Path]]:
    """Return checkpoints with their (epoch, step), ascending. Their manifests may turn out to be damaged."""
    paths = (path for path in root.glob("iter_*") if _FINAL.fullmatch(path.name))
    return sorted((age, path) for path in paths if (age := _age(path)) is not None)


def _age(path: Path) -> tuple[int, int] | None:
    """Return (epoch, step) of a checkpoint from the beginning of its manifest. None: there is none."""
    with contextlib.suppress(OSError, DurableError):
        with (path / MANIFEST).open("rb") as file:
            head = _HEAD.match(file.read(_HEAD_BYTES))
        if head is not None:
            return int(head[1]), int(head[2])
        manifest = read_manifest(path)
        return manifest.epoch, manifest.step
    return None


def prune(root: Path, keep: int, every: int | None = None, *, published: Path | None = None) -> list[Path]:
    """Delete all but the newest `keep` checkpoints and those whose step is a multiple of `every`. Return the deleted.

    The newest one, the one that `latest` names and `published`, which was written just now, are never deleted. Staging
    folders are left to `sweep`.
    """
    if not root.is_dir():
        return []
    with _sole_publisher(root):
        return _prune(root, keep, every, published)


def _prune(root: Path, keep: int, every: int | None, published: Path | None) -> list[Path]:
    names = checkpoints(root)
    spared = {*names[max(0, len(names) - max(keep, 1)) :], published, _named(root)}
    gone = []
    for path in names:
        step = read_manifest(path).step
        if path in spared or (every is not None and step % every == 0):
            continue
        # Rename first: a reader must never see half a checkpoint under its final name.
        doomed = path.with_name(f"tmp-pruned-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
        gone.append(path)
    return gone


def _named(root: Path) -> Path | None:
    """Return the checkpoint that the file `latest` names."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        name = (root / LATEST).read_text().strip()
        if _FINAL.fullmatch(name):
            return root / name
    return None


def sweep(root: Path) -> list[Path]:
    """Delete the remains of interrupted writers. Call only before any process writes to `root`."""
    _undo_replacement(root)
    left = [path for path in root.glob("tmp-*") if path.is_dir()]
    for path in left:
        shutil.rmtree(path)
    return left
