"""`keepwarm refine`: derive a schedule for the next similar run from the gradient norms recorded by this one.

Defazio et al. (2023), "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement": with norms G_t and
weights w_t = 1 / G_t for AdamW (1 / G_t**2 for SGD), the rate of step t is proportional to w_t * sum_{p>t} w_p.
Constant norms give 1 - t/T; norms that fall and then rise give a warm-up and a fast anneal. Their norms for Adam are
1-norms; those recorded here are 2-norms. Torch-free.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from keepwarm.trainer import tool
from keepwarm.trainer.continual.report_data import gather
from keepwarm.trainer.errors import SpecError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Floats = npt.NDArray[np.float64]

SMOOTHING = 0.1
"""Width of the median filter, as a fraction of the steps."""
BINS = 2000
"""Longer runs are split into this many spans, each reduced to its median."""


def refined(norms: Sequence[float] | Floats, *, power: int = 1) -> Floats:
    """Return the rates of steps 1 to T for their gradient norms, scaled so that equal norms give 1 - t/T exactly.

    Raises:
        SpecError: there are no norms, or one is not positive and finite.
    """
    values = np.asarray(norms, np.float64)
    if not values.size or not (np.isfinite(values) & (values > 0)).all():
        raise SpecError("refining a schedule needs the gradient norms of a run, all positive and finite")
    weights = values.min() / values
    weights = weights**power
    tails = np.concatenate([np.cumsum(weights[::-1])[::-1][1:], [0.0]])
    rates: Floats = weights / weights.mean() * tails / weights.sum()
    return rates


def smoothed(norms: Sequence[float] | Floats) -> Floats:
    """Return at most BINS medians of spans, then a running median of width SMOOTHING; both ends are reflected."""
    values = np.asarray(norms, np.float64)
    span = math.ceil(len(values) / BINS)
    values = np.array([np.median(values[start : start + span]) for start in range(0, len(values), span)])
    half = max(1, int(SMOOTHING * len(values))) // 2
    padded = np.pad(values, half, mode="reflect") if half < len(values) else values
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1 if half < len(values) else 1)
    running: Floats = np.median(windows, axis=1)
    return running


def clause(norms: Sequence[float], peak: float, *, power: int = 1, points: int = 33) -> dict[str, Any]:
    """Return an `lr` section of schedule piecewise with that peak."""
    rates = refined(smoothed(norms), power=power)
    heights = np.interp(np.linspace(0, 1, points), np.linspace(0, 1, len(rates) + 1), [*rates, 0.0])
    heights = heights / heights.max()
    pairs = [[round(place / (points - 1), 6), round(float(height), 6)] for place, height in enumerate(heights)]
    return {"schedule": "piecewise", "max": peak, "points": pairs}


@app.command()
def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder with metrics.jsonl.")],
    stage: Annotated[str | None, typer.Option(help="Stage whose gradient norms to use; default: the first.")] = None,
    points: Annotated[int, typer.Option(min=2, help="Number of points of the curve.")] = 33,
) -> None:
    """Print a learning-rate clause refined from the gradient norms of a run, for the next run like it.

    keepwarm refine runs/base

    keepwarm train job.yaml stages.0.lr="$(keepwarm refine runs/base)"
    """
    report = gather(run)
    plan = next((plan for plan in report.plans if plan.name == (stage or report.plans[0].name)), None)
    if plan is None:
        raise SpecError(f"--stage {stage}: {run} has {', '.join(plan.name for plan in report.plans)}")
    norms = [line["grad_norm"] for line in report.steps if line["stage"] == plan.name and line["grad_norm"]]
    power = 1 if report.job.optimizer.name != "sgd" else 2
    typer.echo(json.dumps(clause(norms, report.job.stages[plan.index].lr.max, power=power, points=points)))


if __name__ == "__main__":
    tool.run(app)
