"""Lines that are written to the side: whole or absent, dropped and counted when the disk is full, never an error."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from keepwarm import side_writer
from keepwarm.side_writer import SideWriter


@pytest.fixture(autouse=True)
def _nothing_lost() -> None:
    side_writer.forget()


def test_lines_of_a_killed_writer_are_ended_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"whole\ntorn")
    writer = SideWriter(path)
    assert writer.write(b"next")
    assert writer.write(b"last")
    writer.close()
    assert path.read_bytes() == b"whole\ntorn\nnext\nlast\n"


def test_writer_tries_again_once_the_folder_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = SideWriter(tmp_path / "folder" / "log")
    assert not writer.write(b"one")
    assert not writer.write(b"two")
    (tmp_path / "folder").mkdir()
    assert writer.write(b"three")
    writer.close()
    assert (tmp_path / "folder" / "log").read_bytes() == b"three\n"
    assert side_writer.losses()["log"].dropped == 2
    assert len([record for record in caplog.records if "log: FileNotFoundError" in record.getMessage()]) == 1


def test_failure_of_another_kind_is_reported_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = SideWriter(tmp_path / "folder" / "log")
    writer.write(b"one")
    (tmp_path / "folder").write_text("a file")
    writer.write(b"two")
    assert [record.getMessage().split(":")[1].strip() for record in caplog.records] == [
        "FileNotFoundError",
        "NotADirectoryError",
    ]


def test_log_that_is_full_becomes_the_older_one(tmp_path: Path) -> None:
    writer = SideWriter(tmp_path / "log", limit=100)
    for number in range(50):
        assert writer.write(f"line {number}".encode())
    writer.close()
    lines = [(tmp_path / name).read_text().splitlines() for name in ("log.1", "log")]
    assert [*lines[0], *lines[1]] == [f"line {number}" for number in range(50)][-len([*lines[0], *lines[1]]) :]
    assert all((tmp_path / name).stat().st_size < 120 for name in ("log.1", "log"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]


def test_fresh_file_forgets_what_it_held(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"of an earlier run\n")
    writer = SideWriter(tmp_path / "log", fresh=True)
    for line in (b"one", b"two"):
        writer.write(line)
    writer.close()
    writer.write(b"three")
    writer.close()
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree\n"


PROGRAM = """
    import logging, sys, warnings
    from keepwarm import side_writer
    side_writer.protect_streams()
    for number in range(3):
        print("to stdout", number)
        print("to stderr", number, file=sys.stderr)
        logging.warning("logged %d", number)
        warnings.warn(f"warned {number}", stacklevel=1)
    print("x" * 200_000)
    sys.stdout.write("no newline at the end")
    open(sys.argv[1], "w").write(f"{sorted(side_writer.losses())} {sys.stdout.isatty()}")
"""


@pytest.mark.parametrize(
    ("redirection", "lost"),
    [
        (">/dev/full", "['stdout']"),
        ("2>/dev/full", "['stderr']"),
        (">/dev/full 2>&1", "['stderr', 'stdout']"),
        (">&-", "[]"),
        (">&- 2>&- <&-", "[]"),
        ("| true", None),
        ("2>&1 | head -1", None),
    ],
)
def test_program_with_protected_streams_ends_with_0(tmp_path: Path, redirection: str, lost: str | None) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    command = f"set -o pipefail; {sys.executable} program.py result {redirection}"
    ran = subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=60, stdout=subprocess.PIPE, check=False)
    assert ran.returncode == 0
    result = (tmp_path / "result").read_text()
    assert result == f"{lost} False" if lost is not None else result.endswith("False")
    assert {path.name for path in tmp_path.iterdir()} == {"program.py", "result"}


def test_program_closed_stdout_is_not_the_next_file_that_is_opened(tmp_path: Path) -> None:
    program = """
        import os, sys
        from keepwarm.side_writer import protect_streams
        protect_streams()
        file = os.open("state", os.O_WRONLY | os.O_CREAT)
        os.write(1, b"what a library prints")
        os.write(file, b"state")
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    subprocess.run(["bash", "-c", f"{sys.executable} program.py <&- >&- 2>&-"], cwd=tmp_path, timeout=60, check=True)
    assert (tmp_path / "state").read_bytes() == b"state"


def test_program_whose_reader_stands_still_goes_on(tmp_path: Path) -> None:
    program = """
        import os, sys
        from keepwarm import side_writer
        side_writer.PATIENCE_S = 0.05
        side_writer.protect_streams()
        print("x" * 1_000_000)
        print("y" * 1_000_000)
        open("done", "w").write(str(side_writer.losses()["stdout"].dropped))
        sys.stdin.read()
        print("z" * 1000)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    with subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stderr is None
        assert process.stdin is not None
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        while not (tmp_path / "done").exists():
            assert process.poll() is None
        # Read what fitted into the pipe before there is more.
        while len(first) < 40_000:
            first += os.read(process.stdout.fileno(), 1 << 20)
        process.stdin.close()
        rest = process.stdout.read()
        assert process.wait(60) == 0
    assert rest.endswith(b"z" * 1000 + b"\n")
    assert b"y" not in first + rest
    assert int((tmp_path / "done").read_text()) > 1


def test_streams_that_python_code_redirected_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    side_writer.protect_streams()
    assert (sys.stdout, sys.stderr) == before
    print("seen")
    assert capsys.readouterr().out == "seen\n"


@pytest.mark.parametrize("command", [("plan", "ci/tiny"), ("plan", "ci/tiny", "--json"), ("--help",)])
def test_result_on_a_full_disk_is_an_error_of_one_sentence(command: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        ran = subprocess.run([sys.executable, "-P", "-m", "keepwarm", *command], stdout=full, stderr=subprocess.PIPE)
    assert ran.returncode == 1
    assert ran.stderr.decode() == "error: stdout: No space left on device: the output is incomplete\n"


def test_result_on_a_closed_stdout_is_dropped() -> None:
    shell = f"exec {sys.executable} -P -m keepwarm plan ci/tiny >&-"
    ran = subprocess.run(["bash", "-c", shell], stderr=subprocess.PIPE)
    assert (ran.returncode, ran.stderr) == (0, b"")
