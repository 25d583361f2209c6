"""How far a run is, by its own metrics."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.run_folder import STARTED_FILE
from trainer.spec_file import RUN_FILE, load_run
from trainer.stages import plan_stages

RECENT_STEPS = 20
"""Steps whose times are averaged."""
_TAIL_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Completed steps and speed of a run."""

    step: int
    last_step: int
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None
    """Seconds to the last step at the present speed."""


def progress(folder: Path) -> Progress:
    """Read the progress of a run from the end of its metrics. Raises SpecError if there is no run in the folder."""
    job = load_run(folder / RUN_FILE)
    steps = [record for record in _last_records(folder / STARTED_FILE) if "loss" in record][-RECENT_STEPS:]
    last_step = plan_stages(job)[-1].end_step
    if not steps:
        return Progress(step=0, last_step=last_step, loss=None, tokens_per_s=None, eta_s=None)
    seconds = statistics.median(record["step_time_s"] for record in steps)
    newest = steps[-1]
    return Progress(
        step=newest["step"],
        last_step=last_step,
        loss=newest["loss"],
        tokens_per_s=newest["tokens"] / seconds,
        eta_s=(last_step - newest["step"]) * seconds,
    )


def _last_records(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines at the end of a metrics file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - _TAIL_BYTES)
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    for line in lines[1 if start else 0 :]:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
