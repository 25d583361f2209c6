"""Records of an agent's memory: the last complete one is read, and nothing else."""

import os
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from keepwarm.ft.keeper import memory_file
from keepwarm.ft.memory.records import Records, WorkerProcess
from keepwarm.ft.memory.shared_memory import started_at
from keepwarm.ft.protocol.kept_memory import kept, resumed
from keepwarm.ft.protocol.messages import ChunkRecord, SnapshotId, Undecodable
from keepwarm.ft.protocol.parity_placement import StripeGroup
from keepwarm.ft.protocol.state import Copy, Geometry, Mode, Phase, State, Topology, initial

GROUP = StripeGroup(0, (0, 1, 2), 1)
OLD, NEW = SnapshotId("run", 3, 7, "layout"), SnapshotId("run", 3, 8, "layout")
GEOMETRY = Geometry("layout", (2, 2), 2)
GOOD = {stripe: ChunkRecord(stripe, stripe + 1) for stripe in range(3)}


def copy(snapshot: SnapshotId, phase: Phase, buffer: int, **more: object) -> Copy:
    return Copy(snapshot, GEOMETRY, GROUP, phase, buffer, buffer, **more)  # type: ignore[arg-type]


EMPTY = initial("run", 1, 100, Topology((GROUP,)))
COMMITTED = copy(OLD, Phase.COMMITTED, 0, whole=True, good=GOOD, sums={0: (1, 2), 1: (3, 2**64 - 1)})
FULL = replace(
    EMPTY, mode=Mode.ACTIVE, epoch=3, copies=(COMMITTED, copy(NEW, Phase.FILLING, 1, writers=frozenset({0, 1}))),
    undecodable=frozenset({Undecodable(OLD, 1, (0, 2)), Undecodable(SnapshotId("run", 1, 1, "layout"), 0, (1,))}),
)  # fmt: skip


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = memory_file("records")
    yield descriptor
    os.close(descriptor)


def records(file: int, config: bytes = b"config") -> Records:
    return Records(os.dup(file), config)


def steps(file: int, config: bytes = b"config") -> list[int] | None:
    """Steps of the snapshots in the record."""
    found = records(file, config).read()
    return None if found is None else [each.snapshot.step for each in found.memory.copies]


def test_record_round_trip_gives_what_was_kept(file: int) -> None:
    records(file).write(FULL, {0: os.getpid(), 1: 2**22 + 1})
    found = records(file).read()
    assert found is not None
    assert found.memory == kept(FULL)
    started = started_at(os.getpid())
    assert started is not None
    assert found.workers == (WorkerProcess(0, os.getpid(), started),)


def test_new_file_has_no_record_and_is_not_damaged(file: int) -> None:
    found = records(file)
    assert found.read() is None
    assert not found.damaged


def test_record_torn_at_any_byte_leaves_the_one_before(file: int) -> None:
    writer = records(file)
    first = replace(FULL, copies=FULL.copies[:1])
    writer.write(first, {})
    writer.write(FULL, {})
    second = os.pread(file, 32, 0)
    second += os.pread(file, int.from_bytes(second[16:24], "little"), 32)
    assert steps(file) == [7, 8]
    for at in range(len(second)):
        os.pwrite(file, bytes([second[at] ^ 1]), at)
        assert steps(file) == [7], at
        os.pwrite(file, second[at : at + 1], at)
    third = records(file)
    third.read()
    third.write(first, {})  # takes the place of the older one
    assert steps(file) == [7]
    assert os.pread(file, len(second), 0) == second


@pytest.mark.parametrize("content", [b"x", bytes(64), b"kwrecord" + bytes(24), os.urandom(4096)])
def test_garbage_is_no_record_and_is_replaced(file: int, content: bytes) -> None:
    os.pwrite(file, content, 0)
    found = records(file)
    assert found.read() is None
    assert found.damaged
    found.write(FULL, {})
    assert steps(file) == [7, 8]


def test_record_of_another_configuration_is_none(file: int) -> None:
    records(file, b"another").write(FULL, {})
    found = records(file)
    assert found.read() is None
    assert found.damaged
    found.write(replace(FULL, copies=FULL.copies[:1]), {})
    assert steps(file) == [7]


def test_buckets_that_arrive_write_no_record(file: int) -> None:
    writer = records(file)
    writer.write(FULL, {})
    before = os.pread(file, 1 << 20, 1 << 40)
    coding = replace(FULL.copies[1], coding={(0, 1): None}, finishing=frozenset({1}))
    writer.write(replace(FULL, copies=(COMMITTED, coding)), {})
    assert os.fstat(file).st_size == (1 << 40) + len(before)
    assert os.pread(file, 1, 0) == b"\0"


# ---- what the next agent makes of it


def next_state(state: State, *alive: int) -> State:
    return resumed(initial("run", 1, 50, Topology((GROUP,))), kept(state), alive)


def test_next_agent_is_a_later_incarnation_that_joins_with_what_was_settled() -> None:
    state = next_state(FULL)
    assert (state.incarnation, state.mode, state.epoch) == (101, Mode.JOINING, 3)
    assert state.copies == (COMMITTED,)
    assert state.undecodable == {Undecodable(OLD, 1, (0, 2))}


def test_buffer_of_a_living_writer_stays_in_use() -> None:
    (_, draining) = next_state(FULL, 1, 5).copies
    assert (draining.phase, draining.writers, draining.data, draining.parity) == (
        Phase.DRAINING, frozenset({1}), 1, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "whole", "after"),
    [
        (Phase.SEALED, False, Phase.KEPT),
        (Phase.PREPARED, False, Phase.KEPT),
        (Phase.COMMITTED, True, Phase.COMMITTED),
        (Phase.COMMITTED, False, Phase.KEPT),
        (Phase.REBUILT, True, Phase.REBUILT),
        (Phase.KEPT, True, Phase.KEPT),
        (Phase.FILLING, False, None),
        (Phase.DRAINING, False, None),
        (Phase.DURABLE, True, None),
    ],
)
def test_what_could_be_restored_is_kept_and_the_rest_is_void(phase: Phase, whole: bool, after: Phase | None) -> None:
    found = next_state(replace(FULL, copies=(copy(NEW, phase, 1, whole=whole, good=GOOD),))).copies
    assert [each.phase for each in found] == ([] if after is None else [after])
    assert all(each.good == GOOD for each in found)


def test_copy_without_a_good_chunk_is_void() -> None:
    assert next_state(replace(FULL, copies=(copy(NEW, Phase.SEALED, 1),))).copies == ()
