"""Memory outlives its agent: whatever ends agents, one or all, the next ones go on with it, and nothing is decoded."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keepwarm.ft.discovery.registry import Registry
from keepwarm.ft.keeper import KEEPER_MODULE, AgentExit
from keepwarm.ft.memory.records import Records
from tests.ft.agent.test_agent import WORKER, recover, take, wait_for
from tests.support.ft.nodes import Nodes, ended, equal, nodes, random_state
from tests.support.ft.team import Team, team

ROOT = Path(__file__).parents[3]


def orders(world: Nodes, epoch: int) -> tuple[Any, ...]:
    """What the choice of an epoch has decoded."""
    choice = Registry(world.folder / "shared").choice(epoch)
    assert choice is not None
    return choice.orders


@pytest.mark.parametrize("crashed", [(1,), (0, 1, 2)])
def test_agents_killed_restore_their_own_memory_without_decoding(tmp_path: Path, crashed: tuple[int, ...]) -> None:
    with nodes(tmp_path, 3, groups=[(range(3), 1)]) as world:
        states = [random_state(rank, 3) for rank in range(3)]
        snapshotters = world.snapshotters(states)
        recover(world, snapshotters, 1)
        take(snapshotters, 1)
        take(snapshotters, 2)
        keepers = dict(world.keepers)
        for each in world.clients:
            each.close()
        world.crash(*crashed)
        assert world.keepers == keepers
        fresh = [random_state(rank, 3, seed=9) for rank in range(3)]
        restored = recover(world, world.snapshotters(fresh), 9)
        assert [found.step for found in restored] == [2] * 3
        assert all(equal(state, random_state(rank, 3)) for rank, state in enumerate(fresh))
        assert orders(world, 9) == ()


def test_agent_killed_while_workers_go_on_commits_the_next_snapshot(tmp_path: Path) -> None:
    with nodes(tmp_path, 3, groups=[(range(3), 1)]) as world:
        states = [random_state(rank, 3) for rank in range(3)]
        snapshotters = world.snapshotters(states)
        recover(world, snapshotters, 1)
        take(snapshotters, 1)
        world.crash(1)
        snapshotters[1].client.close()
        again = world.snapshotters(states, only=1)[0]
        wait_for(lambda: world.status(1).mode == "active" and world.status(0).epoch == world.status(1).epoch)
        epoch = world.status(1).epoch
        assert orders(world, epoch) == ()
        assert [(held.step, held.phase) for held in world.status(1).held] == [(1, "committed")]
        wait_for(lambda: {each.client.epoch for each in (snapshotters[0], again, snapshotters[2])} == {epoch})
        take([snapshotters[0], again, snapshotters[2]], 3)


def test_agent_with_the_memory_of_a_dead_one_shows_what_is_committed_before_its_epoch(tmp_path: Path) -> None:
    with nodes(tmp_path, 1) as world:
        (snapshotter,) = world.snapshotters([random_state(0, 1)])
        recover(world, [snapshotter], 1)
        take([snapshotter], 4)
        world.crash(0)
        assert (world.status(0).mode, world.status(0).committed) == ("joining", (1, 4))


def test_agent_killed_while_workers_write_waits_for_them(tmp_path: Path) -> None:
    with nodes(tmp_path, 2) as world:
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(ROOT), str(world.folder), str(rank), "copying"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == b"ready\n"
            world.crash(0, 1)
            for slot in range(2):
                assert {held.phase for held in world.status(slot).held} == {"committed", "draining"}
            fresh = [random_state(rank, 2, seed=9) for rank in range(2)]
            restored = recover(world, world.snapshotters(fresh), 9)
            # What took their places waited until they were dead.
            assert [worker.wait(20) for worker in workers] == [-signal.SIGKILL] * 2
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
        assert [found.step for found in restored] == [1, 1]
        assert {held.phase for slot in range(2) for held in world.status(slot).held} == {"committed"}


def test_agent_killed_again_ends_with_lease_and_leaves_nothing(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, lease=2.0) as world:
        (snapshotter,) = world.snapshotters([random_state(0, 1)])
        recover(world, [snapshotter], 1)
        take([snapshotter], 1)
        world.crash(0)
        world.crash(0)
        snapshotter.client.close()
        world.snapshotters([random_state(0, 1)])[0].client.close()
        world.wait_dead(0)
        assert "no process has needed this agent" in world.log(0)
        assert not Path(world.configs[0].folder).exists()
        assert not (tmp_path / "shared/agents/0.json").exists()


def test_agent_lease_waits_for_a_worker_of_the_last_agent(tmp_path: Path) -> None:
    """It takes part again with its next snapshot, which may be later than the lease."""
    with nodes(tmp_path, 1, lease=2.0) as world:
        (snapshotter,) = world.snapshotters([random_state(0, 1)])
        recover(world, [snapshotter], 1)
        take([snapshotter], 1)
        world.crash(0)
        with pytest.raises(subprocess.TimeoutExpired):
            world.wait_dead(0, 5.0)
        again = world.snapshotters([random_state(0, 1, seed=9)])[0]
        (restored,) = recover(world, [again], 2)
        assert restored.step == 1
        again.join()


def test_agent_died_and_chunk_rotted_meanwhile_is_decoded(tmp_path: Path) -> None:
    with team(tmp_path, 3, 1) as world:
        copy = world.agents[1].state.copy(world.agents[1].state.committed)
        assert copy is not None
        world.crash(1)
        file = world.holdings[1].files[f"data{copy.data}"]
        os.pwrite(file, bytes([os.pread(file, 1, 7)[0] ^ 1]), 7)
        world.start(1)
        world.recover(9)
        world.check(2)
        choice = world.agents[0].election.choice
        assert choice is not None
        assert [order.targets for _, order in choice.orders] == [(1,)]


def test_agent_that_died_in_an_undecided_epoch_still_takes_part_in_it(tmp_path: Path) -> None:
    """The others wait for what it holds; to choose without it might give up what only it can prove."""
    with team(tmp_path, 3, 1) as world:
        world.paused = {2}
        world.begin(9)
        world.until(lambda: world.agents[1].state.epoch == 9, "epoch 9 to begin")
        world.crash(1)
        world.start(1)
        world.until(lambda: 1 in world.agents[0].network.links, "its link")
        world.paused = set()
        world.until(lambda: world.recovered(9), "the choice")
        choice = world.agents[0].election.choice
        assert choice is not None
        assert choice.decision.incarnations[1] == world.agents[1].state.incarnation
        assert world.agents[0].state.epoch == 9
        world.check(2)


def test_agent_died_with_torn_records_begins_empty(tmp_path: Path) -> None:
    with team(tmp_path, 3, 1) as world:
        world.crash(1)
        for place in (0, 1 << 40):
            os.pwrite(world.holdings[1].files["records"], b"torn", place + 40)
        world.start(1)
        assert world.agents[1].state.copies == ()
        world.recover(9)
        world.check(2)
        log = (tmp_path / "shared" / "agents" / "agent-1.log").read_text()
        assert "the records of the memory cannot be used" in log


def test_keeper_killed_ends_its_agent_and_the_memory(tmp_path: Path) -> None:
    with nodes(tmp_path, 1) as world:
        (snapshotter,) = world.snapshotters([random_state(0, 1)])
        recover(world, [snapshotter], 1)
        take([snapshotter], 1)
        with ended(world.pids[0]):
            os.kill(world.keepers[0], signal.SIGKILL)
        world.start(0)
        assert world.status(0).held == ()


def test_keeper_second_of_a_slot_is_refused(tmp_path: Path) -> None:
    with nodes(tmp_path, 1) as world:
        command = [sys.executable, "-P", "-m", KEEPER_MODULE, str(Path(world.configs[0].folder) / "agent.json")]
        for _ in range(2):
            second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert second.returncode == AgentExit.TAKEN
            assert "its agent runs already" in second.stderr
            world.look(0)


# ---- what a keeper does, with other programs in the place of the agent

DYING = """
import os, signal, sys
records = int(sys.argv[1].split(",")[2])
before = os.pread(records, 100, 0)
os.pwrite(records, before + b".", 0)
with open(os.environ["DYING_LOG"], "a") as log:
    log.write(f"{len(before)}\\n")
