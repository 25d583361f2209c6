"""A run whose folder answers nothing any more, or takes nothing any more, trains on from memory."""

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from keepwarm.exit_code import ExitCode
from keepwarm.ft.discovery.config import SOCKET, runtime_folder
from keepwarm.ft.discovery.status import Status
from keepwarm.ft.errors import FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.ft.transport.auth import SECRET, load_secret, run_identity
from keepwarm.ft.worker.client import AgentClient
from keepwarm.launch.node.record import NodeRecord
from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.preprocess.prepare import prepare_sources
from keepwarm.trainer.job.files import load_job
from tests.support.faulty.io_faults import Fault, library
from tests.support.runs import warm
from tests.support.runs.node_fixtures import start
from tests.support.runs.node_run import DEADLINE, JOB, Run, assert_nothing_left, command
from tests.support.runs.run_contents import tensors_of

__all__ = ["start"]
pytestmark = [pytest.mark.timeout(900), pytest.mark.dist, pytest.mark.long]
CALLS = "open,write,sync,rename,truncate,mkdir,read,stat"


def tokens(steps: int) -> str:
    return f"stages.0.tokens={steps * 512}"


@pytest.fixture
def job(tmp_path: Path) -> tuple[str, ...]:
    """Overrides of a job whose data are no part of its run folder, and whose rate does not depend on its length."""
    spec = load_job(JOB)
    data = prepare_sources(spec.data, spec.model.vocabulary_size, tmp_path / "tokens")
    options = ["snapshot.durable=null", "stages.0.lr={schedule: constant, max: 3e-3, warmup: 0.0}"]
    for kind, sources in (("sources", data.sources), ("validation", data.validation)):
        for name, source in sources.items():
            assert isinstance(source.tokens, TokenFile)
            options.append(f"data.{kind}.{name}={source.tokens.path}")
    return tuple(options)


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
    tmp_path: Path, job: tuple[str, ...], start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained until then is saved once the folder answers, and is what an undisturbed run has after as many
    steps.
    """
    hold = tmp_path / "hold"
    fault = Fault(path=f"{tmp_path}/@(run|run/*)", kind="hang", calls=CALLS, hold=hold)
    with monkeypatch.context() as environment:
        for name, value in (fault.environment(tmp_path / "struck") | {"LD_PRELOAD": str(library())}).items():
            environment.setenv(name, value)
        run = start("--nodes", "4", "--spares", "1", *job, tokens(100_000), cold=True)
    run.after(3)
    watched, owners = Watched(run), {slot: run.owner(slot) for slot in range(4)}
    hold.touch()
    try:
        lose_one_after_the_other(watched, owners)
    finally:
        hold.unlink()
    saved = stopped(run)
    log = (run.folder / "agents" / "agent-0.log").read_text().splitlines()
    chosen = [line["snapshot"] for line in map(json.loads, log) if line["text"] == "decided"]
    assert chosen[0] is None
    assert len(chosen) >= 3
    assert None not in chosen[1:], "memory was restored each time"
    assert_as_undisturbed(run, saved, job)


def stopped(run: Run) -> Path:
    """Interrupt a run; return the checkpoint that it saves."""
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(DEADLINE) == ExitCode.INTERRUPTED, run.log.read_text()
    (saved,) = publication.checkpoints(run.folder / "checkpoints")
    return saved


def assert_as_undisturbed(run: Run, saved: Path, job: tuple[str, ...]) -> None:
    """Check that a run has saved what one that was left alone has after as many steps."""
    whole = run.folder.with_name("whole")
    done = warm.run(command(whole, "--nodes", "4", *job, tokens(read_manifest(saved).step)), timeout=DEADLINE)
    assert done.returncode == 0, done.stdout
    assert tensors_of(run.folder) == tensors_of(whole)
    assert_nothing_left(run)


def lose_one_after_the_other(watched: Watched, owners: dict[int, NodeRecord]) -> None:
    """Kill a worker, an agent and a node, each once all agents commit again."""
    os.kill(owners[2].workers[2], signal.SIGKILL)
    step = watched.committed(watched.committed(3))
    before = watched.status(1)
    assert before is not None
    os.kill(before.pid, signal.SIGKILL)
    step = watched.committed(watched.committed(step))
    after = watched.status(1)
    assert after is not None
    assert (after.keeper, after.pid != before.pid) == (before.keeper, True)
    keeper = owners[3].keeper
    assert keeper is not None
    for pid in (keeper, owners[3].supervisor, owners[3].workers[3]):
        os.kill(pid, signal.SIGKILL)
    watched.nodes[3] = "node-4"
    watched.committed(step)


def test_nodes_folder_is_remounted_read_only_for_a_while_loses_no_agent_and_a_worker_costs_a_restart_from_memory(
    tmp_path: Path, job: tuple[str, ...], start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is open for writing fails too, as after the remount of a file system that has errors."""
    hold = tmp_path / "hold"
    calls = "open,write,sync,rename,truncate,mkdir"
    fault = Fault(path=f"{tmp_path}/@(run|run/*)", kind="EROFS", calls=calls, hold=hold)
    with monkeypatch.context() as environment:
        for name, value in (fault.environment(tmp_path / "struck") | {"LD_PRELOAD": str(library())}).items():
            environment.setenv(name, value)
        run = start("--nodes", "4", *job, tokens(100_000), cold=True)
    run.after(3)
    watched, worker = Watched(run), run.owner(2).workers[2]
    step = watched.committed(3)
    before = [watched.status(slot) for slot in range(4)]
    hold.touch()
    try:
        step = watched.committed(watched.committed(step))
        os.kill(worker, signal.SIGKILL)
        watched.committed(watched.committed(step))
        after = [watched.status(slot) for slot in range(4)]
    finally:
        hold.unlink()
    assert [each and each.pid for each in after] == [each and each.pid for each in before]
    assert "write" in {line.split()[0] for line in (tmp_path / "struck").read_text().splitlines()}
    assert_as_undisturbed(run, stopped(run), job)
