"""Protocol between an agent and the workers of its node: buffers are requested, granted, sealed and given up.

A grant has an owner, the worker, and ends in one of four ways: it is sealed, cancelled, given up by asking for a newer
snapshot, or its worker dies. In the last three the snapshot is void, and so is one that a worker of the node has passed
over while the others wrote it. A request that must wait has the same owner and ends in the same ways.
"""

from msgspec.structs import replace

from keepwarm.ft.protocol import coding
from keepwarm.ft.protocol.events import Grant, Reason, Refuse, RequestEpoch
from keepwarm.ft.protocol.messages import SnapshotId
from keepwarm.ft.protocol.state import Copy, Mode, Phase, State
from keepwarm.ft.protocol.transition import Transition


def requested(transition: Transition, worker: int, snapshot: SnapshotId, wait: bool) -> None:
    """Handle a request for a buffer: grant it, let it wait or refuse it."""
    reason = _refusal(transition.state, snapshot)
    if reason in (None, Reason.VOID):
        _resumed(transition)
        _give_up_older(transition, worker, snapshot)
        if any(waiting.age > snapshot.age for _, waiting in transition.state.waiting):
            # Its worker will not come back to this one.
            transition.void(snapshot, f"a worker of slot {transition.state.slot} went on without it")
            reason = Reason.VOID
    if reason is None:
        _open(transition, worker, snapshot, wait)
        return
    transition.emit(Refuse(worker, snapshot, reason))
    if reason is Reason.VOID:
        transition.pass_to(snapshot)
    elif transition.state.mode is Mode.JOINING:
        transition.emit(RequestEpoch(f"the agent of slot {transition.state.slot} is new"))


def _refusal(state: State, snapshot: SnapshotId) -> Reason | None:
    if state.geometry is None or snapshot.run != state.run or snapshot.layout != state.geometry.layout:
        return Reason.FOREIGN
    if state.mode is not Mode.ACTIVE:
        return Reason.RECOVERING
    if snapshot.epoch != state.epoch:
        return Reason.EPOCH
    if snapshot in state.void:
        return Reason.VOID
    copy = state.copy(snapshot)
    if copy is not None and copy.phase is Phase.FILLING:
        return None
    return Reason.STALE if snapshot.age <= state.newest else None


def _resumed(transition: Transition) -> None:
    """Free what was kept in case that the choice could not be restored: a step has been completed from it.

    The snapshot that was restored stays, and beside it the newest one that was committed, until the restored one is
    whole. If nothing in memory was restored, nothing is left of it.
    """
    state = transition.state
    if state.resumed:
        return
    transition.set(resumed=True)
    for copy in state.copies:
        beside = state.decided is not None and copy.snapshot == state.committed
        if copy.candidate and not copy.open and copy.snapshot != state.decided and not beside:
            transition.drop(copy)


def _give_up_older(transition: Transition, worker: int, snapshot: SnapshotId) -> None:
    """Void the older snapshots that lack this worker's part: it asks for a newer one, so it will not write them."""
    for _, waiting in transition.state.waiting:
        if waiting.age < snapshot.age:
            transition.void(waiting, f"worker {worker} asks for snapshot {snapshot}")
    for copy in transition.state.copies:
        if copy.snapshot.age >= snapshot.age:
            continue
        if worker in copy.writers:
            stopped(transition, worker, copy.snapshot, f"worker {worker} asks for snapshot {snapshot}")
        elif copy.phase is Phase.FILLING and worker not in copy.sums:
            transition.void(copy.snapshot, f"worker {worker} asks for snapshot {snapshot}")


