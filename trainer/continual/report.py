"""`keepwarm report`: one self-contained page about a run, readable offline."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from keepwarm.trainer import tool
from keepwarm.trainer.continual.report_data import Drawn, RunReport, gather
from keepwarm.trainer.continual.report_figures import as_svg, figures, write_pngs
from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.monitor import events

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .6rem 0 1.4rem }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left; font-weight: 600 } td.n { text-align: right; font-variant-numeric: tabular-nums }
td.worse { background: #fbe3e0 } td.better { background: #e3f3e4 } svg { max-width: 100%; height: auto }
h1 { margin-bottom: 0 } .quiet { color: #666 }
"""

LISTED = (
    events.Began,
    events.Failure,
    events.Recovery,
    events.Interrupted,
    events.Skipped,
    events.Spike,
    events.SnapshotFailed,
    events.RedundancyLost,
    events.Gate,
    events.LrChanged,
    events.DataChanged,
    events.Hang,
    events.Straggler,
)
"""Events that the page lists."""


@app.command()
def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder; the run may still be in progress.")],
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the page to this file; default: RUN/report.html.")
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Also write the figures as PNG files beside the page.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables as one JSON object.")] = False,
) -> None:
    """Write a one-page report: losses by domain, schedule, forgetting, realized mixture and replay, goodput.

    keepwarm report runs/en_de

    keepwarm report runs/en_de --html german.html --png
    """
    report = gather(run)
    file = run / "report.html" if html is None else html
    made = figures(report)
    try:
        file.write_text(page(report, {name: as_svg(figure) for name, figure in made.items()}), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{file}: {error.strerror}") from error
    written = [file, *(write_pngs(made, file.parent) if png else [])]
    if as_json:
        typer.echo(json.dumps(data(report) | {"files": [str(path) for path in written]}))
    else:
        show_losses(report, Console())
        for path in written:
            typer.echo(str(path))


def show_losses(report: RunReport, console: Console) -> None:
    """Print what every stage learnt and forgot, as on the page."""
    before, *after = report.matrix()
    if not after:
        return
    table = Table(title="loss by domain (nats per token), and its change over each stage: positive is forgetting")
    for column in ("", *report.domains):
        table.add_column(column, justify="right" if column else "left")
    parent = report.parent
    start = "at the start" if parent is None else f"after {parent.get('run')}"
    table.add_row(start, *(_shown(value) for value in before))
    for plan, now, then in zip(report.finished, after, (before, *after), strict=False):
        changes = [_less(one, other) for one, other in zip(now, then, strict=True)]
        cells = [
            _shown(one) + ("" if change is None else f" ({change:+.3f})")
            for one, change in zip(now, changes, strict=True)
        ]
        table.add_row(f"after {plan.name}", *cells)
    console.print(table)


def data(report: RunReport) -> dict[str, Any]:
    """Return the tables as plain values; losses in nats per token, positive forgetting is worse."""
    matrix, stages = report.matrix(), [plan.name for plan in report.finished]
    transfer = report.transfer()
    return {
        "domains": report.domains,
        "stages": stages,
        "losses": matrix,
        "forgetting": {
            name: [_less(now, before) for now, before in zip(after, matrix[row], strict=True)]
            for row, (name, after) in enumerate(zip(stages, matrix[1:], strict=True))
        },
        "forgetting_from_best": report.forgotten(),
        "backward_transfer": None if transfer is None else transfer[0],
        "forward_transfer": None if transfer is None else transfer[1],
        "stability_gaps": {
            plan.name: {
                domain: {"depth": gap.depth, "worst_step": gap.worst_step, "recovery_step": gap.recovery_step}
                for domain, gap in report.gaps(plan).items()
            }
            for plan in report.finished
        },
        "drawn": [
            {"stage": row.stage, "what": row.what, "asked": row.asked, "samples": row.samples, "of": row.of}
            for row in report.drawn()
        ],
    }


def page(report: RunReport, images: Mapping[str, str]) -> str:
    """Return the whole page, without external references."""
    body = [
        f"<h1>{escape(report.job.name)}</h1>",
        _summary(report),
        *_figure("Loss of every domain", images.get("validation")),
        *_losses(report),
        *_gaps(report),
        *_figure("Training loss and learning rate", images.get("training")),
        *_drawn(report.drawn()),
        *_goodput(report.goodput),
        *_events(report.events),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(report.job.name)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _summary(report: RunReport) -> str:
    done = report.steps[-1]["step"] if report.steps else 0
    layout = report.job.layout
    parts = [
        f"{done:,} of {report.plans[-1].end_step:,} steps",
        f"{sum(line['tokens'] for line in report.steps):,} tokens trained on",
        f"data {layout.data} x pipeline {layout.pipeline} x tensor {layout.tensor}",
    ]
    if report.parent is not None:
        ledger = "with its ledger" if report.parent.get("ledger") else "without a ledger"
        parts.append(f"begun from {report.parent.get('run')} at step {report.parent.get('step')}, {ledger}")
    return f'<p class="quiet">{escape("; ".join(parts))}</p>'


def _figure(title: str, image: str | None) -> list[str]:
    return [] if image is None else [f"<h2>{escape(title)}</h2>", image]


def _losses(report: RunReport) -> list[str]:
    matrix = report.matrix()
    if len(matrix) < 2:
        return []
    rows: list[list[str]] = [_row("before the first", [_cell(value) for value in matrix[0]])]
    for index, plan in enumerate(report.finished, start=1):
        cells = []
        for now, before in zip(matrix[index], matrix[index - 1], strict=True):
            change = _less(now, before)
            kind = "" if change is None or abs(change) < 5e-4 else " worse" if change > 0 else " better"
            shown = "" if change is None else f" ({change:+.3f})"
            cells.append(f'<td class="n{kind}">{_shown(now)}{shown}</td>')
        rows.append(_row(f"after {plan.name}", cells))
    forgotten = report.forgotten()
    if forgotten:
        rows.append(_row("last minus best", [_cell(forgotten.get(domain)) for domain in report.domains]))
    lines = ["<h2>Losses by stage, and what each stage forgot</h2>"]
    lines.append(
        "<p>Nats per token; in brackets the change over the stage, positive is forgetting. Last minus best: how far "
        "each domain ended from the lowest loss it ever had.</p>"
    )
    lines += _table(["", *report.domains], rows)
    if (transfer := report.transfer()) is not None:
        lines.append(
            f"<p>Backward transfer {transfer[0]:+.3f}, forward transfer {transfer[1]:+.3f} nats per token; "
            "positive is better.</p>"
        )
    return lines


def _gaps(report: RunReport) -> list[str]:
    rows = []
    for plan in report.finished:
        for domain, gap in report.gaps(plan).items():
            back = "not inside the stage" if gap.recovery_step is None else f"{gap.recovery_step:,}"
            numbers = (f"{gap.depth:.3f}", f"{gap.worst_step:,}", back)
            rows.append(_row(plan.name, [f"<td>{escape(domain)}</td>", *map(_number, numbers)]))
    if not rows:
        return []
    title = "<h2>Stability gap: domains that rise within a stage before they recover</h2>"
    return [title, *_table(["stage", "domain", "worst - final", "at step", "recovered at step"], rows)]


def _drawn(drawn: Sequence[Drawn]) -> list[str]:
    rows = []
    for row in drawn:
        numbers = (f"{row.asked:.3%}", f"{row.samples / row.of:.3%}", f"{row.samples:,}", f"{row.of:,}")
        rows.append(_row(row.stage, [f"<td>{escape(row.what)}</td>", *map(_number, numbers)]))
    if not rows:
        return []
    title = "<h2>What was drawn, against what was asked for</h2>"
    return [title, *_table(["stage", "from", "asked", "drawn", "samples", "of"], rows)]


def _goodput(goodput: Mapping[str, Any]) -> list[str]:
    rows = [
        _row(key, [_number(f"{value:,.3f}" if isinstance(value, float) else f"{value:,}")])
        for key, value in _plain(goodput)
        if isinstance(value, int | float)
    ]
    return ["<h2>Goodput</h2>", *_table(["", "value"], rows)] if rows else []


def _events(log: Sequence[events.Event]) -> list[str]:
    rows = []
    for event in log:
        if isinstance(event, LISTED):
            line = msgspec.to_builtins(event)
            at = datetime.fromtimestamp(line.pop("time"), UTC).strftime("%Y-%m-%d %H:%M:%S")
            name = line.pop("event").replace("_", " ")
            details = "; ".join(f"{key.replace('_', ' ')} {_words(value)}" for key, value in line.items())
            rows.append(_row(at, [f"<td>{escape(name)}</td>", f"<td>{escape(details)}</td>"]))
    return ["<h2>Events</h2>", *_table(["time (UTC)", "event", ""], rows)] if rows else []


def _words(value: Any) -> str:
    """Return the field of an event as text for people."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case dict():
            return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items()) or "none"
        case list() | tuple():
            return ", ".join(map(_words, value)) or "none"
        case _:
            return str(value)


def _plain(value: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, inner in value.items():
        yield from _plain(inner, f"{key} {name}".strip())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return [f"<table><tr>{head}</tr>", *("<tr>" + "".join(row) + "</tr>" for row in rows), "</table>"]


def _row(name: str, cells: Sequence[str]) -> list[str]:
    return [f"<th>{escape(name)}</th>", *cells]


def _cell(value: float | None) -> str:
    return _number(_shown(value))


def _number(text: str) -> str:
    return f'<td class="n">{escape(text)}</td>'


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _less(now: float | None, before: float | None) -> float | None:
    return None if now is None or before is None else now - before


if __name__ == "__main__":
    tool.run(app)
