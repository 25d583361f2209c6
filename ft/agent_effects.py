"""Carries out what the protocol wants done: memory, threads, links and answers to workers."""

import collections
import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import xxhash

from ft import events
from ft.agent_chunks import Job, chunk_pieces
from ft.buffers import bucket_sums
from ft.contents import Bytes
from ft.inspect import Commit, Held, Status
from ft.messages import (
    Attached,
    Bucket,
    Committed,
    EpochBegan,
    Granted,
    Refused,
    Restored,
    Revoked,
    SnapshotId,
    digest,
)  # fmt: skip
from ft.state import Copy, Geometry

if TYPE_CHECKING:
    from ft.agent import Agent

REMEMBERED = 32
"""Commits whose timings are kept."""


@dataclasses.dataclass
class Arrived:
    """A bucket in a receive buffer; who takes it (`wanted`) sees to it that `done` is called when it is free."""

    data: Bytes
    done: Callable[[], None]
    wanted: bool = False


class Effects:
    """One method per effect that touches the world."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent
        self.arrived: Arrived | None = None
        """The bucket that belongs to the event being carried out."""
        self.pinned: events.Pinned | None = None
        self._strands: dict[SnapshotId, set[Any]] = {}
        self._begun: dict[SnapshotId, float] = {}
        self.commits: collections.deque[Commit] = collections.deque(maxlen=REMEMBERED)

    def carry_out(self, effect: events.Effect) -> None:
        agent = self._agent
        match effect:
            case events.Grant(worker, snapshot, slot, _):
                self._begun.setdefault(snapshot, time.monotonic())
                agent.desk.send(worker, Granted(snapshot=snapshot, slot=slot))
            case events.Refuse(worker, snapshot, reason):
                agent.desk.send(worker, Refused(snapshot=snapshot, reason=reason.name, text=reason.value))
            case events.Revoke(worker, snapshot):
                agent.desk.send(worker, Revoked(snapshot=snapshot))
            case events.Send(to, message):
                self._send(to, message)
            case events.SendChunk():
                self._send_chunk(effect)
            case events.StopCoding(snapshot):
                agent.outbox.stop(lambda job: job.snapshot == snapshot)
                gone = self._strands.pop(snapshot, set())
                agent.crew.drop(lambda strand: strand in gone)
            case events.Verify(snapshot, slot, sums):
                self._verify(snapshot, slot, sums)
            case events.ClearParity(snapshot, stripe, slot):
                strand = self._strand(snapshot, slot, stripe)
                agent.crew.drop(lambda other: other == strand)
                agent.crew.order(strand, lambda: agent.memory.parity_chunk(slot, stripe).fill(0))
            case events.Accumulate():
                self._accumulate(effect)
            case events.FinishParity(snapshot, stripe, slot):
                chunk = agent.memory.parity_chunk(slot, stripe)
                agent.crew.order(
                    self._strand(snapshot, slot, stripe),
                    lambda: digest(bucket_sums(chunk, agent.config.bucket_bytes)),
                    lambda value: agent.feed(events.ParityVerified(snapshot, stripe, value)),
                )
            case events.Commit(snapshot):
                self._committed(snapshot)
            case events.Release(snapshot, _, _):
                self._begun.pop(snapshot, None)
                self._strands.pop(snapshot, None)
            case events.Pinned():
                self.pinned = effect
                agent.journal.write("info", "chosen", epoch=effect.epoch, snapshot=effect.snapshot, whole=effect.whole)
                self.answer_restores()
                if agent.durable is not None:
                    agent.durable.pinned()
                agent.repair.take_orders()
                agent.reads.answer_early()
            case events.StartDecode(order):
                agent.repair.decode(order)
            case events.SendPart(to, snapshot, stripe, start):
                agent.repair.send_chunk(to, snapshot, stripe, start)
            case events.BeginEpoch(epoch):
                agent.desk.send_all(EpochBegan(epoch=epoch))
                agent.settler.began(epoch)
            case events.RequestEpoch(reason):
                agent.settler.request(reason)
            case events.Log(level, text):
                agent.journal.write(level, text)

    # ---- memory for what arrives

    def new_buffer(self) -> Bytes:
        buffer = np.empty(self._agent.config.bucket_bytes, np.uint8)
        buffer.fill(0)  # fault it in, once
        return buffer

    @staticmethod
    def intact(message: Bucket, payload: memoryview) -> bool:
        return xxhash.xxh3_64_intdigest(payload) == message.sum

    # ---- coding

    def configured(self, geometry: Geometry) -> Attached:
        """All workers of a layout are here."""
        agent = self._agent
        agent.feed(events.Configured(geometry))
        shape = agent.memory.shape
        return Attached(
            epoch=max(agent.state.epoch, agent.registry.newest_epoch()),
            slots=len(agent.memory.data),
            slot_bytes=shape.data_bytes,
            bucket_bytes=shape.bucket_bytes,
            first=0,
        )

    def _strand(self, snapshot: SnapshotId, slot: int, stripe: int) -> Any:
        """Work on one chunk of parity memory, whatever snapshot it is for, goes in order."""
        strand = ("parity", slot, stripe)
        self._strands.setdefault(snapshot, set()).add(strand)
        return strand

    def _send(self, to: int, message: Any) -> None:
        agent = self._agent
        if to == agent.config.slot:
            agent.deliver(to, agent.state.boot, message)
        elif (link := agent.network.links.get(to)) is not None:
            link.send(message)

    def _send_chunk(self, effect: events.SendChunk) -> None:
        agent = self._agent
        link = agent.network.links.get(effect.to)
        if link is None:
            return
        pieces = chunk_pieces(
            effect.snapshot,
            effect.stripe,
            effect.sums,
            effect.start,
            lambda index: agent.memory.data_bucket(effect.slot, effect.first + index),
        )
        agent.outbox.add(link, Job(effect.snapshot, effect.stripe, pieces), replace=True)

    def _verify(self, snapshot: SnapshotId, slot: int, sums: tuple[int, ...]) -> None:
        agent = self._agent
        size = agent.config.bucket_bytes
        data = agent.memory.data[slot].data[: len(sums) * size]
        strand = ("data", slot)
        self._strands.setdefault(snapshot, set()).add(strand)

        def read() -> tuple[int, ...]:
            seen = bucket_sums(data, size)
            return tuple(i for i, (a, b) in enumerate(zip(seen, sums, strict=True)) if a != b)

        agent.crew.order(strand, read, lambda bad: agent.feed(events.DataVerified(snapshot, bad)))

    def _accumulate(self, effect: events.Accumulate) -> None:
        agent = self._agent
        arrived, group = self.arrived, agent.state.group
        assert arrived is not None
        data, arrived.wanted = arrived.data, True
        row = agent.codec.row(group.parities(effect.stripe).index(agent.config.slot))
        start = effect.index * agent.config.bucket_bytes
        target = agent.memory.parity_chunk(effect.slot, effect.stripe)[start : start + len(data)]
        strand = self._strand(effect.snapshot, effect.slot, effect.stripe)
        agent.crew.order(strand, functools.partial(row.accumulate, target, effect.column, data), None, arrived.done)

    # ---- workers

    def _committed(self, snapshot: SnapshotId) -> None:
        agent = self._agent
        seconds = time.monotonic() - self._begun.pop(snapshot, time.monotonic())
        self.commits.append(Commit(epoch=snapshot.epoch, step=snapshot.step, committed=seconds))
        agent.journal.write("info", "committed", epoch=snapshot.epoch, step=snapshot.step, seconds=round(seconds, 4))
        agent.desk.send_all(Committed(snapshot=snapshot, seconds=seconds))
        if agent.durable is not None:
            agent.durable.committed(snapshot)

    def answer_restores(self) -> None:
        """Answer the workers that wait for the choice of the present epoch, once it is known and whole here."""
        agent, pinned = self._agent, self.pinned
        if pinned is None or pinned.epoch != agent.state.epoch or (pinned.snapshot is not None and not pinned.whole):
            return
        waiting = [guest for guest in agent.desk.workers.values() if guest.waits_for_epoch is not None]
        if not waiting:
            return
        if pinned.snapshot is None or pinned.slot is None:
            answer = Restored(epoch=pinned.epoch, snapshot=None, text=agent.registry.reason(pinned.epoch))
        else:
            copy = agent.state.copy(pinned.snapshot)
            if copy is None:
                agent.settler.request(f"what epoch {pinned.epoch} chose has been replaced, and a worker asks for it")
                return
            sums = self._sums(copy)
            answer = Restored(epoch=pinned.epoch, snapshot=pinned.snapshot, slot=pinned.slot, sums=sums)
        for guest in waiting:
            if guest.waits_for_epoch is not None and guest.waits_for_epoch <= pinned.epoch:
                guest.waits_for_epoch = None
                guest.link.send(answer)

    def _sums(self, copy: Copy) -> tuple[int, ...]:
        """Checksums of all buckets of a data slot."""
        stripes = copy.group.data_stripes(self._agent.config.slot)
        return tuple(value for stripe in stripes for value in copy.chunk_sums(self._agent.config.slot, stripe))

    # ---- what `keepwarm snapshots` shows

    def status(self) -> Status:
        agent, state = self._agent, self._agent.state
        process = psutil.Process().memory_info()
        return Status(
            run=state.run,
            slot=state.slot,
            pid=os.getpid(),
            boot=state.boot,
            epoch=state.epoch,
            mode=state.mode.value,
            group=state.group.members,
            parity=state.group.parity,
            peers=tuple(sorted(agent.network.links)),
            workers=tuple(sorted(agent.desk.workers)),
            slots=len(agent.memory.data),
            slot_bytes=agent.memory.shape.data_bytes,
            memory_bytes=agent.memory.bytes,
            resident_bytes=process.rss - process.shared,
            held=tuple(_held(copy) for copy in state.copies),
            committed=state.committed.age if state.committed is not None else None,
            commits=tuple(self.commits),
            durable=dataclasses.asdict(agent.durable.report) if agent.durable is not None else {},
            scrub={"checked": agent.scrub.checked, "damaged": agent.scrub.damaged},
        )


def _held(copy: Copy) -> Held:
    return Held(
        epoch=copy.snapshot.epoch,
        step=copy.snapshot.step,
        layout=copy.snapshot.layout,
        phase=copy.phase.value,
        data=copy.data,
        parity=copy.parity,
        chunks={stripe: f"{record.digest:016x}" for stripe, record in sorted(copy.good.items())},
    )
