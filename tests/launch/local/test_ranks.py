"""Ranks as processes: all of them end when one fails, on a signal, and when the launcher dies.

The ranks here are small scripts in place of `python -m keepwarm.trainer`.
"""

import atexit
import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path

import pytest

from keepwarm.launch.errors import LaunchError, RanksFailed
from keepwarm.launch.local.ranks import RankOptions, run_ranks
from tests.support.runs.stand_ins import alive

DEADLINE = 60.0


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose text every rank runs, with `rank` and `folder` at hand."""
    folder = tmp_path / "ranks"
    folder.mkdir()
    main = "import os, pathlib, signal, sys, time\nrank = int(os.environ['RANK'])\nfolder = pathlib.Path(sys.argv[1])\n"
    main += "exec((folder / 'program.py').read_text())\n"
    (folder / "stand_in.py").write_text(main)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return tmp_path / "program.py"


def run(program: Path, text: str, world_size: int = 2) -> None:
    program.write_text(textwrap.dedent(text))
    logs = program.parent / "logs"
    options = RankOptions(world_size=world_size, threads_per_rank=3, logs=logs, module="stand_in", preloaded=())
    run_ranks([str(program.parent)], options)


def await_that(condition: object, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE:g} s for {what}"
        time.sleep(0.02)


def test_run_ranks_sets_environment_of_each_rank(program: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE OMP_NUM_THREADS"
    run(program, f"(folder / f'seen{{rank}}').write_text(' '.join(os.environ[name] for name in '{names}'.split()))", 3)
    assert [(program.parent / f"seen{rank}").read_text() for rank in range(3)] == [
        "0 0 3 3 3",
        "1 1 3 3 3",
        "2 2 3 3 3",
    ]


def test_run_ranks_store_is_shared_and_removed_afterwards(program: Path) -> None:
    run(program, "(folder / f'seen{rank}').write_text(os.environ['KEEPWARM_STORE'])")
    first, second = ((program.parent / f"seen{rank}").read_text() for rank in range(2))
    assert first == second
    assert not Path(first).exists() or "keepwarm-store" not in str(Path(first).readlink())


def test_killed_launcher_leaves_no_file_and_no_rank(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = program.parent / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = launcher(program, WAITING.format(handler=POLITE))
    process.kill()
    process.communicate(timeout=DEADLINE)
    await_that(lambda: not any(map(alive, pids(program))), "the ranks to end")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("code", "kept"), [(2, 2), (3, 3), (4, 4), (6, 6), (130, 130), (1, 4), (77, 4)])
def test_run_ranks_failed_rank_gives_exit_code_and_end_of_log(program: Path, code: int, kept: int) -> None:
    with pytest.raises(RanksFailed) as caught:
        run(program, f"if rank == 1: print('last words'); sys.exit({code})")
    assert caught.value.exit_code == kept
    if code != 130:
        assert "rank 1 of 2" in str(caught.value)
        assert "last words" in str(caught.value)


def test_run_ranks_crash_names_signal(program: Path) -> None:
    with pytest.raises(RanksFailed, match="rank 1 of 2 was ended by SIGSEGV") as caught:
        # pytest's fault handler would write the stacks into its output.
        run(program, "import faulthandler; faulthandler.disable()\nif rank == 1: os.kill(os.getpid(), signal.SIGSEGV)")
    assert caught.value.exit_code == 4


def test_run_ranks_after_failure_ends_other_ranks(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepwarm.launch.local.ranks.FAILURE_GRACE_S", 0.2)
    monkeypatch.setattr("keepwarm.launch.local.ranks.TERMINATION_GRACE_S", 0.2)
    text = """
        (folder / f"pid{rank}").write_text(str(os.getpid()))
        if rank == 2:
            # Rank 1 must have said that SIGTERM does not end it.
            while not (folder / "deaf").exists(): time.sleep(0.01)
            sys.exit(3)
        if rank == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (folder / "deaf").touch()
        time.sleep(600)
    """
    with pytest.raises(RanksFailed, match="rank 2 of 3 ended with exit code 3") as caught:
        run(program, text, 3)
    assert caught.value.exit_code == 3
    pids = [int((program.parent / f"pid{rank}").read_text()) for rank in (1, 2)]
    assert not any(map(alive, pids))


LAUNCHER = """
import sys
from pathlib import Path
from keepwarm.launch.errors import RanksFailed
from keepwarm.launch.local.ranks import RankOptions, run_ranks
folder = Path(sys.argv[1])
try:
    logs = folder / "logs"
    options = RankOptions(world_size=2, threads_per_rank=1, logs=logs, module="stand_in", preloaded=())
    run_ranks([str(folder)], options)
except RanksFailed as error:
    print(error)
    sys.exit(error.exit_code)
"""


def launcher(program: Path, text: str) -> subprocess.Popen[str]:
    """A launcher of its own process, with both ranks started and their pids written."""
    program.write_text(textwrap.dedent(text))
    root = str(Path(__file__).parents[3])
    environment = os.environ | {"PYTHONPATH": f"{os.environ['PYTHONPATH']}:{root}/src:{root}"}
    command = [sys.executable, "-c", LAUNCHER, str(program.parent)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    await_that(lambda: all((program.parent / f"ready{rank}").exists() for rank in range(2)), "both ranks to start")
    return process


WAITING = """
    {handler}
    (folder / f"pid{{rank}}").write_text(str(os.getpid()))
    (folder / f"ready{{rank}}").touch()
    time.sleep(600)
"""
POLITE = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))"
DEAF = "signal.signal(signal.SIGTERM, lambda *_: (folder / f'asked{rank}').touch())"


def pids(program: Path) -> list[int]:
    return [int((program.parent / f"pid{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_launcher_signal_ends_all_ranks_with_130(program: Path, number: signal.Signals) -> None:
    process = launcher(program, WAITING.format(handler=POLITE))
    process.send_signal(number)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert not any(map(alive, pids(program)))


def test_launcher_second_interrupt_kills_ranks(program: Path) -> None:
    process = launcher(program, WAITING.format(handler=DEAF))
    process.send_signal(signal.SIGINT)
    await_that(lambda: all((program.parent / f"asked{rank}").exists() for rank in range(2)), "SIGTERM at the ranks")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert not any(map(alive, pids(program)))


def test_run_ranks_preload_failure_names_module(program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs = program.parent / "logs"
    unknown = ("no_such_module",)
    with pytest.raises(LaunchError, match="has died"):
        run_ranks([], RankOptions(world_size=2, threads_per_rank=1, logs=logs, module="stand_in", preloaded=unknown))
    assert "no_such_module" in capfd.readouterr().err


def test_rank_exit_runs_own_exit_handlers_only(program: Path) -> None:
    def clean_up(folder: Path = program.parent) -> None:
        (folder / f"launcher-{os.getpid()}").touch()

    atexit.register(clean_up)
    finalizer = weakref.finalize(clean_up, clean_up)
    try:
        run(
            program,
            """
            import atexit, weakref
            atexit.register((folder / f"exit-{rank}").touch)
            weakref.finalize(pathlib, (folder / f"finalizer-{rank}").touch)
            """,
        )
    finally:
        atexit.unregister(clean_up)
        finalizer.detach()
    assert {path.name for path in program.parent.rglob("*-*")} == {"exit-0", "exit-1", "finalizer-0", "finalizer-1"}


def test_ranks_die_with_killed_launcher(program: Path) -> None:
    process = launcher(program, WAITING.format(handler=DEAF))
    process.kill()
    process.communicate(timeout=DEADLINE)
    await_that(lambda: not any(map(alive, pids(program))), "the ranks of a killed launcher to end")
