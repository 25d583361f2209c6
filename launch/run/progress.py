"""Progress of a run, read from its metrics."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.monitor.resolved_stages import resolved_stages

RECENT_STEPS = 20
"""Number of recent steps whose median time gives the speed."""
_OF_A_STEP = ("step", "loss", "step_time_s", "tokens")
"""Numbers that a record of a step has; one of another version may lack some."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Completed steps and speed of a run."""

    step: int
    last_step: int
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None
    """Seconds to the last step at the current speed."""


def progress(folder: Path) -> Progress:
    """Read the progress of a run from the end of its metrics. Raises SpecError if there is no run in the folder."""
    job = load_run(RunFolder(folder).run_file)
    records = RunFolder(folder).recent_metrics()
    steps = [record for record in records if all(_is_number(record.get(key)) for key in _OF_A_STEP)][-RECENT_STEPS:]
    last_step = resolved_stages(folder, job)[-1].end_step
    if not steps:
        return Progress(step=0, last_step=last_step, loss=None, tokens_per_s=None, eta_s=None)
    seconds = max(1e-9, statistics.median(record["step_time_s"] for record in steps))
    newest = steps[-1]
    return Progress(
        step=newest["step"],
        last_step=last_step,
        loss=newest["loss"],
        tokens_per_s=newest["tokens"] / seconds,
        eta_s=(last_step - newest["step"]) * seconds,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
