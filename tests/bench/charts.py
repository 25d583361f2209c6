"""Draw the pictures of the front page from what the documentation records: charts, a terminal, badges.

    python -m tests.bench.charts [--check | --record]

The charts take their figures from the tables of `docs/nodes.md` and `docs/snapshots.md`, the terminal from
`docs/figures/drill.txt`, the badges from `pyproject.toml`. Writes `docs/figures`; `--check` only compares, `--record`
first runs the drill of the picture in a terminal (about three minutes) and keeps what it printed.
"""

import argparse
import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
RECORDED = FIGURES / "drill.txt"
SANS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
WIDTH, LEFT, RIGHT, BAR, GAP = 760, 210, 640, 24, 10


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours of a theme; every pair that must be told apart has a contrast of at least 3 to 1 with the background."""

    background: str
    text: str
    muted: str
    grid: str
    ours: str
    peers: str


PALETTES = {
    "light": Palette(
        background="#ffffff", text="#1f2328", muted="#59636e", grid="#d1d9e0", ours="#0550ae", peers="#6e7781"
    ),
    "dark": Palette(
        background="#0d1117", text="#f0f6fc", muted="#9198a1", grid="#3d444d", ours="#58a6ff", peers="#7d8590"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar with its name on the left and its value beside its end."""

    name: str
    value: float
    label: str
    ours: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Groups of horizontal bars on one axis from zero."""

    title: str
    unit: str
    tick: float
    groups: tuple[tuple[str, tuple[Bar, ...]], ...]
    source: tuple[str, ...]
    """Lines below the axis: how it was measured, by which command, and where that is recorded."""

    @property
    def end(self) -> float:
        """Return the end of the axis: a tick at or beyond the longest bar."""
        longest = max(bar.value for _, bars in self.groups for bar in bars)
        return self.tick * -(-longest // self.tick)


def table(page: str, first: str) -> list[dict[str, str]]:
    """Return the rows of the one table of a page whose first column is called `first`, by the names of its columns."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith(f"| {first} |")]
    if len(starts) != 1:
        raise ValueError(f"docs/{page} has {len(starts)} tables whose first column is {first!r}, and needs one")
    heads, _, *rows = list(_cells(lines[starts[0] :]))
    return [dict(zip(heads, row, strict=True)) for row in rows]


def _cells(lines: list[str]) -> Iterator[list[str]]:
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip().replace("`", "") for cell in line.strip().strip("|").split("|")]


def recovery() -> Chart:
    """Return the time from a kill to the next step, beside that of stock torchrun with DCP."""
    groups = []
    for row in table("nodes.md", "fault"):
        if not row["torchrun and DCP"]:
            continue
        ours = Bar(name="keepwarm", value=float(row["median"]), label=f"{row['median']} s", ours=True)
        stock = row["torchrun and DCP"]
        label = f"{stock} s, {row['times faster']} times as long"
        groups.append((row["fault"], (ours, Bar(name="torchrun and DCP", value=float(stock), label=label))))
    return Chart(
        title="From a kill to the end of the next step",
        unit="seconds",
        tick=5,
        groups=tuple(groups),
        source=(
            "Medians of 10 and 3 rounds on two CPU cores, four emulated nodes of two ranks; state kept "
            "after every step.",
            "python -m tests.bench.recovery, recorded in docs/nodes.md",
        ),
    )


def snapshot_cost() -> Chart:
    """Return the time that training waits for state to be kept, relative to keepwarm."""
    rows = table("snapshots.md", "kept after every step")
    bars = tuple(
        Bar(name=row["by"], value=float(row["wait, relative"]), label=_waits(row), ours=row["by"] == "keepwarm")
        for row in rows
    )
    kept = rows[0]
    return Chart(
        title="How long training waits when its state is kept after every step",
        unit=f"keepwarm's {kept['training waits']} = 1",
        tick=10,
        groups=(("", bars),),
        source=(
            "Medians on two CPU cores, two nodes of one rank. keepwarm also coded the state on the other node;",
            f"its steps took {kept['step, relative to none']} times as long as those without.",
            "python -m tests.bench.snapshot, recorded in docs/snapshots.md",
        ),
    )


