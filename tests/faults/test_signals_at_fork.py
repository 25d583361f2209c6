"""A signal that reaches a fork before it has done anything ends it as one a moment later would."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from keepwarm.launch.forkserver import ForkServer, Worker

ROOT = Path(__file__).parents[2]
HOOK = ROOT / "tests" / "support" / "forks"
DEADLINE = 60.0
STAYS = "import signal\nwhile True:\n    signal.pause()\n"


def until(ready: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not ready():
        assert time.monotonic() < end, f"waited {DEADLINE:g} s for {what}"
        time.sleep(0.01)


def pending(pid: int) -> bool:
    """Whether a signal waits for a process that holds it back."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("ShdPnd:")[2].split()[0], 16) != 0


class Stopped:
    """The fork that the hook stops."""

    def __init__(self, folder: Path, name: str, number: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.environment = {"KEEPWARM_TEST_FORK": f"{name}:{number}:{folder}", "PYTHONPATH": str(HOOK)}

    def pid(self) -> int:
        until((self.folder / "stopped").exists, "the fork")
        return int((self.folder / "stopped").read_text())

    def go(self) -> None:
        (self.folder / "go").touch()


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, killed with its children at the end."""
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    ) as started:  # fmt: skip
        try:
            yield started
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [*psutil.Process(started.pid).children(recursive=True), psutil.Process(started.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()


def test_worker_signalled_as_it_is_forked_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stays.py").write_text(STAYS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(HOOK)
    monkeypatch.delitem(sys.modules, "sitecustomize", raising=False)
    stopped = Stopped(tmp_path / "fork", "", 0)
    with contextlib.closing(ForkServer(("sitecustomize",), stopped.environment)) as server:
        pid = server.start(Worker(module="stays", arguments=(), environment={}))
        assert stopped.pid() == pid
        os.kill(pid, signal.SIGTERM)
        stopped.go()
        end = time.monotonic() + DEADLINE
        while pid not in server.ended:
            assert time.monotonic() < end
            server.poll(0.1)
        assert server.ended[pid] == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_last_node_signalled_as_it_is_forked_ends_the_run_with_130(tmp_path: Path, number: signal.Signals) -> None:
    stopped = Stopped(tmp_path / "fork", "emulated_nodes", 3)
    command = [sys.executable, "-P", "-m", "keepwarm", "train", "ci/snapshot", f"output={tmp_path / 'run'}"]
    with process([*command, "--nodes", "4"], stopped.environment) as launcher:
        last = stopped.pid()
        parent = psutil.Process(last).parent()
        assert parent is not None
        launcher.send_signal(number)
        until(lambda: [each.pid for each in parent.children()] == [last], "the other nodes to end")
        stopped.go()
        output, _ = launcher.communicate(timeout=DEADLINE)
        assert (launcher.returncode, "Traceback" in output) == (130, False), output


SIGNALLED_AS_IT_FORKS = """
import os, signal, sys
left = [signal.SIG{number}]
os.register_at_fork(after_in_parent=lambda: left and os.kill(os.getpid(), left.pop()))
sys.argv[0] = "keepwarm"
from keepwarm.launch.cli.main import main
main()
"""


@pytest.mark.parametrize("number", ["INT", "TERM"])
@pytest.mark.parametrize("nodes", [["ci/tiny"], ["ci/snapshot", "--nodes", "4"]], ids=["ranks", "nodes"])
def test_launcher_signalled_as_it_forks_its_first_child_ends_with_130(
    tmp_path: Path, nodes: list[str], number: str
) -> None:
    code = SIGNALLED_AS_IT_FORKS.format(number=number)
    with process([sys.executable, "-P", "-c", code, "train", *nodes, f"output={tmp_path / 'run'}"], {}) as launcher:
        output, _ = launcher.communicate(timeout=DEADLINE)
        assert (launcher.returncode, "Traceback" in output) == (130, False), output


KEEPER = """
import sys
from keepwarm.ft import keeper
keeper.AGENT_MODULE = "stays"
sys.exit(keeper.main(sys.argv[1:]))
"""


def test_keeper_asked_to_end_as_it_forks_its_agent_ends(tmp_path: Path) -> None:
    (tmp_path / "stays.py").write_text(STAYS)
    config = tmp_path / "runtime" / "agent.json"
    config.parent.mkdir()
    config.write_text("{}")
    stopped = Stopped(tmp_path / "fork", "", 0)
    environment = stopped.environment | {"PYTHONPATH": f"{HOOK}:{tmp_path}"}
    with process([sys.executable, "-P", "-c", KEEPER, str(config)], environment) as keeper:
        agent = stopped.pid()
        keeper.send_signal(signal.SIGTERM)
        until(lambda: pending(agent) or not psutil.pid_exists(agent), "the signal")
        stopped.go()
        keeper.communicate(timeout=DEADLINE)
        assert keeper.returncode == 128 + signal.SIGTERM
