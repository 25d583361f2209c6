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
from ft.agent_coding import row_coder
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
        self.decided: events.Decided | None = None
        self._strands: dict[SnapshotId, set[Any]] = {}
        self._begun: dict[SnapshotId, float] = {}
        self.commits: collections.deque[Commit] = collections.deque(maxlen=REMEMBERED)

    def carry_out(self, effect: events.Effect) -> None:
        agent = self._agent
        match effect:
            case events.Grant(worker, snapshot, buffer, _):
                self._begun.setdefault(snapshot, time.monotonic())
                agent.sessions.send(worker, Granted(snapshot=snapshot, buffer=buffer))
            case events.Refuse(worker, snapshot, reason):
                agent.sessions.send(worker, Refused(snapshot=snapshot, reason=reason.name, text=reason.value))
            case events.Revoke(worker, snapshot):
                agent.sessions.send(worker, Revoked(snapshot=snapshot))
            case events.Send(to, message):
                self._send(to, message)
            case events.SendChunk():
                self._send_chunk(effect)
            case events.StopCoding(snapshot):
                agent.outbox.stop(lambda job: job.snapshot == snapshot)
                gone = self._strands.pop(snapshot, set())
                agent.pool.drop(lambda strand: strand in gone)
            case events.Verify(snapshot, buffer, sums):
                self._verify(snapshot, buffer, sums)
            case events.ClearParity(snapshot, stripe, buffer):
                strand = self._strand(snapshot, buffer, stripe)
                agent.pool.drop(lambda other: other == strand)
                agent.pool.order(strand, lambda: agent.memory.parity_chunk(buffer, stripe).fill(0))
            case events.Accumulate():
                self._accumulate(effect)
            case events.FinishParity(snapshot, stripe, buffer):
                chunk = agent.memory.parity_chunk(buffer, stripe)
                agent.pool.order(
                    self._strand(snapshot, buffer, stripe),
                    lambda: digest(bucket_sums(chunk, agent.config.bucket_bytes)),
                    lambda value: agent.dispatch(events.ParityVerified(snapshot, stripe, value)),
                )
            case events.Commit(snapshot):
                self._committed(snapshot)
            case events.Release(snapshot, _, _):
                self._begun.pop(snapshot, None)
                self._strands.pop(snapshot, None)
            case events.Decided():
                self.decided = effect
                agent.journal.write("info", "chosen", epoch=effect.epoch, snapshot=effect.snapshot, whole=effect.whole)
                self.answer_restores()
                if agent.durable is not None:
                    agent.durable.decided()
                agent.repair.take_orders()
                agent.reads.answer_early()
            case events.StartDecode(order):
                agent.repair.decode(order)
            case events.SendPart(to, snapshot, stripe, start):
                agent.repair.send_chunk(to, snapshot, stripe, start)
            case events.BeginEpoch(epoch):
                agent.sessions.send_all(EpochBegan(epoch=epoch))
                agent.election.began(epoch)
            case events.RequestEpoch(reason):
                agent.election.request(reason)
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
        agent.dispatch(events.Configured(geometry))
        shape = agent.memory.shape
        return Attached(
            epoch=max(agent.state.epoch, agent.registry.newest_epoch()),
            buffers=len(agent.memory.data),
            buffer_bytes=shape.data_bytes,
            bucket_bytes=shape.bucket_bytes,
            first=0,
        )

    def _strand(self, snapshot: SnapshotId, buffer: int, stripe: int) -> Any:
        """Work on one chunk of parity memory, whatever snapshot it is for, goes in order."""
        strand = ("parity", buffer, stripe)
        self._strands.setdefault(snapshot, set()).add(strand)
        return strand

    def _send(self, to: int, message: Any) -> None:
        agent = self._agent
        if to == agent.config.slot:
            agent.route(to, agent.state.incarnation, message)
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
            lambda index: agent.memory.data_bucket(effect.buffer, effect.first + index),
        )
        agent.outbox.add(link, Job(effect.snapshot, effect.stripe, pieces), replace=True)

    def _verify(self, snapshot: SnapshotId, buffer: int, sums: tuple[int, ...]) -> None:
        agent = self._agent
        size = agent.config.bucket_bytes
        data = agent.memory.data[buffer].data[: len(sums) * size]
        strand = ("data", buffer)
        self._strands.setdefault(snapshot, set()).add(strand)

        def read() -> tuple[int, ...]:
            seen = bucket_sums(data, size)
            return tuple(i for i, (a, b) in enumerate(zip(seen, sums, strict=True)) if a != b)

        agent.pool.order(strand, read, lambda bad: agent.dispatch(events.DataVerified(snapshot, bad)))

    def _accumulate(self, effect: events.Accumulate) -> None:
        agent = self._agent
        arrived, group = self.arrived, agent.state.group
        assert arrived is not None
        data, arrived.wanted = arrived.data, True
        row = group.parities(effect.stripe).index(agent.config.slot)
        coder = row_coder(group.data, group.parity, row)
        start = effect.index * agent.config.bucket_bytes
        target = agent.memory.parity_chunk(effect.buffer, effect.stripe)[start : start + len(data)]
        strand = self._strand(effect.snapshot, effect.buffer, effect.stripe)
        agent.pool.order(strand, functools.partial(coder.accumulate, target, effect.column, data), None, arrived.done)

    # ---- workers

    def _committed(self, snapshot: SnapshotId) -> None:
        agent = self._agent
        seconds = time.monotonic() - self._begun.pop(snapshot, time.monotonic())
        self.commits.append(Commit(epoch=snapshot.epoch, step=snapshot.step, committed=seconds))
        agent.journal.write("info", "committed", epoch=snapshot.epoch, step=snapshot.step, seconds=round(seconds, 4))
        agent.sessions.send_all(Committed(snapshot=snapshot, seconds=seconds))
        if agent.durable is not None:
            agent.durable.committed(snapshot)

    def answer_restores(self) -> None:
        """Answer the workers that wait for the choice of the present epoch, once it is known and whole here."""
        agent, decided = self._agent, self.decided
        if (
            decided is None
            or decided.epoch != agent.state.epoch
            or (decided.snapshot is not None and not decided.whole)
        ):
            return
        waiting = [session for session in agent.sessions.workers.values() if session.waits_for_epoch is not None]
        if not waiting:
            return
        if decided.snapshot is None or decided.buffer is None:
            answer = Restored(epoch=decided.epoch, snapshot=None, text=agent.registry.reason(decided.epoch))
        else:
            copy = agent.state.copy(decided.snapshot)
            if copy is None:
                agent.election.request(f"what epoch {decided.epoch} chose has been replaced, and a worker asks for it")
                return
            sums = self._sums(copy)
            answer = Restored(epoch=decided.epoch, snapshot=decided.snapshot, buffer=decided.buffer, sums=sums)
        for session in waiting:
            if session.waits_for_epoch is not None and session.waits_for_epoch <= decided.epoch:
                session.waits_for_epoch = None
                session.link.send(answer)

    def _sums(self, copy: Copy) -> tuple[int, ...]:
        """Checksums of all buckets of a data buffer."""
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
            incarnation=state.incarnation,
            epoch=state.epoch,
            mode=state.mode.value,
            group=state.group.members,
            parity=state.group.parity,
            peers=tuple(sorted(agent.network.links)),
            workers=tuple(sorted(agent.sessions.workers)),
            buffers=len(agent.memory.data),
            buffer_bytes=agent.memory.shape.data_bytes,
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