def _waits(row: dict[str, str]) -> str:
    return row["training waits"] or f"{row['wait, relative']} times as long"


TITLE, HEAD, NAME, BOLD = (
    'font-size="19" font-weight="600"',
    'font-size="15" font-weight="600"',
    'font-size="14" text-anchor="end"',
    'font-size="14" font-weight="600"',
)
TICK, NOTE, ON_BADGE = 'font-size="13" text-anchor="middle"', 'font-size="12"', 'font-size="12" text-anchor="middle"'


def draw(chart: Chart, colours: Palette) -> str:
    """Return a chart as SVG."""
    # What stands over a line of the grid is cut out of it.
    halo = f'paint-order="stroke" stroke="{colours.background}" stroke-width="6"'
    bars: list[str] = []
    y = 58
    for heading, group in chart.groups:
        if heading:
            bars.append(_text(24, y + 16, heading, colours.text, f"{HEAD} {halo}"))
            y += 26
        for bar in group:
            bars += _bar(bar, y, chart.end, colours, halo)
            y += BAR + GAP
        y += 8
    body = [_text(24, 34, chart.title, colours.text, TITLE)]
    tick, scale = 0.0, (RIGHT - LEFT) / chart.end
    while tick <= chart.end:
        x = LEFT + tick * scale
        body.append(f'<line x1="{x:.1f}" y1="52" x2="{x:.1f}" y2="{y}" stroke="{colours.grid}"/>')
        body.append(_text(x, y + 18, f"{tick:g}", colours.muted, TICK))
        tick += chart.tick
    body += [_text((LEFT + RIGHT) / 2, y + 36, chart.unit, colours.muted, TICK), *bars]
    y += 62
    for line in chart.source:
        body.append(_text(24, y, line, colours.muted, NOTE))
        y += 17
    words = "; ".join(
        f"{heading + ', ' if heading else ''}{bar.name}: {bar.label}"
        for heading, group in chart.groups
        for bar in group
    )
    return _svg(WIDTH, y, colours, body, f"{chart.title}, in {chart.unit}. {words}")


def _bar(bar: Bar, y: int, end: float, colours: Palette, halo: str) -> list[str]:
    length, fill = (RIGHT - LEFT) * bar.value / end, colours.ours if bar.ours else colours.peers
    # A label that has no room behind its bar stands inside it, at its end.
    if LEFT + length + 8.5 * len(bar.label) > WIDTH - 16:
        label = _text(LEFT + length - 8, y + 17, bar.label, colours.background, f'{BOLD} text-anchor="end"')
    else:
        label = _text(LEFT + length + 8, y + 17, bar.label, colours.text, f"{BOLD} {halo}")
    return [
        _text(LEFT - 12, y + 17, bar.name, colours.text, f'{NAME} font-weight="{600 if bar.ours else 400}"'),
        f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{fill}"/>',
        label,
    ]


