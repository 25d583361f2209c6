"""The folder of a sweep: its table of values, and its runs."""

import json
from pathlib import Path
from typing import Any

from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.job.run_folder import RunFolder

TABLE = "sweep.json"
"""File in the sweep's folder that maps each run folder's name to the run's values."""


def values_of(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return the values of each run of a sweep by the run folder's name; None if the folder is not that of a sweep.

    Raises OutputError if the table cannot be read.
    """
    file = folder / TABLE
    if not file.is_file() or RunFolder(folder).exists:
        return None
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(each, dict) for each in table.values()):
        raise OutputError(f"{file}: cannot be read: expected an object for each run")
    return table


def runs_of(folder: Path) -> list[Path]:
    """Return the run folders of a sweep that exist, or the folder itself if it is not that of a sweep."""
    table = values_of(folder)
    return [folder] if table is None else [folder / name for name in table if RunFolder(folder / name).exists]
