"""What was committed is not given up, nothing stays open for ever, and what is wrong is left out: with real agents."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from keepwarm.ft.agent import recovery_election, repair
from keepwarm.ft.agent.status import status
from keepwarm.ft.codec.reed_solomon import Codec, ParityRow
from keepwarm.ft.memory.shared_memory import bucket_sums
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import Decision, Decode, Known, Part, Read, SnapshotId, Stored, Vote
from keepwarm.ft.protocol.state import Mode, Phase
from keepwarm.ft.transport.link import Link
from keepwarm.ft.worker.snapshotter import SnapshotOptions
from tests.support.ft.nodes import nodes, random_state, together, wait_committed
from tests.support.ft.team import BUCKET, LAYOUT, Team, team


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "RETRY", 0.1)
    monkeypatch.setattr(recovery_election, "SETTLE_POLL_INTERVAL_S", 0.05)


def replace(world: Team, *slots: int) -> None:
    for slot in slots:
        world.kill(slot)
    for slot in slots:
        world.start(slot)
    world.until(world.connected, "all links")


def seal_without_coding(world: Team, step: int, *, settled: bool = True) -> None:
    """A snapshot whose data is verified on all nodes and whose parity does not exist yet: no link moves."""
    world.write(step, settled=settled)

    def verified() -> bool:
        for agent in world.agents.values():
            for key, mask in agent.selector.select(0):
                if not isinstance(key.data, Link):
                    key.data.ready(mask)
        copies = [a.state.copy(SnapshotId("run", a.state.epoch, step, LAYOUT)) for a in world.agents.values()]
        return all(copy is not None and copy.verified for copy in copies)

    world.until(verified, "data to be verified", turn=False)


def phases(world: Team) -> dict[int, list[tuple[int, str]]]:
    return {s: [(c.snapshot.step, c.phase.value) for c in a.state.copies] for s, a in world.agents.items()}


# ---- what was committed stays until something newer is whole


def test_committed_snapshot_survives_a_rank_and_then_a_node(tmp_path: Path) -> None:
    """Step 3 has no parity when a rank dies, and is chosen; before it has any, a node is lost."""
    with team(tmp_path, 3, 1) as world:
        seal_without_coding(world, 3)
        for agent in world.agents.values():
            agent.dispatch(events.WorkerLost(0))
        world.begin(2)
        world.until(lambda: all(a.state.decided_epoch == 2 for a in world.agents.values()), "the choice", 30.0)
        assert world.chosen() == 3
        assert all([step for step, _ in held] == [2, 3] for held in phases(world).values())
        replace(world, 0)
        world.until(lambda: world.recovered(3), "another choice")
        assert world.chosen() == 2
        world.check(2)
        world.take(4)


def swallow(monkeypatch: pytest.MonkeyPatch, lost: Callable[[Link, Any], bool]) -> None:
    """From now on, messages for which `lost(link, message)` holds are not sent."""
    original = Link.send

    def send(link: Link, message: Any, *rest: Any, **more: Any) -> None:
        if not lost(link, message):
            original(link, message, *rest, **more)

    monkeypatch.setattr(Link, "send", send)


def choose_unprotected(world: Team, step: int) -> None:
    """A snapshot without parity is restored, as after the death of a rank, and training goes on from it."""
    seal_without_coding(world, step, settled=False)
    for agent in world.agents.values():
        agent.dispatch(events.WorkerLost(0))
    epoch = max(agent.state.epoch for agent in world.agents.values()) + 1
    world.begin(epoch)
    world.until(lambda: all(a.state.decided_epoch == epoch for a in world.agents.values()), "the choice", 30.0)
    assert world.chosen() == step
    for agent in world.agents.values():
        agent.dispatch(events.WorkerOpened(0, SnapshotId("run", epoch, step + 1, LAYOUT), wait=False))


def test_snapshot_whose_commit_only_a_dead_agent_knew_survives_a_second_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first snapshot is restored, and before its parity is back, the next one is chosen without parity."""
    made = Team(tmp_path, [(range(3), 1)])
    try:
        made.until(made.connected, "all links")
        made.recover(1)
        with monkeypatch.context() as silent:
            swallow(silent, lambda link, message: isinstance(message, Stored | Known) and link.slot != 0)
            made.write(1)
            made.until(lambda: made.agents[0].state.committed is not None, "the commit")
            assert all(made.agents[slot].state.committed is None for slot in (1, 2))
            replace(made, 0)
        parity = made.agents[0].state.group.parity_stripes(0)
        swallow(monkeypatch, lambda link, message: isinstance(message, Part) and message.stripe in parity)
        made.recover(2, whole=False)
        assert made.chosen() == 1
        choose_unprotected(made, 2)
        monkeypatch.undo()
        replace(made, 0)
        made.until(lambda: made.recovered(4), "another choice")
        assert made.chosen() == 1
        made.check(1)
        made.take(5)
    finally:
        made.close()