def _text(x: float, y: float, text: str, fill: str, look: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" {look} fill="{fill}">{escape(text, quote=False)}</text>'


def _svg(width: int, height: int, colours: Palette, body: list[str], words: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    box = f'<rect width="{width}" height="{height}" rx="8" fill="{colours.background}" stroke="{colours.grid}"/>'
    lines = [f'{head} role="img" font-family="{escape(SANS)}">', f"<title>{escape(words, quote=False)}</title>", box]
    return "\n".join([*lines, *body, "</svg>", ""])


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\r")
CELL, ROW, COLUMNS = 7.4, 18, 122
DRILL = "keepwarm drill ci/drill --kill worker:1@5 --kill node:2@12 --corrupt chunk:1@18"


def record() -> None:
    """Run the drill of the picture in a terminal of COLUMNS columns, and keep its command and what it printed.

    Paths are shortened: they begin in the temporary folder in which the drill runs.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    command = [sys.executable, "-P", "-m", "keepwarm", *DRILL.split()[1:]]
    environment = os.environ | {"TERM": "xterm-256color", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    printed = bytearray()
    with tempfile.TemporaryDirectory() as here:
        with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, cwd=here, env=environment) as run:
            os.close(theirs)
            with contextlib.suppress(OSError):  # EIO: the drill has ended
                while data := os.read(ours, 4096):
                    printed += data
            os.close(ours)
        text = ESCAPES.sub("", printed.decode()).replace(f"{Path(here).resolve()}/", "")
        if run.returncode != 0:
            sys.exit(f"{DRILL}: exit code {run.returncode}\n{text}")
    FIGURES.mkdir(exist_ok=True)
    RECORDED.write_text(f"$ {DRILL}\n{text}", encoding="utf-8")


def drill(colours: Palette) -> str:
    """Return the recorded terminal as SVG: a grid of cells, so that frames close in every font."""
    whole = RECORDED.read_text(encoding="utf-8").rstrip("\n").split("\n")
    lines = [line[at : at + COLUMNS] for line in whole for at in range(0, max(1, len(line)), COLUMNS)]
    width = round(CELL * COLUMNS) + 48
    body = [f'<circle cx="{24 + 18 * dot}" cy="22" r="5" fill="{colours.grid}"/>' for dot in range(3)]
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        start = len(line) - len(line.lstrip())
        text = line.strip()
        ours = text.startswith("$") or "bitwise equal to" in text
        where = f'x="{24 + CELL * start:.1f}" y="{58 + ROW * number}" textLength="{CELL * len(text):.1f}"'
        style = f'lengthAdjust="spacingAndGlyphs" xml:space="preserve" font-weight="{600 if ours else 400}"'
        body.append(
            f'<text {where} {style} fill="{colours.ours if ours else colours.text}">{escape(text, quote=False)}</text>'
        )
    body = [*body[:3], f'<g font-family="{escape(MONO)}" font-size="12.3">', *body[3:], "</g>"]
    return _svg(width, 58 + ROW * len(lines), colours, body, "A terminal: " + " ".join(lines[0].split()))


def badge(name: str, value: str) -> str:
    """Return a badge: a name on grey, a value on blue."""
    left, right = 7 * len(name) + 16, 7 * len(value) + 16
    box = f'viewBox="0 0 {left + right} 20" width="{left + right}" height="20" role="img"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="{escape(SANS)}">',
            f"<title>{escape(name)}: {escape(value)}</title>",
            f'<rect width="{left + right}" height="20" rx="4" fill="#0550ae"/>',
            f'<path d="M4 0H{left}V20H4a4 4 0 0 1-4-4V4a4 4 0 0 1 4-4z" fill="#424a53"/>',
            _text(left / 2, 14, name, "#ffffff", ON_BADGE),
            _text(left + right / 2, 14, value, "#ffffff", ON_BADGE),
            "</svg>",
            "",
        ]
    )


def badges() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = [name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r":: 3\.\d+$", name)]
    return {
        "badge-licence.svg": badge("licence", project["license"]),
        "badge-python.svg": badge("Python", ", ".join(versions)),
    }


def figures() -> dict[str, str]:
    """Return the content of every file of `docs/figures` that is drawn, by its name."""
    found = badges()
    for theme, colours in PALETTES.items():
        found[f"recovery-{theme}.svg"] = draw(recovery(), colours)
        found[f"snapshot-cost-{theme}.svg"] = draw(snapshot_cost(), colours)
        found[f"drill-{theme}.svg"] = drill(colours)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is not up to date")
    parser.add_argument("--record", action="store_true", help="run the drill of the picture again")
    options = parser.parse_args()
    if options.record:
        record()
    FIGURES.mkdir(exist_ok=True)
    paths = {FIGURES / name: content for name, content in figures().items()}
    old = [path for path, content in paths.items() if not path.exists() or path.read_text("utf-8") != content]
    for path in old:
        print(path.relative_to(ROOT))
        if not options.check:
            path.write_text(paths[path], encoding="utf-8")
    sys.exit(1 if options.check and old else 0)


if __name__ == "__main__":
    main()
