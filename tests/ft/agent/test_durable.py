"""What agents write to disk is what was sealed, and two that publish the same checkpoint do not harm it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from keepwarm.ft.agent.durable_writer import DurableWriter, Outcome, Task
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.discovery.config import DurableConfig
from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import Contents, Piece, encode_contents
from keepwarm.ft.memory.sealed_data import SealedData
from keepwarm.ft.memory.shared_memory import bucket_sums
from keepwarm.ft.protocol.messages import SnapshotId
from tests.support.ft.team import BUCKET, LAYOUT, Team


class Writers(Team):
    """A team whose workers write parts that can become checkpoints."""

    def content(self, slot: int, step: int) -> Bytes:
        size = self.agents[slot].memory.shape.data_bytes
        data = np.random.default_rng((slot, step)).integers(0, 256, size, np.uint8)
        elements = (size - BUCKET) // 4
        piece = Piece(
            name="w", global_shape=(2 * elements,), offsets=(slot * elements,), shape=(elements,), dtype="F32"
        )
        contents = Contents(rank=slot, world=2, workers=1, size=size, entries=((piece, BUCKET),), meta=b"{}")
        head = encode_contents(contents)
        data[: len(head)] = np.frombuffer(head, np.uint8)
        return data

    def writer(self, slot: int) -> DurableWriter:
        writer = self.agents[slot].durable
        assert writer is not None
        return writer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def writers(tmp_path: Path, root: Path) -> Iterator[Writers]:
    made = Writers(tmp_path, [((0, 1), 1)], durable=DurableConfig(root=str(root), keep=5))
    try:
        made.until(made.connected, "all links")
        made.recover(1)
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("at", [0, 3, BUCKET + 7])
def test_durable_byte_that_rots_before_the_disk_has_it_is_not_published_and_repaired(
    writers: Writers, root: Path, at: int
) -> None:
    slow = threading.Event()
    writers.writer(1)._thread.submit(slow.wait, 60)
    writers.take(1)
    writers.until(lambda: writers.writer(1)._under_way, "the disk to be asked")
    copy = writers.agents[1].state.copy(writers.agents[1].state.committed)
    assert copy is not None
    assert copy.data is not None
    writers.agents[1].memory.data[copy.data].data[at] ^= 0x40
    slow.set()
    writers.until(lambda: writers.writer(1).report.failed, "the rotten bucket to be found")
    assert f"bucket {at // BUCKET} in memory does not match" in writers.writer(1).report.last_error
    assert publication.latest(root) is None
    writers.until(
        lambda: len(now.good) == 2 if (now := writers.agents[1].state.copy(copy.snapshot)) else False, "repair"
    )
    writers.check_committed(1)
    writers.writer(0).abandon()
    writers.until(lambda: not writers.writer(0).busy, "the other agent to give up")
    writers.take(2)
    writers.until(lambda: publication.latest(root), "the next checkpoint")
    manifest = publication.verify(publication.folder(root, 2))
    assert [(part.epoch, part.step) for part in manifest.parts] == [(1, 2), (1, 2)]


def test_durable_buffer_that_the_protocol_does_not_keep_is_not_written(writers: Writers, root: Path) -> None:
    slow = threading.Event()
    for slot in (0, 1):
        writers.writer(slot)._thread.submit(slow.wait, 60)
    writers.take(1)
    writers.until(lambda: all(writers.writer(slot)._under_way for slot in (0, 1)), "the disk to be asked")
    writers.take(2)
    for agent in writers.agents.values():
        second = DurableWriter(agent, DurableConfig(root=str(root / "other")))
        second.committed(SnapshotId("run", 1, 2, LAYOUT))  # the first snapshot is still kept for the disk
        second.tick()
        assert not second.busy
        second.close()
    assert not (root / "other").exists()
    slow.set()
    writers.until(lambda: publication.latest(root), "the first checkpoint")


def test_durable_save_waits_for_the_write_before_it(writers: Writers, root: Path) -> None:
    slow = threading.Event()
    for slot in (0, 1):
        writers.writer(slot)._thread.submit(slow.wait, 60)
    writers.take(1)
    writers.until(lambda: all(writers.writer(slot)._under_way for slot in (0, 1)), "the disk to be asked")
    writers.recover(2)
    for slot in (0, 1):
        writers.writer(slot).save(2)
    writers.turn()
    slow.set()
    writers.until(lambda: not any(writers.writer(slot).busy for slot in (0, 1)), "both writes")
    copy = writers.agents[0].state.copy(writers.agents[0].state.committed)
    assert copy is not None
    assert not copy.held
    assert [writers.writer(slot).report.written for slot in (0, 1)] in ([2, 2], [1, 2], [2, 1], [1, 1])
    assert publication.latest(root) == publication.folder(root, 1)


def written(writers: Writers, slot: int, tmp: Path, *, publishes: bool) -> Outcome:
    data = writers.content(slot, 7)
    task = Task(
        snapshot=SnapshotId("run", 1, 7, LAYOUT), tmp=tmp, publishes=publishes, abandoned=threading.Event()
    )  # fmt: skip
    return writers.writer(slot)._write(task, SealedData(data, bucket_sums(data, BUCKET), BUCKET))


def test_durable_two_publishers_of_one_checkpoint_both_succeed(writers: Writers, root: Path) -> None:
    for step in range(20):
        tmp = publication.staging(root, 1, step)
        with ThreadPoolExecutor(2) as pool:
            outcomes = list(pool.map(lambda slot, tmp=tmp: written(writers, slot, tmp, publishes=True), (0, 1)))
        assert outcomes == [Outcome(), Outcome()]
        publication.verify(publication.folder(root, 7))
        assert not tmp.exists()
    assert sum(writers.writer(slot).report.published for slot in (0, 1)) >= 20


def test_assembling_is_for_one_process_until_it_ends(tmp_path: Path) -> None:
    tmp = tmp_path / "tmp-1-7-agents"
    with publication.assembling(tmp) as mine:
        assert not mine
    tmp.mkdir()
    with publication.assembling(tmp) as mine:
        assert mine
        with publication.assembling(tmp) as other:
            assert not other
        tmp.rename(tmp_path / "iter_0000007")
    assert list((tmp_path / "iter_0000007").iterdir()) == []
