"""The table that `make test-gpu` prints on a GPU, run on the CPU so that its code is known to work."""

from pathlib import Path

import pytest
import torch

from tests.gpu import parts
from tests.gpu.run import PARTS, Table, main, run


def test_gpu_table_dry_run_has_rows_of_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.md"
    assert main(["--dry", "--output", str(path)]) == 0, path.read_text()
    text = path.read_text()
    assert all(f"| {part} |" in text for part in PARTS)
    assert "restored to the bit" in text
    assert capsys.readouterr().out == text


def test_gpu_table_lists_the_parts_that_there_are() -> None:
    assert tuple(parts.PARTS) == PARTS


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_gpu_table_without_a_gpu_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "table.md")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "table.md").exists()


def test_gpu_table_part_that_fails_or_hangs_is_a_row(tmp_path: Path) -> None:
    table = Table(tmp_path / "table.md", "title")
    run("unknown", "cpu", table, 60.0)
    assert "KeyError: 'unknown'" in (tmp_path / "table.md").read_text()
    run("snapshots", "cpu", table, 0.0)
    assert "with -9 after at most 0 s" in (tmp_path / "table.md").read_text()
    assert table.failed
