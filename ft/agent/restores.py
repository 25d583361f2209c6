"""Answer workers that ask what an epoch restores, once it is decided and this node has all of its data."""

from keepwarm.ft.agent.recovery_election import RecoveryElection
from keepwarm.ft.agent.shell import Shell
from keepwarm.ft.agent.worker_sessions import WorkerSessions
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import Restored


class RestoreAnswers:
    """Workers wait in their sessions (`waits_for_epoch`). `answer` is called whenever that wait may be over."""

    def __init__(self, shell: Shell, sessions: WorkerSessions, election: RecoveryElection) -> None:
        self._shell, self._sessions, self._election = shell, sessions, election

    def answer(self) -> None:
        state = self._shell.state
        waiting = [each for each in self._sessions.workers.values() if each.waits_for_epoch is not None]
        if not waiting or not state.restorable:
            return
        message = self._answer()
        for session in waiting:
            if message is not None and session.waits_for_epoch is not None and session.waits_for_epoch <= state.epoch:
                session.waits_for_epoch = None
                session.link.send(message)

    def _answer(self) -> Restored | None:
        shell, state = self._shell, self._shell.state
        decided_at = self._election.decided_at
        if state.decided is None:
            text = shell.shared.reason(state.epoch)
            return Restored(epoch=state.epoch, snapshot=None, text=text, decided_at=decided_at)
        copy = state.copy(state.decided)
        if copy is None or copy.data is None:
            reason = f"what epoch {state.epoch} decided on has been replaced, and a worker asks for it"
            shell.dispatch(events.EpochNeeded(state.epoch, reason))
            return None
        return Restored(
            epoch=state.epoch, snapshot=state.decided, buffer=copy.data, sums=copy.data_sums(state.slot),
            decided_at=decided_at, decoded=self._decoded(),
        )  # fmt: skip

    def _decoded(self) -> int:
        """Return the buckets of data that all nodes decode for the choice in force.

        Parity is not among them: a snapshot whose parity was not complete yet has lost nothing.
        """
        choice, topology = self._election.choice, self._shell.state.topology
        orders = () if choice is None or choice.decision.epoch != self._shell.state.epoch else choice.orders
        return sum(
            len({*order.targets} & {*topology.group_of(slot).sources(order.stripe)}) * max(order.counts, default=0)
            for slot, order in orders
        )
