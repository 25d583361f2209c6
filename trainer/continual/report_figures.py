"""Figures of a report, drawn with matplotlib."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from keepwarm.trainer.continual.report_data import RunReport
from keepwarm.trainer.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 2000
"""Maximum points per curve; longer curves are thinned."""


def figures(report: RunReport) -> "dict[str, Figure]":
    """Return the figures by name: `validation`, `training`."""
    from matplotlib.figure import Figure

    made = {}
    if report.domains:
        made["validation"] = figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        for domain in report.domains:
            points = [(step, losses[domain]) for step, losses in sorted(report.evaluations.items()) if domain in losses]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=domain)
        axes.set_ylabel("validation loss, nats per token")
        axes.legend()
        _stages(axes, report)
    made["training"] = figure = Figure(figsize=(9, 5), layout="constrained")
    loss, rate = figure.subplots(2, sharex=True)
    shown = report.steps[:: max(1, len(report.steps) // POINTS)]
    loss.plot([line["step"] for line in shown], [_number(line["loss"]) for line in shown], linewidth=0.8)
    loss.set_ylabel("training loss")
    rate.plot([line["step"] for line in shown], [line["lr"] for line in shown], color="C1")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    _stages(loss, report, named=True)
    _stages(rate, report, named=False)
    loss.set_xlabel("")
    return made


def as_svg(figure: "Figure") -> str:
    """Return the figure as an SVG element for a page; the same figure gives the same text."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "keepwarm", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def write_pngs(made: "Mapping[str, Figure]", folder: Path) -> list[Path]:
    """Write `report-<name>.png` into a folder; raises OutputError."""
    files = [folder / f"report-{name}.png" for name in made]
    try:
        for file, figure in zip(files, made.values(), strict=True):
            figure.savefig(file, dpi=150)
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: {error.strerror}") from error
    return files


def _stages(axes: "Axes", report: RunReport, *, named: bool = True) -> None:
    for plan in report.plans:
        axes.axvline(plan.start_step, color="0.6", linewidth=0.8, linestyle=":")
        if named:
            axes.text(plan.start_step, 1.01, plan.name, transform=axes.get_xaxis_transform(), va="bottom")
    axes.set_xlabel("step")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
