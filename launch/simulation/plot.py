"""Plot answers to PNG files with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from keepwarm.launch.errors import SimulationError
from keepwarm.launch.simulation.durations import duration
from keepwarm.launch.simulation.report import Asked
from keepwarm.launch.simulation.study import Answer, Question

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WASTED = {
    "stall": "snapshot stall",
    "lost": "lost work",
    "detection": "detection",
    "recovery": "recovery",
    "waiting": "waiting for a spare",
}


def plot(asked: Sequence[Asked], folder: Path) -> list[Path]:
    """Write `waste-<gpus>.png` for each size, and `goodput.png` and `losses.png` over sizes if there are several.

    Returns:
        The files written.

    Raises:
        SimulationError: the folder cannot be written to.
    """
    figures = {f"waste-{question.cluster.gpus}.png": _waste(question, answers) for question, answers in asked}
    if len(asked) > 1:
        figures |= {"goodput.png": _over_sizes(asked, "goodput"), "losses.png": _over_sizes(asked, "losses")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=150)
    except OSError as error:
        raise SimulationError(f"{folder}: {error.strerror}") from error
    return [folder / name for name in figures]


def _waste(question: Question, answers: Sequence[Answer]) -> "Figure":
    """Plot the unproductive time by cause, one bar per scheme."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.2 + 0.5 * len(answers)), layout="constrained")
    axes = figure.subplots()
    names = [answer.scheme.name for answer in answers]
    left = [0.0] * len(answers)
    for key, label in WASTED.items():
        shares = [100 * answer.shares[key] for answer in answers]
        axes.barh(names, shares, left=left, label=label)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("% of the time")
    axes.set_title(f"{question.cluster.gpus:,} GPUs, a failure every {duration(question.mtbf)}: unproductive time")
    axes.legend()
    return figure


def _over_sizes(asked: Sequence[Asked], what: Literal["goodput", "losses"]) -> "Figure":
    """Plot one line per scheme over the number of GPUs; code names differ where small clusters shorten the code."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for column, label in enumerate(_labels(asked)):
        found = [
            (question.cluster.gpus, answer)
            for question, answers in asked
            for answer in answers
            if _label(answer) == label
        ]
        if what == "goodput":
            values, errors = zip(*(answer.goodput for _, answer in found), strict=True)
            sizes, percent, spread = [gpus for gpus, _ in found], [100 * v for v in values], [100 * e for e in errors]
            # Schemes with equal restarts overlap, so later ones are drawn smaller.
            axes.errorbar(sizes, percent, spread, linestyle="", capsize=3, color=f"C{column}")
            axes.plot(sizes, percent, marker="o", label=label, color=f"C{column}", ms=10 - 2 * column, lw=4 - column)
        elif points := [(gpus, answer.losses.expected) for gpus, answer in found if answer.losses.expected > 0]:
            axes.loglog(*zip(*points, strict=True), marker="o", label=label, color=f"C{column}")
    axes.set_xscale("log")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("goodput, %" if what == "goodput" else "expected losses of memory in the run")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure


def _labels(asked: Sequence[Asked]) -> list[str]:
    return list(dict.fromkeys(_label(answer) for _, answers in asked for answer in answers))


def _label(answer: Answer) -> str:
    return answer.scheme.name if answer.scheme.replicas or answer.scheme.groups is None else "coded snapshots"