def test_snapshot_that_an_agent_does_not_know_to_be_whole_survives_a_second_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replaced agent has all of the committed snapshot again, and what the others say of it is late."""
    with team(tmp_path, 3, 1) as world:
        replace(world, 0)
        with monkeypatch.context() as silent:
            swallow(silent, lambda link, message: isinstance(message, Stored | Known) and link.slot == 0)
            world.recover(2)
            world.check(2)
            choose_unprotected(world, 3)
        replace(world, 1)
        world.until(lambda: world.recovered(4), "another choice")
        assert world.chosen() == 2
        world.check(2)
        world.take(5)


def test_unprotected_choice_refuses_snapshots_until_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with team(tmp_path, 3, 1) as world:
        seal_without_coding(world, 3)
        original = Link.send
        held = [True]

        def send(link: Link, message: Any, *rest: Any, **more: Any) -> None:
            if not (held[0] and isinstance(message, Part)):
                original(link, message, *rest, **more)

        monkeypatch.setattr(Link, "send", send)
        world.recover(2, whole=False)
        for agent in world.agents.values():
            agent.dispatch(events.WorkerOpened(0, SnapshotId("run", 2, 4, LAYOUT)))
            assert not agent.state.waiting
            said = status(agent, agent.sessions, agent.commits, agent.scrub, agent.durable)
            assert (said.committed, said.refused) == ((1, 3), {"NO_ROOM": 1})
        held[0] = False
        world.take(5)
        assert all(held_ == [(5, "committed")] for held_ in phases(world).values())


def test_minority_waits_and_gives_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of four agents ever dies, but one is cut off while an epoch begins there."""
    for name in ("CONNECTED_GRACE", "KNOWN_GRACE"):
        monkeypatch.setattr(recovery_election, name, 0.0)
    with team(tmp_path, 4, 2, inventory_deadline=0.1) as world:
        alone = world.agents[0]
        for link in list(alone.network.links.values()):
            link.close("cut by the test")
        world.paused = {1, 2, 3}
        epoch = alone.state.epoch + 1
        world.begin(epoch)
        log = Path(tmp_path, "shared", "agents", "agent-0.log")
        world.until(lambda: '"waiting for agents", "slots": [1, 2, 3]' in log.read_text(), "a word about it", 30.0)
        assert alone.registry.choice(epoch) is None
        world.paused.clear()
        world.until(lambda: world.recovered(epoch), "all to agree")
        world.check(2)
        world.take(3)


def test_choice_of_nothing_frees_nothing_before_workers_have_gone_on(tmp_path: Path) -> None:
    with team(tmp_path, 3, 1) as world:
        everyone = tuple(world.agents[slot].state.incarnation for slot in range(3))
        for agent in world.agents.values():
            decision = Decision(epoch=2, snapshot=None, incarnations=everyone)
            agent.dispatch(events.PlanRead(decision, ()))
            assert agent.state.restorable
        world.recover(3)
        world.check(2)


