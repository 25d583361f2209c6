"""The table that `make test-gpu` prints on a GPU, run on the CPU so that its code is known to work."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.gpu import parts, wheels
from tests.gpu.run import PARTS, Table, install, main, run

QUICK = ("snapshots", "training", "1B", "sanitizer")
SLOW = ("worker killed", "8B", "compiled", "two ranks", "node killed")


def dry(path: Path, names: tuple[str, ...]) -> str:
    """Return the table of these parts, which must pass."""
    chosen = [word for name in names for word in ("--part", name)]
    code = main(["--dry", "--output", str(path), "--seconds", "2000", *chosen])
    text = path.read_text()
    assert code == 0, text
    assert all(f"| {part} |" in text for part in names)
    return text


def test_gpu_table_dry_run_has_rows_of_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = dry(tmp_path / "table.md", QUICK)
    assert "restored to the bit" in text
    assert "tiny, 4 layers: snapshots of" in text
    assert capsys.readouterr().out == text


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", SLOW)
def test_gpu_table_dry_run_of_a_long_part_passes(part: str, tmp_path: Path) -> None:
    text = dry(tmp_path / "table.md", (part,))
    if "killed" in part:
        assert "losses and state are equal to the bit | True" in text


def test_gpu_table_lists_the_parts_that_there_are() -> None:
    assert {*QUICK, *SLOW} == {*PARTS}
    assert tuple(parts.PARTS) == (*PARTS, "copies")


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


def test_gpu_table_names_what_was_not_run_in_time(tmp_path: Path) -> None:
    assert main(["--dry", "--output", str(tmp_path / "table.md"), "--seconds", "0"]) == 0
    assert (tmp_path / "table.md").read_text().count("| not run | 0 s are over |") == len(PARTS)


@pytest.mark.parametrize(("code", "passed"), [(0, "yes"), (99, "**no**"), (1, "")])
def test_gpu_table_sanitizer_that_finds_an_error_fails(
    code: int, passed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool itself is not here: this one runs nothing."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho ========= ERROR SUMMARY: some errors\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    main(["--dry", "--output", str(tmp_path / "table.md"), "--part", "sanitizer"])
    expected = f"exit code {code}: ========= ERROR SUMMARY: some errors | {passed} |"
    assert expected in (tmp_path / "table.md").read_text()


def test_wheels_of_a_folder_are_unpacked_without_network(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "HERE = True\n")
        wheel.writestr("carried-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1\n")
        wheel.writestr("carried-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.dist-info/RECORD", "")
    install(tmp_path, tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "carried.py").is_file()


def test_wheels_that_cannot_be_installed_are_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken-1-py3-none-any.whl").write_text("no wheel")
    assert main(["--dry", "--output", str(tmp_path / "table.md"), "--wheels", str(tmp_path)]) == 2
    assert "pip ended with 1" in capsys.readouterr().err


def test_wheels_carry_all_that_the_parts_import_beside_torch() -> None:
    """What torch brings, or what is only imported for pictures and TensorBoard, stays away."""
    names = {one.split(">")[0] for one in wheels.needed()}
    assert {"msgspec", "xxhash", "pyeclib", "ruamel.yaml"} <= names
    blocked = "import sys; sys.modules.update(dict.fromkeys(('tensorboard', 'matplotlib')))"
    code = f"{blocked}; import tests.gpu.parts, keepwarm.launch.cli.main, keepwarm.launch.drill.command"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
