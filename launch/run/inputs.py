"""Files that a job reads, and which of them lie in a folder."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keepwarm.launch.run.preflight import data_files
from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.job.run_folder import RUN_FILE
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.url import is_url

_MAX_LINKS = 40
"""Symbolic links followed on one path, as in Linux."""


def refuse_inputs_inside(folder: Path, paths: Mapping[str, str | Path]) -> None:
    """Raise OutputError if one of the `paths`, each by its key, leads through `folder`; symbolic links are followed.

    An input that holds the folder itself is refused as well.
    """
    real = Path(os.path.realpath(folder))
    for key, path in paths.items():
        if any(real in (entry, *entry.parents) for entry in _entries(Path(path))):
            if Path(path).name == RUN_FILE and Path(os.path.realpath(path)).parent == real:
                continue  # it is written again
            raise OutputError(
                f"{key}: {path} lies in output = {folder}, which --force clears first: move it elsewhere, or choose "
                "another folder with output=PATH"
            )
        if Path(os.path.realpath(path)) in real.parents and Path(path).is_dir() and key.startswith("init_from"):
            raise OutputError(f"output = {folder} lies in {key} = {path}, which is only read; choose another")


def inputs(job: JobSpec) -> dict[str, str | Path]:
    """Return the paths that a job reads, by key: its data, and every other text with a slash that names a file here."""
    found: dict[str, str | Path] = {}
    for section, table in (("sources", job.data.sources), ("validation", job.data.validation)):
        for name, path in table.items():
            found |= {f"data.{section}.{name} ({file.name})": file for file in data_files(path)}
    values = job.model_dump(mode="json", exclude={"output", "data"})
    if job.data.tokenizer != "bytes":
        found["data.tokenizer"] = job.data.tokenizer
    for key, text in _texts(values, ""):
        place = text.partition(":")[0]  # a mount is FROM:TO
        if "/" in text and not is_url(text) and Path(place).exists():
            found[key] = place
    return found


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{key}.{index}")


def _entries(path: Path) -> Iterator[Path]:
    """Yield every directory entry that the kernel visits to reach `path`, each in the real path of its folder."""
    at, rest, links = Path("/"), list(reversed((Path.cwd() / path).parts[1:])), 0
    while rest:
        name = rest.pop()
        if name == "..":
            at = at.parent
            continue
        entry = at / name
        yield entry
        if entry.is_symlink() and links < _MAX_LINKS:
            links += 1
            target = entry.readlink()
            at = Path("/") if target.is_absolute() else at
            rest += reversed([part for part in target.parts if part != "/"])
        else:
            at = entry