def test_choice_that_cannot_be_written_is_tried_again(tmp_path: Path) -> None:
    """Fewer than a majority are left, and the shared folder is out of reach: they live on, with what they hold."""
    with team(tmp_path, 4, 2, inventory_deadline=1.0) as world:
        for slot in (2, 3):
            world.kill(slot)
        folder, away = tmp_path / "shared" / "agents", tmp_path / "shared" / "away"
        folder.rename(away)
        folder.touch()
        epoch = max(agent.state.epoch for agent in world.agents.values()) + 1
        world.begin(epoch)
        log = away / "agent-0.log"
        world.until(lambda: "the choice cannot be written" in log.read_text(), "a word about it", 30.0)
        folder.unlink()
        away.rename(folder)
        world.until(lambda: world.recovered(epoch), "the choice")
        world.check(2)


# ---- nothing stays open for ever


def test_snapshot_given_up_at_the_deadline_does_not_stop_later_ones(tmp_path: Path) -> None:
    """One agent stands still during a commit, until the workers have waited for the deadline."""
    with nodes(tmp_path, 2, silence=60.0) as world:
        snapshotters = world.snapshotters([random_state(rank, 2) for rank in range(2)])
        together(lambda s: s.restore(1), snapshotters)

        def take(step: int) -> list[BaseException | None]:
            for snapshotter in snapshotters:
                snapshotter.offer(step, b"meta")
            together(lambda s: s.join(), snapshotters)
            return [snapshotter.failure for snapshotter in snapshotters]

        assert take(1) == [None, None]
        together(wait_committed, snapshotters)
        for snapshotter in snapshotters:
            snapshotter._options = SnapshotOptions(deadline=0.5, meta_bytes=1024)
        os.kill(world.pids[1], signal.SIGSTOP)
        try:
            failures = [take(step) for step in (2, 3)]
        finally:
            os.kill(world.pids[1], signal.SIGCONT)
        assert any(failure is not None for each in failures for failure in each)
        for snapshotter in snapshotters:
            snapshotter._options = SnapshotOptions(deadline=60.0, meta_bytes=1024)
        assert take(4) == [None, None]
        together(wait_committed, snapshotters)
        assert [said.held[-1].step for said in map(world.status, range(2))] == [4, 4]


def test_copy_that_fails_gives_its_buffer_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with nodes(tmp_path, 1) as world:
        (snapshotter,) = world.snapshotters([random_state(0, 1)])
        snapshotter.restore(1)

        def fail(*_: Any) -> None:
            raise RuntimeError("the device is lost")

        with monkeypatch.context() as broken:
            broken.setattr(snapshotter, "_copy", fail)
            snapshotter.offer(1, b"meta")
            snapshotter.join()
        assert "the device is lost" in str(snapshotter.failure)
        snapshotter.offer(2, b"meta")
        snapshotter.join()
        wait_committed(snapshotter)


