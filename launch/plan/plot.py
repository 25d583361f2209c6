"""Plot a plan to a PNG file: the learning rate and data mixture of the whole job."""

from collections.abc import Sequence
from pathlib import Path

from keepwarm.launch.plan.plan import CURVE_POINTS, Plan, sampled_steps
from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.job.stages import StagePlan


def draw_plan(plan: Plan, file: Path) -> None:
    """Write the image.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    rate, mixture = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for stage in plan.stages:
        steps = sorted({*sampled_steps(stage.steps, 4 * CURVE_POINTS), *stage.curve.corners})
        rate.plot([stage.start_step + step for step in steps], [stage.curve.at(step) for step in steps], color="C0")
        rate.text(stage.start_step, 1.01, stage.name, transform=rate.get_xaxis_transform(), ha="left", va="bottom")
        for axes in (rate, mixture):
            axes.axvline(stage.start_step, color="0.6", linewidth=0.8, linestyle=":")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    edges, shares = mixture_staircase(plan)
    mixture.stackplot(edges, list(shares.values()), labels=list(shares), step="post")
    mixture.set_ylabel("share of samples")
    mixture.set_xlabel("step")
    mixture.set_ylim(0, 1)
    mixture.set_xlim(0, plan.stages[-1].end_step)
    if len(shares) <= 12:
        mixture.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    try:
        figure.savefig(file, dpi=150, format="png")
    except OSError as error:
        raise OutputError(f"{file}: {error.strerror}") from error


def mixture_staircase(plan: Plan) -> tuple[list[float], dict[str, list[float]]]:
    """Return the steps at which the mixture changes, plus the last step, and the shares from each step on.

    Shares are by source, with replay as one more.
    """
    names = [*plan.job.data.sources, "replay"]
    edges: list[float] = []
    rows: list[Sequence[float]] = []
    for stage in plan.stages:
        replayed = sum(clause.fraction for clause in plan.job.stages[stage.index].replays)
        for first, weights in stage.mixtures:
            total = sum(weights.values())
            edges.append(_step(stage, first))
            fresh = [(1 - replayed) * weights.get(name, 0.0) / total for name in names[:-1]]
            rows.append([*fresh, replayed])
    edges.append(float(plan.stages[-1].end_step))
    rows.append(rows[-1])
    columns = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    return edges, {name: column for name, column in columns.items() if any(column)}


def _step(stage: StagePlan, sample: int) -> float:
    """Return the step of a sample of a stage, assuming a constant batch size."""
    return stage.start_step + stage.steps * sample / stage.samples
