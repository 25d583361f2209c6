"""Signals that a process was started to ignore stay ignored, in it and in everything that it starts."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from keepwarm import signals

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0
IGNORED = {"HUP", "INT", "USR1"}

LAUNCHER = """
    import sys
    from pathlib import Path
    from keepwarm.launch.errors import RanksFailed
    from keepwarm.launch.local.ranks import RankOptions, run_ranks
    folder = Path(sys.argv[1])
    module = "tests.support.signal_rank"
    options = RankOptions(world_size=1, threads_per_rank=1, logs=folder, module=module, preloaded=())
    try:
        run_ranks([str(folder)], options)
    except RanksFailed as error:
        sys.exit(error.exit_code)
"""


def dispositions(pid: int, field: str) -> set[str]:
    """Names of the signals in a field of /proc/PID/status: SigIgn or SigCgt."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(status.partition(f"{field}:")[2].split()[0], 16)
    names = {"HUP", "INT", "TERM", "USR1"}
    return {name for name in names if mask >> (getattr(signal, f"SIG{name}") - 1) & 1}


def test_handled_leaves_ignored_signals_alone() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGUSR1)}
    seen: list[int] = []
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        with signals.handled((signal.SIGHUP, signal.SIGUSR1), lambda number, frame: seen.append(number)):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR1)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert seen == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


STUCK = """
    import pathlib, sys, time
    from keepwarm.trainer.loop.interrupt import Interrupt
    class Stuck:
        def __del__(self):
            pathlib.Path(sys.argv[1]).touch()
            while interrupt.received is None or not pathlib.Path(sys.argv[2]).exists():
                time.sleep(0.01)
            print("received", flush=True)
            time.sleep(600)
    with Interrupt().watching() as interrupt:
        Stuck()
"""


def test_second_interrupt_ends_a_rank_wherever_it_is(tmp_path: Path) -> None:
    """Exceptions do not leave a destructor."""
    stuck, first = tmp_path / "stuck", tmp_path / "first"
    command = [sys.executable, "-c", textwrap.dedent(STUCK), str(stuck), str(first)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            end = time.monotonic() + DEADLINE
            while not stuck.exists():
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            first.touch()
            assert process.stdout is not None
            assert process.stdout.readline() == b"received\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE) == -signal.SIGINT
        finally:
            process.kill()


@pytest.mark.parametrize("how", [f"trap '' {' '.join(IGNORED)};", ""], ids=["ignored", "not ignored"])
def test_ranks_ignore_what_their_launcher_was_started_to_ignore(tmp_path: Path, how: str) -> None:
    (tmp_path / "launcher.py").write_text(textwrap.dedent(LAUNCHER))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    command = f"{how} exec {sys.executable} {tmp_path}/launcher.py {tmp_path}"
    with subprocess.Popen(["bash", "-c", command], env=environment, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + DEADLINE
        while not (tmp_path / "pid").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        rank = int((tmp_path / "pid").read_text())
        ignored = IGNORED if how else set()
        assert dispositions(process.pid, "SigIgn") == dispositions(rank, "SigIgn") == ignored
        assert dispositions(process.pid, "SigCgt") == {"HUP", "INT", "TERM", "USR1"} - ignored
        assert dispositions(rank, "SigCgt") == {"INT", "TERM", "USR1"} - ignored
        process.send_signal(signal.SIGHUP)
        if how:
            process.send_signal(signal.SIGINT)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 130
