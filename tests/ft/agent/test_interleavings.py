"""Nobody waits in vain: links and agents are lost at the moments that hurt, and every rank still gets its bytes."""

import functools
import selectors
import threading
from pathlib import Path
from typing import Any

import pytest

from keepwarm.ft.agent import recovery_election, repair
from keepwarm.ft.agent.outbox import Outbox
from keepwarm.ft.agent.workpool import WorkPool
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import Chosen, Decode, Fetch, Inventory, Part, Proposal, Read, SnapshotId, Vote
from keepwarm.ft.protocol.state import Mode
from keepwarm.ft.transport.link import Link
from tests.support.ft.team import LAYOUT, Team, team


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "RETRY", 0.1)


def replace(team: Team, *slots: int) -> None:
    for slot in slots:
        team.kill(slot)
    for slot in slots:
        team.start(slot)


def on_send(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Call `act(link, message)` before a message is queued; what it answers with true is lost, as with its link."""
    original = Link.send

    def send(link: Link, message: Any, payload: Any = None, done: Any = None, *rest: Any, **more: Any) -> None:
        if not act(link, message):
            original(link, message, payload, done, *rest, **more)
        elif done is not None:
            done()

    monkeypatch.setattr(Link, "send", send)


def test_decoder_rebuilds_data_and_parity_of_one_stripe(tmp_path: Path) -> None:
    with team(tmp_path, 4, 2) as world:
        replace(world, 0, 1)
        world.recover(2)
        choice = world.agents[2].election.choice
        assert choice is not None
        places = [(decoder, order.stripe) for decoder, order in choice.orders]
        assert len(places) > len(set(places)), "the plan has no decoder with two orders for a stripe"
        world.check(2)


@pytest.mark.parametrize("lost", [Part, Fetch, Decode, Chosen, Proposal, Vote, Inventory])
def test_recovery_link_broken_once_on_each_side_completes(
    tmp_path: Path, lost: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first message of a kind on every link is lost with the link."""
    with team(tmp_path, 3, 1) as world:
        replace(world, 0)
        broken: set[tuple[int, int]] = set()

        def act(link: Link, message: Any) -> bool:
            key = (link.mine.slot, link.slot)
            if not isinstance(message, lost) or key in broken or link.closed:
                return False
            broken.add(key)
            link.close("cut by the test")
            return True

        on_send(monkeypatch, act)
        world.recover(2)
        world.check(2)
        assert broken or lost is Decode, "nothing was lost"  # orders travel only when someone asks again


def test_recovery_parts_before_decision_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No decision is ever sent: an agent learns of the choice from what others do about it."""
    with team(tmp_path, 3, 1) as world:
        replace(world, 2)
        monkeypatch.setattr(recovery_election, "SETTLE_POLL_INTERVAL_S", 1e6)
        on_send(monkeypatch, lambda link, message: isinstance(message, Chosen) and link.slot == 2)
        for agent in world.agents.values():
            agent.election._next_look = 0.0
        world.recover(2)
        world.check(2)


def test_recovery_elected_agent_dies_after_choice_next_epoch_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells nobody; and as it was needed to decode, the next epoch goes without it."""
    with team(tmp_path, 4, 2, silence=0.5, inventory_deadline=1.0) as world:
        replace(world, 3)
        monkeypatch.setattr(recovery_election, "CONNECTED_GRACE", 0.5)
        died: list[int] = []
        world.until(world.connected, "all links")
        chooser = world.agents[0]
        original = chooser.registry.choose

        def choose(choice: Any) -> Any:
            written = original(choice)
            died.append(0)
            on_send(monkeypatch, lambda link, message: link.mine.slot == 0)
            return written

        monkeypatch.setattr(chooser.registry, "choose", choose)
        world.begin(2)
        world.until(lambda: died, "the choice")
        world.kill(0)
        world.until(lambda: world.recovered(2), "the others")
        world.check(2)
        world.until(lambda: world.agents[1].registry.choice(2), "its file")
        first = world.agents[1].registry.choice(2)
        assert first is not None
        assert any(decoder == 0 or 0 in order.sources for decoder, order in first.orders)
        assert world.agents[1].state.epoch > 2


def test_recovery_decoder_dies_after_choice_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with team(tmp_path, 4, 2, silence=0.5, inventory_deadline=1.0) as world:
        replace(world, 3)
        monkeypatch.setattr(recovery_election, "CONNECTED_GRACE", 0.5)
        on_send(monkeypatch, lambda link, message: isinstance(message, Part) and link.mine.slot == 1)
        world.begin(2)
        world.until(lambda: world.agents[3].state.decided_epoch == 2, "the choice")
        assert not world.recovered(2)
        world.kill(1)
        world.until(lambda: world.recovered(2), "the others")
        world.check(2)


def test_recovery_damaged_parts_are_requested_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with team(tmp_path, 4, 2) as world:
        replace(world, 0, 1)
        damaged: set[tuple[int, int, int]] = set()
        for slot, agent in world.agents.items():
            original = agent.repair.part

            def part(part: Part, payload: Any, slot: int = slot, original: Any = original) -> None:
                key = (slot, part.stripe, part.owner)
                if payload is not None and part.size and part.index == 1 and key not in damaged:
                    damaged.add(key)
                    payload[0] ^= 255
                original(part, payload)

            monkeypatch.setattr(agent.repair, "part", part)
        world.recover(2)
        world.check(2)
        assert {slot for slot, _, _ in damaged} == {0, 1, 2, 3}


def test_recovery_bucket_damaged_after_it_was_whole_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bucket of the first pass and the first one of the second come damaged."""
    with team(tmp_path, 3, 1) as world:
        replace(world, 0)
        target = world.agents[0]
        original, seen = target.repair.part, dict[tuple[int, int], int]()

        def part(part: Part, payload: Any) -> None:
            key = part.stripe, part.index
            seen[key] = seen.get(key, 0) + (payload is not None)
            if payload is not None and (part.index, seen[key]) in ((2, 1), (0, 2)):
                payload[0] ^= 255
            original(part, payload)

        monkeypatch.setattr(target.repair, "part", part)
        world.recover(2)
        world.check(2)
        assert max(seen.values()) > 2


def test_recovery_silent_source_does_not_hold_up_the_links_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links are read on although a bucket that is decoded with theirs does not come, and the next one is not lost."""
    with team(tmp_path, 4, 1, silence=2.0) as world:
        replace(world, 0)
        silent = [True]
        on_send(monkeypatch, lambda link, m: isinstance(m, Part) and link.mine.slot == m.owner == 1 and silent[0])
        world.begin(2, 1)

        def paused() -> bool:
            return any(link.paused for agent in world.agents.values() for link in agent.network.links.values())

        world.until(paused, "a link that waits")
        world.until(lambda: not paused(), "all links to be read")
        silent.clear()
        silent.append(False)
        world.until(lambda: world.recovered(2), "the epoch")
        world.check(2)


class WorkerLink:
    """Where an agent sends what a worker asked for."""

    closed = False

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}

    def send(self, message: Any, payload: Any = None, done: Any = None) -> None:
        self.parts[message.index] = bytes(payload)
        if done is not None:
            done()