if len(before) == int(os.environ["DYING_ENDS"]):
    sys.exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""
KEEPER = """
import sys
from keepwarm.ft import keeper
keeper.AGENT_MODULE, keeper.FIRST_PAUSE_S, keeper.PAUSE_STEP_S = "dying", 0.001, 0.001
sys.exit(keeper.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("ends", "code", "lives"), [(3, 0, 4), (-1, 128 + signal.SIGKILL, 9)])
def test_keeper_starts_the_agent_again_with_its_memory_a_limited_number_of_times(
    tmp_path: Path, ends: int, code: int, lives: int
) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    config = tmp_path / "runtime" / "0" / "agent.json"
    config.parent.mkdir(parents=True)
    config.write_text("{}")
    log = tmp_path / "log"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "DYING_LOG": str(log), "DYING_ENDS": str(ends)}
    done = subprocess.run([sys.executable, "-c", KEEPER, str(config)], env=environment, timeout=120, check=False)
    assert done.returncode == code
    assert log.read_text().split() == [str(number) for number in range(lives)]
    assert not config.parent.exists()


# ---- every moment


class Crashed(Exception):
    """The agent has died."""


@pytest.fixture(params=["before", "after"])
def fatal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ends the agent that has the records `of` before or after it writes number `at`, counted from now on."""
    now: dict[str, Any] = {"of": None, "at": -1}
    append = Records._append

    def counted(self: Records, content: bytes) -> None:
        now["at"] -= self is now["of"]
        ends = self is now["of"] and now["at"] < 0
        if not ends or request.param == "after":
            append(self, content)
        if ends:
            raise Crashed

    monkeypatch.setattr(Records, "_append", counted)
    return now


def crash_at(world: Team, fatal: dict[str, Any], slot: int, at: int, step: int) -> bool:
    """Take a snapshot during which an agent dies at one of its records. Return whether it has come to that."""
    fatal.update(of=world.agents[slot]._records, at=at)
    try:
        world.take(step)
    except Crashed:
        return True
    finally:
        fatal["of"] = None
    return False


@pytest.mark.parametrize("everyone", [False, True])
def test_agents_die_at_every_record_of_a_snapshot_and_keep_what_was_committed(
    tmp_path: Path, fatal: dict[str, Any], everyone: bool
) -> None:
    with team(tmp_path, 3, 1) as world:
        step, at, died = 3, 0, True
        while died:
            died = crash_at(world, fatal, 1, at, step)
            if died:
                for slot in range(3) if everyone else (1,):
                    world.crash(slot)
                    world.start(slot)
                world.recover(max(agent.state.epoch for agent in world.agents.values()) + 2)
                chosen = world.chosen()
                assert chosen in (step - 1, step)
                world.check(chosen)
                choice, group = world.agents[0].election.choice, world.agents[0].state.group
                assert choice is not None
                assert choice.decision.epoch == world.agents[0].state.epoch
                for _, order in choice.orders:
                    assert chosen == step, "what was committed is whole"
                    assert set(order.targets) <= set(group.parities(order.stripe)), "no data is lost"
                world.take(step + 1)
            step, at = step + 2, at + 1
        assert at > 3, "the records of a whole snapshot; some may be written as one"
