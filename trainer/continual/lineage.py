"""Lineage: every run, checkpoint and export records its parents. Torch-free."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepwarm.foreign_json import parse_json
from keepwarm.ft.errors import DurableError
from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import MANIFEST, Manifest, read_manifest
from keepwarm.trainer.convert.huggingface.folder import NOTE
from keepwarm.trainer.errors import CheckpointError
from keepwarm.trainer.job.run_folder import RUN_FILE, RunFolder
from keepwarm.trainer.job.url import is_url

DEPTH = 4
"""Levels of nested folders that are searched for descendants."""


@dataclass(kw_only=True)
class Artefact:
    """One run, one checkpoint outside of runs, or one export."""

    path: Path
    kind: str
    """run, checkpoint, export; or gone, if only a child records it."""
    detail: str = ""
    step: int | None = None
    parents: list["Parent"] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The parent of an artefact, and how the artefact was derived from it."""

    path: Path
    how: str
    step: int | None = None


def describe(path: Path) -> Artefact | None:
    """Describe the artefact in a folder; None if it is not ours. A checkpoint inside a run is described as the run."""
    path = _owner(path.resolve())
    if RunFolder(path).exists:
        try:
            return _run(path)
        except CheckpointError as error:
            return Artefact(path=path, kind="run", detail=f"that cannot be read: {error}")
    if (path / MANIFEST).is_file():
        return _checkpoint(path)
    if (path / NOTE).is_file():
        try:
            note = _json(path / NOTE)
        except CheckpointError as error:
            return Artefact(path=path, kind="export", detail=f"that cannot be read: {error}")
        kind = note.get("format", "Hugging Face")
        return Artefact(path=path, kind="export", detail=str(kind), parents=_parents(note.get("parent"), "exported"))
    return None


def ancestry(path: Path) -> dict[Path, Artefact]:
    """Return an artefact and all its ancestors, by path.

    Raises:
        CheckpointError: nothing at `path` records its origin.
    """
    first = describe(path)
    if first is None:
        raise CheckpointError(f"{path}: neither a run ({RUN_FILE}), a checkpoint ({MANIFEST}) nor an export ({NOTE})")
    found, open_ = {first.path: first}, [first]
    while open_:
        for parent in open_.pop().parents:
            if parent.path not in found:
                artefact = describe(parent.path) or _unknown(parent.path)
                found[parent.path] = artefact
                open_.append(artefact)
    return found


def search(root: Path, depth: int = DEPTH) -> Iterator[Artefact]:
    """Yield every artefact below `root`. Does not descend into artefacts or follow links."""
    artefact = describe(root) if root.is_dir() else None
    if artefact is not None and artefact.path == root.resolve():
        yield artefact
    elif depth > 0 and root.is_dir():
        with os.scandir(root) as entries:
            folders = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
        for folder in folders:
            if not Path(folder).name.startswith("."):
                yield from search(Path(folder), depth - 1)


def family(path: Path, root: Path) -> dict[Path, Artefact]:
    """Return the ancestors of an artefact, and everything below `root` that descends from one of them."""
    found = ancestry(path)
    others = {artefact.path: artefact for artefact in search(root)}
    grown = True
    while grown:
        grown = False
        for artefact in others.values():
            if artefact.path not in found and any(parent.path in found for parent in artefact.parents):
                found[artefact.path] = artefact
                for parent in artefact.parents:
                    found.setdefault(
                        parent.path, others.get(parent.path) or describe(parent.path) or _unknown(parent.path)
                    )
                grown = True
    return found


