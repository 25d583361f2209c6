"""A restored step is one coherent step or none, and never older than the newest fully prepared one in reach."""

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from msgspec.structs import replace

from keepwarm.ft.protocol import coding, events
from keepwarm.ft.protocol.state import Phase
from keepwarm.ft.protocol.transition import Transition
from tests.support.ft.campaign import WEIGHTS, campaign, heal, move
from tests.support.ft.cluster import Broken, Cluster

SHAPES = {
    "2 groups (2,2)": ((4, 4), 2, False),
    "2 groups (1,1), disk": ((2, 2), 1, True),
    "unequal groups, m=1": ((3, 4), 1, False),
    "(3,1), disk": ((4,), 1, True),
    "1 node": ((1,), 0, True),
}


class Machine(RuleBasedStateMachine):
    """hypothesis chooses the moves and shrinks what breaks; every recovery checks the invariant."""

    cluster: Cluster
    slot = st.integers(0, 7)
    place = st.integers(0, 99)

    @initialize(shape=st.sampled_from(sorted(SHAPES)))
    def start(self, shape: str) -> None:
        sizes, m, durable = SHAPES[shape]
        self.cluster = Cluster(sizes, m, durable=durable)

    def _slot(self, slot: int) -> int:
        return slot % self.cluster.topology.slots

    @rule(slot=slot, worker=st.integers(0, 1), wait=st.booleans())
    def offer(self, slot: int, worker: int, wait: bool) -> None:
        self.cluster.offer(self._slot(slot), worker, wait)

    @rule(slot=slot, worker=st.integers(0, 1), cancel=st.sampled_from((False, False, False, True)))
    def write(self, slot: int, worker: int, cancel: bool) -> None:
        self.cluster.write(self._slot(slot), worker, cancel)

    @rule(slot=slot, worker=st.integers(0, 1))
    def worker_dies(self, slot: int, worker: int) -> None:
        self.cluster.kill_worker(self._slot(slot), worker)

    @precondition(lambda self: self.cluster.packets)
    @rule(place=place, keep=st.booleans(), damage=st.booleans())
    def deliver(self, place: int, keep: bool, damage: bool) -> None:
        self.cluster.deliver(place, keep=keep, damage=damage)

    @precondition(lambda self: self.cluster.packets)
    @rule(place=place)
    def lose_packet(self, place: int) -> None:
        self.cluster.drop_packet(place)

    @rule(slot=slot, place=place)
    def compute(self, slot: int, place: int) -> None:
        self.cluster.work(self._slot(slot), place)

    @rule()
    def whole_snapshot(self) -> None:
        self.cluster.round()

    @rule()
    def quiet(self) -> None:
        self.cluster.drain()

    @rule(one=slot, other=slot)
    def reconnect(self, one: int, other: int) -> None:
        self.cluster.reconnect(self._slot(one), self._slot(other))

    @rule(one=slot, other=slot)
    def away(self, one: int, other: int) -> None:
        self.cluster.away(self._slot(one), self._slot(other))

    @rule(slot=slot)
    def agent_dies(self, slot: int) -> None:
        self.cluster.crash(self._slot(slot))

    @rule(slot=slot, place=place, byte=st.integers(0, 63))
    def byte_rots(self, slot: int, place: int, byte: int) -> None:
        self.cluster.rot(self._slot(slot), place, byte)

    @rule(slot=slot)
    def scrub(self, slot: int) -> None:
        self.cluster.scrub(self._slot(slot))

    @rule(slot=slot)
    def disk(self, slot: int) -> None:
        self.cluster.durable(self._slot(slot))

    @rule(place=place)
    def rebuild(self, place: int) -> None:
        self.cluster.rebuild(place)

    @rule(late=st.sets(slot, max_size=2))
    def recover(self, late: set[int]) -> None:
        self.cluster.recover(tuple(sorted({self._slot(slot) for slot in late})))

    def teardown(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.recover(())
            heal(self.cluster)


def _machine(examples: int, steps: int) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=quiet),
    )


def test_protocol_state_machine_keeps_invariants() -> None:
    _machine(25, 30)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_protocol_state_machine_at_length_keeps_invariants() -> None:
    _machine(1500, 60)


