"""The report of a run: one page that needs nothing from outside, with figures that follow from the run."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from keepwarm.trainer.continual.report import command, data
from keepwarm.trainer.continual.report_data import gather
from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.job.files import shipped_configs
from keepwarm.trainer.loop.session import run_session

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
STEP = 8 * 64
STAGES = (
    f"stages=[{{name: first, tokens: {4 * STEP}, mixture: {{en: 1}}, lr: {{max: 3e-3}}}},"
    f"{{name: '<second>', tokens: {8 * STEP}, mixture: {{de: 3, en: 1}}, lr: {{max: 3e-3}},"
    " replay: {from: [first], fraction: 0.25}, gate: {domain: en, max_forgetting: 0.0, action: warn}}]"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = ["evaluation.every=2", "evaluation.samples=4", "log.tensorboard=false", f"output={folder}"]
    assert run_session(shipped_configs() / "ci" / "tiny.yaml", [*settings, STAGES], resume=False)
    return folder


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps what a browser would load."""

    VOID = frozenset({"meta", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        keys = ("src", "href", "xlink:href", "action", "data", "poster", "srcset")
        self.loads += [value or "" for name, value in attrs if name in keys]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_report_tables_match_the_run(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval"] for line in lines if "eval" in line}
    tables = data(gather(run))
    assert tables["domains"] == ["en", "de"]
    assert tables["losses"] == [[losses[step]["en"], losses[step]["de"]] for step in (0, 4, 12)]
    assert tables["forgetting"]["<second>"] == [losses[12][name] - losses[4][name] for name in ("en", "de")]
    ever = {name: [losses[step][name] for step in (0, 4, 12)] for name in ("en", "de")}
    assert tables["forgetting_from_best"] == {name: column[-1] - min(column) for name, column in ever.items()}
    assert tables["backward_transfer"] == pytest.approx(losses[4]["en"] - losses[12]["en"])
    assert tables["forward_transfer"] == pytest.approx(losses[0]["de"] - losses[4]["de"])
    for stage, steps in (("first", (0, 2, 4)), ("<second>", (4, 6, 8, 10, 12))):
        worst = {name: max((losses[step][name], -step) for step in steps) for name in ("en", "de")}
        expected = {
            name: (pytest.approx(loss - losses[steps[-1]][name]), -step)
            for name, (loss, step) in worst.items()
            if -step not in (steps[0], steps[-1])
        }
        found = tables["stability_gaps"][stage]
        assert {name: (gap["depth"], gap["worst_step"]) for name, gap in found.items()} == expected
        assert "de" not in found
    drawn = {(row["stage"], row["what"]): row for row in tables["drawn"]}
    assert drawn[("first", "en")]["samples"] == 32
    second = {what: row for (stage, what), row in drawn.items() if stage == "<second>"}
    assert {what: row["samples"] for what, row in second.items()} == {
        "de": 36,
        "en": 12,
        "replay of first (uniform)": 16,
    }
    assert second["replay of first (uniform)"]["asked"] == 0.25
    assert all(abs(row["asked"] * row["of"] - row["samples"]) <= 1 for row in drawn.values())


def test_report_page_is_complete_and_loads_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(run, None, True, False)
    shown = capsys.readouterr().out
    written = [Path(line) for line in shown.splitlines() if line.startswith("/")]
    assert re.search(r"after first +.*\(-\d\.\d{3}\)", shown)
    assert [path.name for path in written] == ["report.html", "report-validation.png", "report-training.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written[1:])
    text = written[0].read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert all(target.startswith("#") for target in page.loads)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "after <second>" in page.cells
    assert "<second>" not in text
    assert "began" in page.cells
    assert "source nothing; step 0; reason a fresh run" in page.cells
    assert not any("{" in cell for cell in page.cells)
    assert text.count("<svg") == 2
    command(run, None, False, False)
    assert written[0].read_text() == text


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
def test_report_in_browser_without_network_renders(run: Path, tmp_path: Path) -> None:
    command(run, tmp_path / "report.html", False, False)
    browser = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--proxy-server=127.0.0.1:9", "--enable-logging=stderr", "--virtual-time-budget=2000"]  # fmt: skip
    page = (tmp_path / "report.html").as_uri()
    shown = subprocess.run([*browser, "--dump-dom", page], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in shown.stderr
    for text in ("after first", "after &lt;second&gt;", "replay of first (uniform)", "Loss of every domain"):
        assert text in shown.stdout
    picture = tmp_path / "page.png"
    subprocess.run([*browser, f"--screenshot={picture}", "--window-size=1000,2400", page], timeout=120, check=True)
    pixels = matplotlib.image.imread(picture)
    # White paper alone would have one colour; the curves alone have two more.
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100


def test_report_folder_without_a_run_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(OutputError, match="not a run folder"):
        gather(tmp_path)
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    with pytest.raises(OutputError, match="nothing was recorded yet"):
        gather(tmp_path)