def test_agents_of_different_snapshots_agree_after_an_epoch_during_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One agent has the choice and grants step 2; the other has it a moment later, refuses 2 and grants 3."""
    world = Team(tmp_path, [((0, 1), 1)], chunk=2)
    try:
        world.until(world.connected, "all links")
        world.recover(1)
        world.take(1)

        def seal_what_is_granted() -> None:
            """Workers wait for their buffer, and write when they have it."""
            for slot, agent in world.agents.items():
                for copy in agent.state.copies:
                    if copy.phase is Phase.FILLING and 0 in copy.writers and copy.data is not None:
                        content = world.content(slot, copy.snapshot.step)
                        agent.memory.data[copy.data].data[:] = content
                        agent.dispatch(events.WorkerSealed(0, copy.snapshot, bucket_sums(content, BUCKET)))

        def offer(step: int) -> None:
            for agent in world.agents.values():
                agent.dispatch(events.WorkerOpened(0, SnapshotId("run", agent.state.epoch, step, LAYOUT)))
            seal_what_is_granted()

        first, second = world.agents[0], world.agents[1]
        original, told = Link.send, list[Link]()

        def send(link: Link, message: Any, *rest: Any, **more: Any) -> None:
            original(link, message, *rest, **more)
            if isinstance(message, Vote) and link.mine.slot == 1:
                told.append(link)

        with monkeypatch.context() as listening:
            listening.setattr(Link, "send", send)
            world.begin(2)
            world.until(lambda: told and not told[0].channel.pending, "the vote of the other", 30.0)
        world.paused = {1}  # before the first one has read it
        world.until(lambda: first.state.mode is Mode.ACTIVE, "the choice", 30.0)
        world.paused.clear()
        assert second.state.mode is Mode.RECOVERING
        offer(2)
        world.until(lambda: second.state.mode is Mode.ACTIVE, "the other", 30.0)
        assert first.state.copy(SnapshotId("run", first.state.epoch, 2, LAYOUT)) is not None
        for step in (3, 4, 5):
            offer(step)

            def ended() -> bool:
                seal_what_is_granted()
                return not any(copy.open for agent in world.agents.values() for copy in agent.state.copies)

            world.until(ended, "an end", 30.0)
        world.take(6)
        world.check_committed(6)
    finally:
        world.close()


def test_many_skipped_snapshots_do_not_stop_later_ones(tmp_path: Path) -> None:
    """Two groups, and forty steps are skipped while one is committed: nothing is forgotten."""
    world = Team(tmp_path, [((0, 1), 1), ((2, 3), 1)])
    try:
        world.until(world.connected, "all links")
        world.recover(1)
        world.take(1)
        world.write(2)
        for step in range(3, 43):
            for agent in world.agents.values():
                agent.dispatch(events.WorkerOpened(0, SnapshotId("run", 1, step, LAYOUT), wait=False))
            if step % 10 == 0:
                world.turn()
        world.until(lambda: world.committed(2), "the first")
        for step in (43, 44):
            world.take(step)
            world.check_committed(step)
        assert all(len(agent.state.void) < 40 for agent in world.agents.values())
    finally:
        world.close()


# ---- what is wrong is left out


@contextlib.contextmanager
def one_wrong_bit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A parity chunk takes a wrong bit while it is accumulated, before its digest exists."""
    original = ParityRow.accumulate
    done: list[bool] = []

    def accumulate(row: ParityRow, parity: Any, column: int, data: Any) -> None:
        original(row, parity, column, data)
        if not done:
            done.append(True)
            parity[5] ^= 1

    with monkeypatch.context() as broken:
        broken.setattr(ParityRow, "accumulate", accumulate)
        yield


def wrong_parities(world: Team) -> list[tuple[int, int]]:
    """(slot, stripe) of the parity chunks that are not what the data gives."""
    found = []
    for slot, agent in world.agents.items():
        group, copy = agent.state.group, agent.state.copy(agent.state.committed or agent.state.decided)
        assert copy is not None
        for stripe in group.parity_stripes(slot):
            data = []
            for source in group.sources(stripe):
                held = world.agents[source].state.copy(copy.snapshot)
                assert held is not None
                data.append(np.array(world.agents[source].memory.chunk(held.data, held.parity, stripe)))
            parity = [np.zeros_like(data[0]) for _ in range(group.parity)]
            for column, chunk in enumerate(data):
                for row, each in enumerate(parity):
                    Codec(group.data, group.parity, kernel="numpy").row(row).accumulate(each, column, chunk)
            expected = parity[group.parities(stripe).index(slot)]
            if not np.array_equal(agent.memory.chunk(copy.data, copy.parity, stripe), expected):
                found.append((slot, stripe))
    return found


