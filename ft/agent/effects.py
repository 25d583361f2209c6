"""Carry out protocol effects by dispatching each one to the responsible part of the agent."""

import dataclasses

from keepwarm.ft.agent.durable_writer import DurableWriter
from keepwarm.ft.agent.encoder import Encoder
from keepwarm.ft.agent.recovery_election import RecoveryElection
from keepwarm.ft.agent.remote_reads import Reads
from keepwarm.ft.agent.repair import Repair
from keepwarm.ft.agent.restores import RestoreAnswers
from keepwarm.ft.agent.shell import Arrived, Shell
from keepwarm.ft.agent.status import CommitTimes
from keepwarm.ft.agent.worker_sessions import WorkerSessions
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import AgentMessage, Committed, EpochBegan, Granted, Refused, Revoked, SnapshotId


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Parts of the agent that carry out effects."""

    sessions: WorkerSessions
    encoder: Encoder
    repair: Repair
    reads: Reads
    restores: RestoreAnswers
    election: RecoveryElection
    durable: DurableWriter | None
    commits: CommitTimes


class Effects:
    """Maps each effect type to its handler."""

    def __init__(self, shell: Shell, parts: Parts) -> None:
        self._shell, self._parts = shell, parts

    def carry_out(self, effect: events.Effect, arrived: Arrived | None) -> None:
        """Carry out one effect. `arrived` is the bucket delivered with the event that caused it, if any."""
        match effect:
            case events.Accumulate():
                assert arrived is not None
                self._parts.encoder.accumulate(effect, arrived)
            case events.Grant() | events.Refuse() | events.Revoke():
                self._tell_worker(effect)
            case (
                events.SendChunk() | events.StopCoding() | events.Verify() | events.ClearParity()
                | events.FinishParity() | events.Release()
            ):  # fmt: skip
                self._code(effect)
            case events.Send(to, message):
                self._send(to, message)
            case events.Commit(snapshot):
                self._committed(snapshot)
            case events.Log(level, text):
                self._shell.journal.write(level, text)
            case _:
                self._recover(effect)

    def _tell_worker(self, effect: events.Grant | events.Refuse | events.Revoke) -> None:
        sessions = self._parts.sessions
        match effect:
            case events.Grant(worker, snapshot, buffer, _):
                self._parts.commits.granted(snapshot, self._shell.clock())
                sessions.send(worker, Granted(snapshot=snapshot, buffer=buffer))
            case events.Refuse(worker, snapshot, reason):
                self._parts.commits.refused[reason.name] += 1
                sessions.send(worker, Refused(snapshot=snapshot, reason=reason.name, text=reason.value))
            case events.Revoke(worker, snapshot):
                sessions.send(worker, Revoked(snapshot=snapshot))

    def _code(self, effect: events.Effect) -> None:
        encoder = self._parts.encoder
        match effect:
            case events.SendChunk():
                encoder.send_chunk(effect)
            case events.Verify():
                encoder.verify(effect)
            case events.ClearParity():
                encoder.clear(effect)
            case events.FinishParity():
                encoder.finish(effect)
            case events.StopCoding(snapshot):
                encoder.stop(snapshot)
            case events.Release(snapshot, _, _):
                encoder.release(snapshot)
                self._parts.commits.forget(snapshot)

    def _recover(self, effect: events.Effect) -> None:
        parts = self._parts
        match effect:
            case events.BeginEpoch(epoch):
                parts.sessions.send_all(EpochBegan(epoch=epoch))
                parts.repair.begin_epoch()
                parts.election.began(epoch)
            case events.RequestEpoch(reason):
                parts.election.request(reason)
            case events.Decided(epoch, snapshot, whole):
                self._shell.journal.write("info", "decided", epoch=epoch, snapshot=snapshot, whole=whole)
                parts.restores.answer()
                if parts.durable is not None:
                    parts.durable.decided()
                parts.reads.answer_early()
            case events.FollowOrders(orders):
                parts.repair.follow(orders)
            case events.StartDecode(order):
                parts.repair.decode(order)
            case events.SendPart(to, snapshot, stripe, start):
                parts.repair.send_chunk(to, snapshot, stripe, start)

    def _send(self, to: int, message: AgentMessage) -> None:
        shell = self._shell
        if to == shell.config.slot:
            shell.route(to, shell.state.incarnation, message)
        elif (link := shell.network.links.get(to)) is not None:
            link.send(message)

    def _committed(self, snapshot: SnapshotId) -> None:
        parts, epoch, step = self._parts, snapshot.epoch, snapshot.step
        if epoch < self._shell.state.epoch:  # it was restored: workers and the durable tier have gone on from it
            self._shell.journal.write("info", "committed after it was restored", epoch=epoch, step=step)
            return
        seconds = parts.commits.committed(snapshot, self._shell.clock())
        self._shell.journal.write("info", "committed", epoch=epoch, step=step, seconds=round(seconds, 4))
        parts.sessions.send_all(Committed(snapshot=snapshot, seconds=seconds))
        if parts.durable is not None:
            parts.durable.committed(snapshot)