@pytest.mark.parametrize("shape", SHAPES)
def test_protocol_campaigns_keep_invariants(shape: str) -> None:
    sizes, m, durable = SHAPES[shape]
    commits = sum(campaign(seed, lambda: Cluster(sizes, m, durable=durable)).committed for seed in range(6))
    assert commits >= 6 * 3 * sum(sizes)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shape", SHAPES)
def test_protocol_campaigns_at_length_keep_invariants(shape: str) -> None:
    sizes, m, durable = SHAPES[shape]
    start = random.SystemRandom().randrange(1 << 30)
    for seed in range(start, start + 300):
        print(f"seed {seed}")
        campaign(seed, lambda: Cluster(sizes, m, durable=durable), moves=200)


# ---- the checks have teeth: a protocol with a known defect is caught


def _commit_after_one_group(patch: pytest.MonkeyPatch) -> None:
    learn = Transition.learn

    def eager(self: Transition, snapshot: Any, groups: frozenset[int], sender: int | None = None) -> None:
        learn(self, snapshot, frozenset(range(len(self.state.topology.groups))), sender)

    patch.setattr(Transition, "learn", eager)


def _reuse_slots_when_sealed(patch: pytest.MonkeyPatch) -> None:
    sealed = coding.sealed

    def early(transition: Transition, copy: Any) -> None:
        sealed(transition, copy)
        for other in transition.state.copies:
            if other.committed:
                transition.drop(other)

    patch.setattr(coding, "sealed", early)


def _accumulate_repeats(patch: pytest.MonkeyPatch) -> None:
    on_bucket = coding.on_bucket

    def twice(transition: Transition, event: events.BucketArrived) -> None:
        bucket, copy = event.bucket, transition.state.copy(event.bucket.snapshot)
        progress = copy.coding.get((bucket.stripe, event.sender)) if copy else None
        on_bucket(transition, event)
        if copy and copy.open and copy.parity is not None and progress and bucket.index < progress.next:
            column = copy.group.sources(bucket.stripe).index(event.sender)
            transition.emit(
                events.Accumulate(copy.snapshot, bucket.stripe, event.sender, column, bucket.index, copy.parity)
            )

    patch.setattr(coding, "on_bucket", twice)


def _take_damaged_buckets(patch: pytest.MonkeyPatch) -> None:
    on_bucket = coding.on_bucket
    patch.setattr(
        coding, "on_bucket", lambda transition, event: on_bucket(transition, dataclasses.replace(event, intact=True))
    )


def _prepared_without_the_group(patch: pytest.MonkeyPatch) -> None:
    def alone(transition: Transition, copy: Any) -> None:
        if copy.phase is Phase.SEALED and copy.members:
            transition.put(replace(copy, phase=Phase.PREPARED))
            transition.learn(copy.snapshot, frozenset({copy.group.index}))

    patch.setattr(coding, "check_prepared", alone)


def _write_into_a_taken_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transition, "free_buffers", lambda self: (0, 0 if self.state.parity_buffers else None))


DEFECTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "commit after one group": _commit_after_one_group,
    "reuse slots when sealed": _reuse_slots_when_sealed,
    "accumulate repeats": _accumulate_repeats,
    "take damaged buckets": _take_damaged_buckets,
    "prepared without the group": _prepared_without_the_group,
    "write into a taken slot": _write_into_a_taken_slot,
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_protocol_planted_defects_are_caught(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    DEFECTS[defect](monkeypatch)
    with pytest.raises((Broken, AssertionError)):
        _many_campaigns()


def _many_campaigns() -> None:
    for seed in range(20):
        for sizes, m, durable in SHAPES.values():
            campaign(seed, functools.partial(Cluster, sizes, m, durable=durable))


def test_protocol_same_seed_gives_same_history() -> None:
    one, two = (campaign(7, lambda: Cluster((4, 4), 2)) for _ in range(2))
    assert one.history == two.history
    assert [node.state for node in one.nodes] == [node.state for node in two.nodes]


@pytest.mark.parametrize("name", WEIGHTS)
def test_protocol_every_move_is_possible_at_any_time(name: str) -> None:
    cluster, rng = Cluster((3,), 1), random.Random(1)
    for _ in range(4):
        move(cluster, name, rng)
        cluster.round()
    cluster.recover(())