def test_remote_read_damage_and_broken_link_delivers_every_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part comes damaged, the link breaks after the second, and the owner's data are rebuilt meanwhile."""
    with team(tmp_path, 3, 1) as world:
        replace(world, 1)
        reader = world.agents[0]
        original, seen, link = reader.reads.part, [], WorkerLink()

        def part(part: Part, payload: Any) -> None:
            seen.append(part.index)
            if len(seen) == 1:
                payload[0] ^= 255
            original(part, payload)
            if len(seen) == 2:
                world.cut(0, 1)

        monkeypatch.setattr(reader.reads, "part", part)
        world.begin(2)
        world.until(lambda: reader.state.decided is not None and reader.state.decided_epoch == 2, "the choice")
        decided = reader.state.decided
        assert decided is not None
        total = reader.memory.shape.chunk * 2
        reader.reads.for_worker(link, Read(epoch=2, snapshot=decided, owner=1, first=0, count=total))  # type: ignore[arg-type]
        world.until(lambda: len(link.parts) == total, "all parts")
        assert b"".join(link.parts[index] for index in range(total)) == bytes(world.content(1, 2))
        assert seen.count(0) > 1
        assert not reader.reads.awaited


def test_remote_read_slow_worker_has_few_buckets_under_way(tmp_path: Path) -> None:
    class SlowWorkerLink(WorkerLink):
        def send(self, message: Any, payload: Any = None, done: Any = None) -> None:
            super().send(message, payload)
            taken.append(done)

    with team(tmp_path, 3, 1, chunk=8) as world:
        world.recover(2)
        reader, link, taken = world.agents[0], SlowWorkerLink(), list[Any]()
        decided = reader.state.decided
        assert decided is not None
        reader.reads.for_worker(link, Read(epoch=2, snapshot=decided, owner=1, first=0, count=16))  # type: ignore[arg-type]
        for expected in range(2, 17):
            world.until(functools.partial(link.parts.__contains__, expected - 1), "the next bucket")
            for _ in range(20):
                world.turn()
            assert len(link.parts) == expected
            taken.pop(0)()
        assert b"".join(link.parts[index] for index in range(16)) == bytes(world.content(1, 2))


