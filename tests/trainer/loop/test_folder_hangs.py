"""A run whose folder answers nothing any more loses a worker, an agent and a node, and trains on from memory."""

import contextlib
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from keepwarm.ft.discovery.config import SOCKET, runtime_folder
from keepwarm.ft.discovery.status import Status
from keepwarm.ft.errors import FtError
from keepwarm.ft.transport.auth import SECRET, load_secret, run_identity
from keepwarm.ft.worker.client import AgentClient
from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.preprocess.prepare import prepare_sources
from keepwarm.trainer.job.files import load_job
from tests.support.faulty.io_faults import Fault, library
from tests.support.runs import warm
from tests.support.runs.node_fixtures import start
from tests.support.runs.node_run import DEADLINE, JOB, Run, assert_equal, assert_nothing_left, command

__all__ = ["start"]
pytestmark = [pytest.mark.timeout(900), pytest.mark.dist]
STEPS = 150
CALLS = "open,write,sync,rename,truncate,mkdir,read,stat"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides of a job whose data are no part of its run folder."""
    spec = load_job(JOB)
    data = prepare_sources(spec.data, spec.model.vocabulary_size, tmp_path_factory.mktemp("data"))
    options = [f"stages.0.tokens={STEPS * 512}", "snapshot.durable=null"]
    for kind, sources in (("sources", data.sources), ("validation", data.validation)):
        for name, source in sources.items():
            assert isinstance(source.tokens, TokenFile)
            options.append(f"data.{kind}.{name}={source.tokens.path}")
    return tuple(options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, job: tuple[str, ...]) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = warm.run(command(folder, "--nodes", "4", *job), timeout=DEADLINE)
    assert done.returncode == 0, done.stdout
    return folder


class Watched:
    """The agents of a run on emulated nodes, asked without a look at its folder."""

    def __init__(self, run: Run) -> None:
        self.run, self._secret = run, load_secret(run.folder / SECRET)
        self.nodes = {slot: f"node-{slot}" for slot in range(4)}

    def status(self, slot: int) -> Status | None:
        run = run_identity(self._secret)
        suffix = hashlib.sha256(self.nodes[slot].encode()).hexdigest()[:8]
        folder = runtime_folder(run, slot)
        socket = folder.with_name(f"{folder.name}.{suffix}") / SOCKET
        with contextlib.suppress(FtError, OSError):
            client = AgentClient(socket, run=run, secret=self._secret, role="onlooker", deadline=5.0)
            try:
                return client.status(5.0)
            finally:
                client.close()
        return None

    def committed(self, beyond: int) -> int:
        """Wait until all agents have committed a step beyond a given one; return the newest that all have."""

        def found() -> int | None:
            each = [self.status(slot) for slot in range(4)]
            steps = [one.committed[1] for one in each if one is not None and one.committed is not None]
            return min(steps) if len(steps) == 4 and min(steps) > beyond else None

        step: int = self.run.until(found, f"all agents to commit a step after {beyond}")
        return step


def test_nodes_folder_hangs_and_worker_agent_and_node_are_lost_trains_on_from_memory_bitwise(
    tmp_path: Path, job: tuple[str, ...], whole: Path, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = tmp_path / "hold"
    fault = Fault(path=f"{tmp_path}/@(run|run/*)", kind="hang", calls=CALLS, hold=hold)
    with monkeypatch.context() as environment:
        for name, value in (fault.environment(tmp_path / "struck") | {"LD_PRELOAD": str(library())}).items():
            environment.setenv(name, value)
        run = start("--nodes", "4", "--spares", "1", *job, cold=True)
    run.after(3)
    watched, owners = Watched(run), {slot: run.owner(slot) for slot in range(4)}
    hold.touch()
    try:
        os.kill(owners[2].workers[2], signal.SIGKILL)
        step = watched.committed(watched.committed(3) + 2)

        before = watched.status(1)
        assert before is not None
        os.kill(before.pid, signal.SIGKILL)
        step = watched.committed(step + 2)
        after = watched.status(1)
        assert after is not None
        assert (after.keeper, after.pid != before.pid) == (before.keeper, True)

        keeper = owners[3].keeper
        assert keeper is not None
        for pid in (keeper, owners[3].supervisor, owners[3].workers[3]):
            os.kill(pid, signal.SIGKILL)
        watched.nodes[3] = "node-4"
        watched.committed(step)
    finally:
        hold.unlink()
    run.done()
    assert [event["source"] for event in run.events("recovery")] == ["memory", "memory"]
    assert_equal(run, whole)
    assert_nothing_left(run)