def test_wrong_parity_without_others_is_excluded_and_disk_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with team(tmp_path, 3, 1) as world:
        with one_wrong_bit(monkeypatch):
            world.take(3)
        ((slot, stripe),) = wrong_parities(world)
        replace(world, world.agents[slot].state.group.sources(stripe)[0])
        world.begin(2, min(world.agents))
        world.until(
            lambda: all(a.state.restorable and a.state.epoch >= 2 for a in world.agents.values()), "an answer", 60.0
        )
        epoch = max(agent.state.epoch for agent in world.agents.values())
        assert epoch <= 4
        assert all(agent.state.decided is None for agent in world.agents.values())
        reason = world.agents[slot].shared.reason(epoch)
        assert f"stripe {stripe} of group 0 does not decode to what was written" in reason
        world.take(4)


def test_wrong_parity_with_others_is_left_out_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with team(tmp_path, 4, 2) as world:
        with one_wrong_bit(monkeypatch):
            world.take(3)
        ((slot, stripe),) = wrong_parities(world)
        replace(world, world.agents[slot].state.group.sources(stripe)[0])
        world.recover(2)
        world.check(3)
        world.until(lambda: wrong_parities(world) == [], "the wrong one to be decoded", 60.0)
        assert max(agent.state.epoch for agent in world.agents.values()) == 2
        world.take(4)


def test_rebuilt_parity_with_buckets_in_the_wrong_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two headers of one parity chunk bear each other's index, as after a flipped bit in each."""
    with team(tmp_path, 3, 1) as world:
        replace(world, 0)
        original = Link.send
        seen: list[int] = []
        parity = world.agents[0].state.group.parity_stripes(0)

        def send(link: Link, message: Any, *rest: Any, **more: Any) -> None:
            if isinstance(message, Part) and message.owner == 0 and message.stripe in parity and len(seen) < 2:
                seen.append(message.index)
                message = msgspec.structs.replace(message, index=1 - message.index)
            original(link, message, *rest, **more)

        monkeypatch.setattr(Link, "send", send)
        world.recover(2)
        assert seen == [0, 1]
        assert wrong_parities(world) == []
        world.check(2)


def test_order_that_does_not_fit_is_ignored(tmp_path: Path) -> None:
    with team(tmp_path, 3, 1) as world:
        agent = world.agents[0]
        snapshot = agent.state.committed
        assert snapshot is not None
        good = Decode(
            epoch=agent.state.epoch, snapshot=snapshot, stripe=1, sources=(1, 2), targets=(0,), digests=(1, 2),
            counts=(1, 1),
        )  # fmt: skip
        for change in (
            {"targets": (1,)}, {"sources": (1,)}, {"sources": (1, 1)}, {"spares": (0,)}, {"targets": (7,)},
            {"stripe": 9}, {"counts": (1, 1000)}, {"digests": (1,)},
        ):  # fmt: skip
            agent.repair.decode(msgspec.structs.replace(good, **change))
            assert not agent.repair._decoding
        agent.repair.decode(good)
        assert agent.repair._decoding


class WorkerLink:
    """Where an agent sends what a worker asked for."""

    closed = False

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}

    def send(self, message: Any, payload: Any = None, done: Any = None) -> None:
        self.parts[message.index] = bytes(payload)
        if done is not None:
            done()


def test_remote_read_of_rotten_memory_delivers_what_was_sealed(tmp_path: Path) -> None:
    with team(tmp_path, 3, 1) as world:
        world.recover(2)
        world.until(world.whole, "all to be whole")
        reader, owner, link = world.agents[0], world.agents[1], WorkerLink()
        copy = owner.state.copy(owner.state.decided)
        assert copy is not None
        assert copy.data is not None
        owner.memory.data[copy.data].data[BUCKET + 9] ^= 0x10
        total = reader.memory.shape.chunk * 2
        reader.reads.for_worker(link, Read(epoch=2, snapshot=copy.snapshot, owner=1, first=0, count=total))  # type: ignore[arg-type]
        world.until(lambda: len(link.parts) == total, "all parts", 30.0)
        assert b"".join(link.parts[index] for index in range(total)) == bytes(world.content(1, 2))