def test_remote_read_outlives_next_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Owner and reader are neither of one group nor neighbours: the link is kept for the read's sake."""
    world = Team(tmp_path, [((0, 1), 1), ((2, 3), 1), ((4, 5), 1), ((6, 7), 1)])
    try:
        world.until(world.connected, "all links")
        world.recover(1)
        world.take(1)
        reader, link = world.agents[7], WorkerLink()
        snapshot = reader.state.committed
        assert snapshot is not None
        world.cut(5, 7)
        reader.reads.for_worker(link, Read(epoch=1, snapshot=snapshot, owner=5, first=0, count=3))  # type: ignore[arg-type]
        reader.connect_peers(everyone=False)
        world.until(lambda: len(link.parts) == 3, "all parts")
    finally:
        world.close()


def test_recovery_agent_excluded_from_choice_joins_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with team(tmp_path, 4, 2) as world:
        late = 3, 2
        on_send(monkeypatch, lambda link, m: isinstance(m, Inventory) and (link.mine.slot, m.epoch) == late)
        with pytest.MonkeyPatch.context() as hasty:
            # For this choice only: with no grace at all, every choice leaves the slowest out.
            hasty.setattr(recovery_election, "CONNECTED_GRACE", 0.0)
            hasty.setattr(recovery_election, "KNOWN_GRACE", 0.0)
            world.begin(2)
            world.until(lambda: world.agents[0].state.decided_epoch == 2, "the choice")
        assert world.agents[3].state.mode is Mode.RECOVERING
        world.until(lambda: world.recovered(3), "the next choice")
        world.check(2)


def test_recovery_new_epoch_while_buckets_are_queued_frees_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is coded is dropped, the buffers come back, and no link stays paused."""
    with team(tmp_path, 3, 1, chunk=8) as world:
        held: list[Any] = []
        target = world.agents[1]
        order = target.pool.order

        def hold(strand: Any, work: Any, then: Any = None, always: Any = None) -> None:
            if always is not None and not held:
                # The first accumulation of the strand begins when the test says so: the others queue behind it.
                gate = threading.Event()
                held.append(gate)
                order(strand, lambda: gate.wait(20))
            order(strand, work, then, always)

        monkeypatch.setattr(target.pool, "order", hold)
        world.write(3)
        links = target.network.links.values()
        world.until(lambda: held and any(link.paused for link in links), "a paused link")
        target.election.begin(2)
        held[0].set()
        world.until(lambda: world.recovered(2), "the epoch")
        assert not any(link.paused for link in target.network.links.values())
        world.take(4)


def test_workpool_dropped_strand_is_released(tmp_path: Path) -> None:
    selector = selectors.DefaultSelector()
    pool, seen, gate = WorkPool(selector, 1), [], threading.Event()
    pool.order("strand", gate.wait, lambda _: seen.append("then"), lambda: seen.append("first"))
    pool.order("strand", lambda: seen.append("work"), lambda _: seen.append("then"), lambda: seen.append("second"))
    pool.drop(lambda strand: strand == "strand")
    assert seen == []
    gate.set()
    while len(seen) < 2:
        for key, mask in selector.select(5):
            key.data.ready(mask)
    assert sorted(seen) == ["first", "second"]
    pool.close()
    selector.close()


def test_outbox_closed_link_is_forgotten() -> None:
    class Closed:
        closed, open = True, False

    outbox = Outbox()
    outbox.add(Closed(), None)  # type: ignore[arg-type]
    assert outbox.idle


def test_snapshot_dead_member_does_not_block_waiting_workers(tmp_path: Path) -> None:
    """The ranks of its node, which would start it again, may themselves wait for those who wait for a slot."""
    with team(tmp_path, 4, 2, silence=0.5) as world:
        world.kill(0)
        world.write(3)
        for agent in world.agents.values():
            agent.dispatch(events.WorkerOpened(0, SnapshotId("run", 1, 4, LAYOUT)))
        assert all(agent.state.waiting for agent in world.agents.values())
        world.until(lambda: not any(agent.state.waiting for agent in world.agents.values()), "refusals", 30.0)
        world.until(lambda: all(agent.state.away for agent in world.agents.values()), "all to know", 30.0)
        for agent in world.agents.values():
            agent.dispatch(events.WorkerOpened(0, SnapshotId("run", 1, 5, LAYOUT)))
            assert not agent.state.waiting
        world.start(0)
        world.until(lambda: world.recovered(2), "the next epoch")
        world.check(2)
        world.take(6)
