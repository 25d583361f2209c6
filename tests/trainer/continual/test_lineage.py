"""The tree of runs, stages, conversions and exports, from what the artefacts themselves say."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keepwarm.ft.format import publication
from keepwarm.ft.format.writer import write_part
from keepwarm.trainer.continual import lineage
from keepwarm.trainer.continual.lineage_command import app
from keepwarm.trainer.errors import CheckpointError


def checkpoint(path: Path, meta: dict[str, Any], step: int = 0) -> Path:
    path.mkdir(parents=True)
    write_part(path, 0, [])
    publication.write_manifest(
        path, publication.Identity(run=path.name, epoch=0, step=step, layout="l"), ranks=1, meta=meta
    )
    return path


def run(path: Path, stages: list[str], step: int, parent: dict[str, Any] | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"stages": [{"name": name} for name in stages]}))
    checkpoint(path / f"checkpoints/iter_{step:07d}", {"run": {"parent": parent}}, step)
    (path / "checkpoints/latest").write_text(f"iter_{step:07d}\n")
    return path


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """Qwen imported; two runs from it, the second a branch of the first; their average; an export of that."""
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen/config.json").write_text("{}")
    native = checkpoint(tmp_path / "native", {"parent": {"format": "huggingface", "path": str(tmp_path / "qwen")}})
    one = run(tmp_path / "one", ["english", "german"], 100, {"path": str(native), "step": 0, "optimizer_state": False})
    branch = {"path": str(one / "checkpoints/iter_0000100"), "step": 100, "optimizer_state": True}
    two = run(tmp_path / "two", ["french"], 150, branch)
    parents = [{"path": str(where), "step": step} for where, step in ((one, 100), (two, 150))]
    soup = checkpoint(tmp_path / "soup", {"averaged": parents})
    export = tmp_path / "exports/soup"
    export.mkdir(parents=True)
    (export / "keepwarm.json").write_text(json.dumps({"parent": {"format": "native", "path": str(soup)}}))
    run(tmp_path / "stranger", ["other"], 5)
    return tmp_path


def test_lineage_tree_lists_every_relative_once(grown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(grown)
    expected = [
        "qwen  (Hugging Face model)",
        "└─ converted: native  (checkpoint)",
        "   └─ continued: one  (run english > german, step 100)",
        "      ├─ averaged at step 100: soup  (checkpoint, with two)",
        "      │  └─ exported: exports/soup  (export Hugging Face)",
        "      └─ continued with its optimizer state at step 100: two  (run french, step 150)",
    ]
    for name in ("one", "two", "exports/soup"):
        ran = CliRunner().invoke(app, [name, "--in", "."], catch_exceptions=False)
        assert [line.removesuffix("  <- this one") for line in ran.stdout.splitlines()] == expected
        (marked,) = (line for line in ran.stdout.splitlines() if line.endswith("<- this one"))
        assert f" {name}  (" in marked


def test_lineage_json_names_parents_of_every_artefact(grown: Path) -> None:
    ran = CliRunner().invoke(app, [str(grown / "two/checkpoints/iter_0000150"), "--json"], catch_exceptions=False)
    found = json.loads(ran.stdout)
    assert found["path"] == str(grown / "two")
    by_path = {artefact["path"]: artefact for artefact in found["artefacts"]}
    assert [parent["path"] for parent in by_path[str(grown / "soup")]["parents"]] == [
        str(grown / "one"),
        str(grown / "two"),
    ]
    assert str(grown / "stranger") not in by_path


def test_lineage_missing_parent_is_reported(grown: Path) -> None:
    (grown / "qwen/config.json").unlink()
    (grown / "qwen").rmdir()
    assert lineage.ancestry(grown / "one")[grown / "qwen"].kind == "gone"
    with pytest.raises(CheckpointError, match="neither a run"):
        lineage.ancestry(grown / "exports")


@pytest.mark.parametrize("content", [b"", b"[1", b'{"stages": 3}', b"[" * 100_000, b"\xff"])
def test_lineage_unreadable_run_does_not_hide_the_others(grown: Path, content: bytes) -> None:
    (grown / "stranger" / "run.json").write_bytes(content)
    (grown / "two" / "run.json").write_bytes(content)
    found = CliRunner().invoke(app, [str(grown / "one"), "--in", str(grown), "--json"])
    assert found.exit_code == 0, found.output
    paths = {Path(artefact["path"]).name for artefact in json.loads(found.stdout)["artefacts"]}
    assert {"one", "native", "soup"} <= paths