def _open(transition: Transition, worker: int, snapshot: SnapshotId, wait: bool) -> None:
    state, copy = transition.state, transition.state.copy(snapshot)
    data, parity = transition.free_buffers()
    full = data is None or (state.parity_buffers > 0 and parity is None)
    if copy is not None:
        _grant(transition, worker, copy)
    elif any(other.open for other in state.copies) or (full and not _kept_beside(transition)):
        if wait and not state.away:
            transition.set(waiting=(*state.waiting, (worker, snapshot)))
        else:
            _refuse(transition, worker, snapshot, Reason.BUSY, "was busy")
    elif full:
        why = f"has no room until snapshot {state.decided} is whole on all nodes"
        _refuse(transition, worker, snapshot, Reason.NO_ROOM, why)
    else:
        assert state.geometry is not None
        copy = transition.put(Copy(snapshot, state.geometry, state.group, Phase.FILLING, data, parity))
        transition.pass_to(snapshot)
        transition.learn(snapshot, frozenset())
        coding.begin(transition, copy)
        _grant(transition, worker, copy)


def _kept_beside(transition: Transition) -> bool:
    """Return whether an older snapshot is kept beside the restored one, which is not yet whole on all nodes."""
    state = transition.state
    if state.decided is None or transition.superseded(state.decided):
        return False
    return any(copy.candidate and not copy.open and copy.snapshot != state.decided for copy in state.copies)


def _refuse(transition: Transition, worker: int, snapshot: SnapshotId, reason: Reason, why: str) -> None:
    """Refuse for good. The other agents must not wait for this one, so the snapshot is void."""
    transition.emit(Refuse(worker, snapshot, reason))
    transition.void(snapshot, f"slot {transition.state.slot} {why}")
    transition.pass_to(snapshot)


def _grant(transition: Transition, worker: int, copy: Copy) -> None:
    if worker in copy.sums or worker in copy.writers or worker >= len(copy.geometry.parts):
        transition.emit(Refuse(worker, copy.snapshot, Reason.STALE))
        return
    assert copy.data is not None
    transition.put(replace(copy, writers=copy.writers | {worker}))
    transition.emit(Grant(worker, copy.snapshot, copy.data, copy.geometry.first(worker)))


def grant_waiting(transition: Transition) -> None:
    """Look again at the requests that wait, unless the snapshot that they wait for is still open."""
    waiting = transition.state.waiting
    if not waiting or (
        any(copy.open for copy in transition.state.copies) and transition.state.copy(waiting[0][1]) is None
    ):
        return
    transition.set(waiting=())
    for worker, snapshot in waiting:
        if snapshot in transition.state.void:
            transition.emit(Refuse(worker, snapshot, Reason.VOID))
        else:
            _open(transition, worker, snapshot, wait=True)


def sealed(transition: Transition, worker: int, snapshot: SnapshotId, sums: tuple[int, ...]) -> None:
    copy = transition.state.copy(snapshot)
    if copy is None or worker not in copy.writers:
        return
    if copy.phase is not Phase.FILLING or len(sums) != copy.geometry.parts[worker]:
        stopped(transition, worker, snapshot, f"worker {worker} sealed {len(sums)} buckets, not what its part has")
        return
    copy = transition.put(replace(copy, writers=copy.writers - {worker}, sums={**copy.sums, worker: sums}))
    if len(copy.sums) == len(copy.geometry.parts):
        copy = transition.put(replace(copy, phase=Phase.SEALED))
        coding.sealed(transition, copy)


def lost(transition: Transition, worker: int) -> None:
    """Handle the death of a worker: it writes nothing any more that it requested or was granted."""
    asked = {snapshot for waiting, snapshot in transition.state.waiting if waiting == worker}
    written = {copy.snapshot for copy in transition.state.copies if worker in copy.writers}
    for snapshot in sorted(asked | written, key=lambda each: each.age):
        stopped(transition, worker, snapshot, f"worker {worker} died")


def stopped(transition: Transition, worker: int, snapshot: SnapshotId, why: str) -> None:
    """Handle a worker that will not write (any more) to a snapshot it requested or was granted."""
    state = transition.state
    if (worker, snapshot) in state.waiting:
        transition.set(waiting=tuple(each for each in state.waiting if each != (worker, snapshot)))
        transition.void(snapshot, why)
    copy = transition.state.copy(snapshot)
    if copy is None or worker not in copy.writers:
        return
    copy = transition.put(replace(copy, writers=copy.writers - {worker}))
    if copy.phase is Phase.DRAINING:
        transition.drop(copy)
    else:
        transition.void(snapshot, why)
