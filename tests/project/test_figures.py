"""The pictures of the front page: drawn from what the documentation records, complete, and shown where they exist."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench import charts

ROOT = Path(__file__).parents[2]
DRAWN = charts.figures()
SHOWING = [ROOT / "README.md", ROOT / "docs/index.md"]


@pytest.mark.parametrize("name", DRAWN)
def test_figure_is_what_its_source_draws(name: str) -> None:
    assert (charts.FIGURES / name).read_text(encoding="utf-8") == DRAWN[name], "run `python -m tests.bench.charts`"


@pytest.mark.parametrize("name", DRAWN)
def test_figure_is_xml_with_a_description_and_loads_nothing(name: str) -> None:
    root = ElementTree.fromstring(DRAWN[name])
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert title.text
    assert re.findall(r"https?://[^\"]+|href|url\(|<script", DRAWN[name]) == ["http://www.w3.org/2000/svg"]


def test_recovery_chart_has_the_figures_of_its_table() -> None:
    page = (ROOT / "docs/nodes.md").read_text(encoding="utf-8")
    for heading, bars in charts.recovery().groups:
        (row,) = re.findall(rf"^\| {heading} \|.*$", page, re.MULTILINE)
        assert all(f"| {bar.value:g} |" in row for bar in bars)
        assert bars[1].label.split(", ")[1].split()[0] in row


def test_snapshot_chart_has_the_figures_of_its_table() -> None:
    ((_, bars),) = charts.snapshot_cost().groups
    assert [bar.value for bar in bars] == [float(row["wait, relative"]) for row in charts.table(*SNAPSHOTS)]
    assert [bar.ours for bar in bars] == [True, False, False]


SNAPSHOTS = ("snapshots.md", "kept after every step")


def test_table_that_a_page_does_not_have_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 tables whose first column is 'nothing'"):
        charts.table("nodes.md", "nothing")


@pytest.mark.parametrize("page", SHOWING, ids=lambda page: page.name)
def test_pictures_of_a_page_exist_in_both_themes(page: Path) -> None:
    shown = re.findall(r'(?:src|srcset)="([^"]+)"', page.read_text(encoding="utf-8"))
    assert {"drill-dark.svg", "recovery-dark.svg", "snapshot-cost-dark.svg"} <= {Path(path).name for path in shown}
    for path in shown:
        assert (page.parent / path).is_file(), path
        assert (page.parent / path.replace("-dark", "-light")).is_file(), path


@pytest.mark.parametrize("page", SHOWING, ids=lambda page: page.name)
def test_words_for_a_picture_have_its_figures(page: Path) -> None:
    words = re.findall(r'alt="([^"]*\d[^"]*)" src="[^"]*?([\w-]+\.svg)"', page.read_text(encoding="utf-8"))
    assert {name for _, name in words} == {"recovery-light.svg", "snapshot-cost-light.svg"}
    for alt, name in words:
        assert set(re.findall(r"\d+(?:\.\d+)?", alt)) <= set(re.findall(r"\d+(?:\.\d+)?", DRAWN[name])), alt
