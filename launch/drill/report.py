"""Present the result of a drill as a table on the terminal and as a self-contained HTML page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table

from keepwarm.launch.drill.campaign import Result
from keepwarm.launch.drill.outcome import Outcome
from keepwarm.trainer.monitor.events import PHASES
from keepwarm.trainer.monitor.goodput import KINDS

WIDTH = 160
"""Table width when the output is a file or a pipe."""
COLOURS = ("#b5534c", "#d9904a", "#d8bd55", "#7fa860", "#4f9a94", "#5479a8", "#8a6aa3")


def print_result(result: Result, name: str) -> None:
    """Print the table of faults, differences, leftover processes and the time by phase."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=max(console.width, WIDTH))
    phases = phases_of(result.outcomes)
    table = Table(title=f"fire drill of {name}, in seconds")
    for column in ("fault", "level"):
        table.add_column(column, no_wrap=True)
    for column in ("steps lost", *phases, "total", "bitwise equal"):
        table.add_column(column, justify="right")
    for outcome in result.outcomes:
        table.add_row(*_cells(outcome, phases), _yes(result.bitwise_equal))
    console.print(table)
    for line in verdict(result):
        console.print(line, soft_wrap=True)


def verdict(result: Result) -> list[str]:
    """Return the differences or their absence, the leftover processes and the goodput, as lines."""
    equal = "losses and final state are bitwise equal to the uninterrupted run"
    lines = [equal] if result.bitwise_equal else ["NOT equal to the uninterrupted run:", *result.differences]
    lines += [f"left behind and killed: {command}" for command in result.residue]
    return [*lines, result.goodput.text()]


def phases_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the phases that occur, in chronological order."""
    return [phase for phase in PHASES if any(phase in outcome.seconds for outcome in outcomes)]


def _cells(outcome: Outcome, phases: Sequence[str]) -> list[str]:
    seconds = [f"{outcome.seconds[phase]:.2f}" if phase in outcome.seconds else "-" for phase in phases]
    return [str(outcome.fault), _level(outcome), str(outcome.steps_lost), *seconds, f"{outcome.total:.2f}"]


def _level(outcome: Outcome) -> str:
    return outcome.level or "no restart"


def _yes(equal: bool) -> str:
    return "yes" if equal else "NO"


def write_html(result: Result, name: str, path: Path) -> None:
    """Write a single page without scripts or external resources."""
    phases = phases_of(result.outcomes)
    colours = dict(zip(PHASES, COLOURS, strict=True))
    heads = ["fault", "level", "steps lost", *phases, "total", "bitwise equal"]
    slowest = max((sum(outcome.seconds.values()) for outcome in result.outcomes), default=0.0)
    rows = "".join(
        f"<tr>{_tags('td', [*_cells(outcome, phases), _yes(result.bitwise_equal)])}</tr>"
        f'<tr class="bar"><td colspan="{len(heads)}">{_bar(outcome, slowest, colours)}</td></tr>'
        for outcome in result.outcomes
    )
    legend = "".join(f'<span><i style="background:{colours[phase]}"></i>{escape(phase)}</span>' for phase in phases)
    account = result.goodput
    kinds = "".join(f"<tr>{_tags('td', [kind, f'{account.seconds[kind]:.1f}'])}</tr>" for kind in KINDS)
    page = _PAGE.format(
        name=escape(name),
        outcome="equal" if result.bitwise_equal and not result.residue else "different",
        verdict="<br>".join(map(escape, verdict(result))),
        heads=_tags("th", heads),
        rows=rows,
        legend=legend,
        kinds=kinds,
        share=f"{account.share:.1%}",
        wall=f"{account.wall:.1f}",
    )
    path.write_text(page, encoding="utf-8")


def _tags(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def _bar(outcome: Outcome, slowest: float, colours: dict[str, str]) -> str:
    """Return the phases as one bar, scaled so that the slowest recovery fills the page's width."""
    parts = [
        f'<b style="width:{100 * seconds / slowest:.2f}%;background:{colours[phase]}" '
        f'title="{escape(phase)} {seconds:.2f} s"></b>'
        for phase, seconds in outcome.seconds.items()
        if seconds > 0 and phase in colours
    ]
    return f'<div class="phases">{"".join(parts)}</div>' if parts else ""


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fire drill of {name}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: right; padding: .3rem .6rem; border-top: 1px solid #ddd; font-variant-numeric: tabular-nums }}
th {{ border: 0; color: #666; font-weight: normal }}
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left; white-space: nowrap }}
.bar td {{ border: 0; padding-top: 0 }} .phases {{ display: flex; height: 6px }} .phases b {{ min-width: 1px }}
.legend span {{ margin-right: 1rem }}
.legend i {{ display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem }}
.equal {{ border-left: 4px solid #7fa860 }} .different {{ border-left: 4px solid #b5534c }}
.equal, .different {{ padding: .5rem 1rem; background: #f6f6f4 }} .goodput {{ width: 20rem }}
</style></head><body>
<h1>Fire drill of {name}, in seconds</h1>
<p class="{outcome}">{verdict}</p>
<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>
<p class="legend">{legend}</p>
<h2>Goodput {share} of {wall} s</h2>
<table class="goodput"><tbody>{kinds}</tbody></table>
</body></html>
"""
