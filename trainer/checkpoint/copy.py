"""Copy whole checkpoints between folders and URLs: verified, and either complete under their name or absent.

Object stores have no rename. There, a checkpoint is complete once it has its manifest, which is written last; only then
does `latest` move.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keepwarm.ft.errors import DurableError, FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import MANIFEST, Manifest, decode_manifest
from keepwarm.trainer.checkpoint.store import filesystem
from keepwarm.trainer.convert.huggingface.importer import FILES
from keepwarm.trainer.convert.native import find_checkpoint, with_older
from keepwarm.trainer.errors import CheckpointError, OutputError
from keepwarm.trainer.job.url import is_remote, local_path

Progress = Callable[[int, int], object]
"""Called with the bytes copied so far and the total size."""

_BLOCK = 16 << 20
_NAME = re.compile(r"iter_\d{7,}")


def copy(source: str, destination: str, progress: Progress) -> dict[str, Any]:
    """Copy the checkpoint that `source`, a folder or URL, refers to into the checkpoint folder `destination`.

    Returns its new location, its step and its size in bytes.

    Raises:
        CheckpointError: there is none, or it is damaged; names the file.
        OutputError: the destination already has that checkpoint, or cannot be written.
    """
    try:
        if is_remote(destination):
            return _upload(source, destination.rstrip("/"), progress)
        return _download(source, local_path(destination), progress)
    except FtError as error:
        raise CheckpointError(str(error)) from error


def find(url: str) -> str:
    """Return the checkpoint at a URL, or the newest one in the checkpoint folder or run at that URL.

    Raises:
        CheckpointError: there is none.
    """
    if not is_remote(url):
        return str(find_checkpoint(local_path(url)))
    url = url.rstrip("/")
    files, path = filesystem(url)
    if files.exists(f"{path}/{MANIFEST}"):
        return url
    for below in ("", "/checkpoints"):
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            name = files.cat_file(f"{path}{below}/{publication.LATEST}").decode().strip()
            if _NAME.fullmatch(name) and files.exists(f"{path}{below}/{name}/{MANIFEST}"):
                return f"{url}{below}/{name}"
    raise CheckpointError(f"{url}: neither a checkpoint ({MANIFEST}) nor a folder whose {publication.LATEST} names one")


def _upload(source: str, destination: str, progress: Progress) -> dict[str, Any]:
    if is_remote(source):
        raise CheckpointError(f"{source} to {destination}: one of them must be a local folder")
    path = find_checkpoint(local_path(source))
    with _naming_older(str(path)):
        manifest = publication.verify(path)
    files, root = filesystem(destination)
    name = publication.folder(Path(), manifest.step).name
    target = f"{root}/{name}"
    try:
        if files.exists(f"{target}/{MANIFEST}"):
            raise OutputError(f"{destination}/{name} exists already: delete it or choose another place")
        files.makedirs(target, exist_ok=True)
        names = _files(manifest)
        total, done = sum((path / file).stat().st_size for file in names), 0
        for file in names:
            files.makedirs(f"{target}/{file}".rpartition("/")[0], exist_ok=True)
            with (path / file).open("rb") as read, files.open(f"{target}/{file}", "wb") as written:
                for block in _blocks(read):
                    written.write(block)
                    done += len(block)
                    progress(done, total)
            size = files.info(f"{target}/{file}")["size"]
            if size != (path / file).stat().st_size:
                raise OutputError(
                    f"{destination}/{name}/{file}: {size} bytes arrived of {(path / file).stat().st_size}"
                )
        files.pipe_file(f"{target}/{MANIFEST}", (path / MANIFEST).read_bytes())
        if _moves_forward(files, root, manifest):
            files.pipe_file(f"{root}/{publication.LATEST}", f"{name}\n".encode())
    except OSError as error:
        raise OutputError(f"{destination}: {error.strerror or error}; no checkpoint was completed there") from error
    return {"path": f"{destination}/{name}", "step": manifest.step, "bytes": total}


def _download(source: str, root: Path, progress: Progress) -> dict[str, Any]:
    url = find(source)
    files, path = filesystem(url)
    with _naming_older(url):
        manifest = decode_manifest(files.cat_file(f"{path}/{MANIFEST}"), f"{url}/{MANIFEST}")
    final = publication.folder(root, manifest.step)
    if final.exists():
        raise OutputError(f"{final} exists already: delete it or choose another place")
    tmp = publication.staging(root, manifest.epoch, manifest.step, f"copy-{os.getpid()}")
    made = not root.exists()
    try:
        tmp.mkdir(parents=True)
        names = _files(manifest)
        total, done = sum(files.info(f"{path}/{file}")["size"] for file in names), 0
        for file in [*names, MANIFEST]:
            (tmp / file).parent.mkdir(exist_ok=True)
            with files.open(f"{path}/{file}", "rb") as read, (tmp / file).open("xb") as written:
                for block in _blocks(read):
                    written.write(block)
                    done += len(block)
                    progress(min(done, total), total)
                written.flush()
                os.fsync(written.fileno())
        with _naming_older(url, tmp):
            publication.verify(tmp)
        publication.publish(tmp, final)
    except FileNotFoundError as error:
        raise DurableError(f"{url}: {error.filename or error}: missing") from error
    except OSError as error:
        raise OutputError(f"{root}: {error.strerror or error}; nothing was written to {final}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # it holds the copy, or another process's
                root.rmdir()
    return {"path": str(final), "step": manifest.step, "bytes": total}


@contextlib.contextmanager
def _naming_older(source: str, copied: Path | None = None) -> Iterator[None]:
    """Name the source in errors about its copy and, of a damaged local source, the checkpoint before it."""
    try:
        yield
    except FtError as error:
        found = error if copied is None else DurableError(str(error).replace(str(copied), source))
        raise CheckpointError(str(found) if is_remote(source) else with_older(found, Path(source))) from error


def _files(manifest: Manifest) -> list[str]:
    """Return all files except the manifest: parts, and files carried along from elsewhere."""
    carried = (manifest.meta.get(FILES) or {}).get("files", {})
    for name in carried:
        if Path(name).name != name or name in ("", ".", ".."):
            raise DurableError(f"{MANIFEST}: {name!r} is not the name of a file")
    return [*(part.file for part in manifest.parts), *(f"{FILES}/{name}" for name in carried)]


def _moves_forward(files: Any, root: str, manifest: Manifest) -> bool:
    """Return whether the checkpoint that `latest` names there is older or unreadable."""
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError, FtError):
        name = files.cat_file(f"{root}/{publication.LATEST}").decode().strip()
        other = decode_manifest(files.cat_file(f"{root}/{name}/{MANIFEST}"), name)
        return (manifest.epoch, manifest.step) >= (other.epoch, other.step)
    return True


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block