def tree(members: dict[Path, Artefact], marked: Path) -> list[str]:
    """Return lines of text: roots first, children below their parent; further parents are shown by name."""
    children: dict[Path, list[tuple[Artefact, Parent]]] = {path: [] for path in members}
    for artefact in members.values():
        for parent in artefact.parents[:1]:
            children[parent.path].append((artefact, parent))
    lines: list[str] = []

    def show(artefact: Artefact, edge: str, lead: str, below: str) -> None:
        mark = "  <- this one" if artefact.path == marked else ""
        also = "".join(f", with {_short(parent.path)}" for parent in artefact.parents[1:])
        what = f" {artefact.detail}" if artefact.detail else ""
        at = "" if artefact.step is None else f", step {artefact.step}"
        lines.append(f"{lead}{edge}{_short(artefact.path)}  ({artefact.kind}{what}{at}{also}){mark}")
        under = sorted(children[artefact.path], key=lambda pair: (pair[1].step or 0, str(pair[0].path)))
        for index, (child, parent) in enumerate(under):
            last = index == len(under) - 1
            step = "" if parent.step is None else f" at step {parent.step}"
            show(child, f"{parent.how}{step}: ", below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))

    for path in sorted(members):
        if not members[path].parents:
            show(members[path], "", "", "")
    return lines


def as_data(members: dict[Path, Artefact]) -> list[dict[str, Any]]:
    """Return plain values for JSON."""
    return [
        {
            "path": str(artefact.path),
            "kind": artefact.kind,
            "detail": artefact.detail,
            "step": artefact.step,
            "parents": [
                {"path": str(parent.path), "how": parent.how, "step": parent.step} for parent in artefact.parents
            ],
        }
        for _, artefact in sorted(members.items())
    ]


def _owner(path: Path) -> Path:
    """Return the run that a checkpoint, or a folder of checkpoints, belongs to; else the path itself."""
    for folder in (path, path.parent, path.parent.parent):
        if RunFolder(folder).exists and (folder == path or path.is_relative_to(RunFolder(folder).checkpoints)):
            return folder
    return path


def _run(path: Path) -> Artefact:
    job = _json(RunFolder(path).run_file)
    named = job.get("stages")
    stages = [str(stage.get("name")) for stage in named if isinstance(stage, dict)] if isinstance(named, list) else []
    newest = publication.latest(RunFolder(path).checkpoints) if RunFolder(path).checkpoints.is_dir() else None
    artefact = Artefact(path=path, kind="run", detail=" > ".join(stages))
    record: Any = None
    if newest is not None:
        manifest = _manifest(newest)
        if manifest is not None:
            artefact.step = manifest.step
            record = (manifest.meta.get("run") or {}).get("parent")
    if record is None and job.get("init_from"):
        record = {"path": job["init_from"]}
    how = "continued with its optimizer state" if (record or {}).get("optimizer_state") else "continued"
    artefact.parents = _parents(record, how)
    return artefact


def _checkpoint(path: Path) -> Artefact:
    manifest = _manifest(path)
    if manifest is None:
        return Artefact(path=path, kind="checkpoint", detail="with a damaged manifest")
    if (averaged := manifest.meta.get("averaged")) is not None:
        return Artefact(path=path, kind="checkpoint", parents=_parents(averaged, "averaged"))
    parents = manifest.meta.get("parents") or manifest.meta.get("parent")
    how = str(manifest.meta.get("made_by", "converted"))
    return Artefact(path=path, kind="checkpoint", step=manifest.step or None, parents=_parents(parents, how))


def _parents(records: Any, how: str) -> list[Parent]:
    found = []
    for record in records if isinstance(records, list) else [records]:
        if isinstance(record, dict) and isinstance(record.get("path"), str):
            step = record.get("step")
            where = Path(record["path"])
            owner = where if is_url(record["path"]) else _owner(where.resolve())
            found.append(Parent(path=owner, how=how, step=step if isinstance(step, int) and step else None))
    return found


def _unknown(path: Path) -> Artefact:
    if (path / "config.json").is_file():
        return Artefact(path=path, kind="Hugging Face model")
    if is_url(_short(path)):
        return Artefact(path=path, kind="at a URL")
    return Artefact(path=path, kind="folder" if path.exists() else "gone")


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except DurableError:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return found if isinstance(found, dict) else {}


def _short(path: Path) -> str:
    """Return the path relative to the working directory, if it lies there; a URL unchanged."""
    if not path.is_absolute() and path.parts and path.parts[0].endswith(":"):
        return f"{path.parts[0]}//{Path(*path.parts[1:])}"
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
