"""Snapshot protocol of one agent: a pure function `(state, event) -> (state, effects)`.

A snapshot goes FILLING (workers write) -> SEALED (this node's part is complete; coding runs) -> PREPARED (every member
of the group has stored and verified its data and parity) -> COMMITTED (every group is known to be PREPARED). Agents
pass on facts, never orders: "group g is PREPARED", "some agent has not stored s and never will" (`void`). The two are
mutually exclusive, because an agent announces either Stored or never, and no agent forgets within an epoch: an
incarnation that starts later, or was absent when the epoch's decision was made, takes no part until the next epoch.

The previous snapshot's buffers are released only on COMMITTED. Between the start of an epoch and its decision nothing
at all is released, so an inventory stays true. Delivery may lose, repeat and reorder messages: every message may safely
be ignored, repeated or late, and `PeerConnected` repeats whatever still matters.
"""

from dataclasses import replace

from keepwarm.ft.protocol import coding
from keepwarm.ft.protocol.events import (  # fmt: skip
    BeginEpoch,
    BucketArrived,
    ChunkRebuilt,
    Configured,
    DataVerified,
    Decided,
    DurableEnded,
    DurableStarted,
    Effect,
    EpochAdvanced,
    EpochNeeded,
    Event,
    FollowOrders,
    Grant,
    ParityVerified,
    PeerAway,
    PeerConnected,
    PeerLost,
    PlanRead,
    Reason,
    Received,
    Refuse,
    RequestEpoch,
    Scrubbed,
    Send,
    SendPart,
    StartDecode,
    StopCoding,
    WorkerCancelled,
    WorkerLost,
    WorkerOpened,
    WorkerSealed,
)
from keepwarm.ft.protocol.messages import (  # fmt: skip
    ChunkEnd,
    ChunkLost,
    Decision,
    Decode,
    Fetch,
    Holding,
    Inventory,
    InventoryRequest,
    Known,
    SnapshotId,
    Stored,
    Want,
)
from keepwarm.ft.protocol.state import Copy, Geometry, Mode, Phase, State
from keepwarm.ft.protocol.transition import Transition

KNOWN_LIMIT = 8
"""Maximum number of snapshots whose facts are kept before they are seen here. More can only come from a bug."""


def step(state: State, event: Event) -> tuple[State, tuple[Effect, ...]]:
    """Return the next state and the effects for the shell, in order. Never raise on input from a peer or worker."""
    transition = Transition(state)
    _handle(transition, event)
    _grant_waiting(transition)
    return transition.state, tuple(transition.effects)


def inventory(state: State) -> Inventory:
    """Return what can be restored from this agent's memory."""
    holdings = tuple(
        Holding(copy.snapshot, tuple(copy.good[stripe] for stripe in sorted(copy.good)), copy.committed)
        for copy in state.copies
        if copy.candidate and copy.good
    )
    return Inventory(
        slot=state.slot, incarnation=state.incarnation, epoch=state.epoch, holdings=holdings,
        decided_epoch=state.decided_epoch, decided=state.decided,
    )  # fmt: skip


def _handle(transition: Transition, event: Event) -> None:
    match event:
        case Configured(geometry, topology):
            transition.set(geometry=geometry, topology=topology or transition.state.topology)
        case WorkerOpened(worker, snapshot, wait):
            _open(transition, worker, snapshot, wait)
        case WorkerSealed(worker, snapshot, sums):
            _seal(transition, worker, snapshot, sums)
        case WorkerCancelled(worker, snapshot):
            _stop(transition, worker, snapshot, f"worker {worker} cancelled")
        case WorkerLost(worker):
            asked = {snapshot for waiting, snapshot in transition.state.waiting if waiting == worker}
            written = {copy.snapshot for copy in transition.state.copies if worker in copy.writers}
            for snapshot in sorted(asked | written, key=lambda each: each.age):
                _stop(transition, worker, snapshot, f"worker {worker} died")
        case DataVerified():
            if not transition.foreign(event.snapshot):
                coding.on_data_verified(transition, event)
        case ParityVerified():
            if not transition.foreign(event.snapshot):
                coding.on_parity_verified(transition, event)
        case BucketArrived(sender, incarnation, bucket):
            if _alive(transition, sender, incarnation) and not transition.foreign(bucket.snapshot):
                coding.on_bucket(transition, event)
        case PeerConnected(slot, incarnation):
            _connected(transition, slot, incarnation)
        case PeerLost(slot):
            transition.set(peers=transition.state.peers - {slot})
        case PeerAway(slot):
            _away(transition, slot)
        case Received():
            _receive(transition, event)
        case EpochAdvanced(epoch):
            _advance(transition, epoch)
        case EpochNeeded(epoch, reason):
            if epoch == transition.state.epoch:
                transition.emit(RequestEpoch(reason))
        case PlanRead(decision, orders):
            _plan(transition, decision, orders)
        case Scrubbed(snapshot, stripe, intact):
            if not intact:
                _scrubbed(transition, snapshot, stripe)
        case ChunkRebuilt():
            _rebuilt(transition, event)
        case DurableStarted(snapshot):
            copy = transition.state.copy(snapshot)
            # One at a time, and only with a spare buffer: the disk must never block snapshots.
            spare = transition.state.data_buffers > 2 and not any(other.held for other in transition.state.copies)
            if copy is not None and copy.committed and spare:
                transition.put(replace(copy, held=True))
        case DurableEnded(snapshot):
            copy = transition.state.copy(snapshot)
            if copy is not None and copy.held:
                copy = transition.put(replace(copy, held=False))
                if copy.phase is Phase.DURABLE:
                    transition.drop(copy)


# ---- workers


def _open(transition: Transition, worker: int, snapshot: SnapshotId, wait: bool) -> None:
    state, reason = transition.state, _refusal(transition, snapshot)
    copy = state.copy(snapshot)
    if reason is not None:
        transition.emit(Refuse(worker, snapshot, reason))
        if state.mode is Mode.JOINING:
            transition.emit(RequestEpoch(f"slot {state.slot} has an empty memory"))
    elif copy is not None:
        _grant(transition, worker, copy)
    elif any(other.open for other in state.copies) or transition.free_buffers()[0] is None or _no_parity(transition):
        if wait and not state.away:
            transition.set(waiting=(*state.waiting, (worker, snapshot)))
        else:
            transition.emit(Refuse(worker, snapshot, Reason.BUSY))
            transition.void(snapshot, f"slot {state.slot} was busy")
    else:
        data, parity = transition.free_buffers()
        assert state.geometry is not None
        copy = transition.put(Copy(snapshot, state.geometry, state.group, Phase.FILLING, data, parity))
        transition.set(newest=snapshot.age)
        coding.begin(transition, copy)
        _grant(transition, worker, copy)


def _no_parity(transition: Transition) -> bool:
    return transition.state.parity_buffers > 0 and transition.free_buffers()[1] is None


def _refusal(transition: Transition, snapshot: SnapshotId) -> Reason | None:
    state = transition.state
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
    return Reason.STALE if snapshot.age <= state.newest or transition.superseded(snapshot) else None


def _grant(transition: Transition, worker: int, copy: Copy) -> None:
    if worker in copy.sums or worker in copy.writers or worker >= len(copy.geometry.parts):
        transition.emit(Refuse(worker, copy.snapshot, Reason.STALE))
        return
    assert copy.data is not None
    transition.put(replace(copy, writers=copy.writers | {worker}))
    transition.emit(Grant(worker, copy.snapshot, copy.data, copy.geometry.first(worker)))


def _grant_waiting(transition: Transition) -> None:
    waiting = transition.state.waiting
    if not waiting or (
        any(copy.open for copy in transition.state.copies) and transition.state.copy(waiting[0][1]) is None
    ):
        return
    transition.set(waiting=())
    for worker, snapshot in waiting:
        _open(transition, worker, snapshot, wait=True)


def _seal(transition: Transition, worker: int, snapshot: SnapshotId, sums: tuple[int, ...]) -> None:
    copy = transition.state.copy(snapshot)
    if copy is None or worker not in copy.writers:
        return
    if copy.phase is not Phase.FILLING or len(sums) != copy.geometry.parts[worker]:
        _stop(transition, worker, snapshot, f"worker {worker} sealed {len(sums)} buckets, not what its part has")
        return
    copy = transition.put(replace(copy, writers=copy.writers - {worker}, sums={**copy.sums, worker: sums}))
    if len(copy.sums) == len(copy.geometry.parts):
        copy = transition.put(replace(copy, phase=Phase.SEALED))
        coding.sealed(transition, copy)


def _stop(transition: Transition, worker: int, snapshot: SnapshotId, why: str) -> None:
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


# ---- peers


def _alive(transition: Transition, slot: int, incarnation: int) -> bool:
    """Return whether this incarnation of the slot takes part in the current epoch."""
    incarnations = transition.state.incarnations
    return transition.state.mode is Mode.ACTIVE and slot < len(incarnations) and incarnations[slot] == incarnation


def _away(transition: Transition, slot: int) -> None:
    """Void the snapshots whose workers wait for a commit that may now never happen: waiting would stall training.

    The wait could even prevent the absent agent from returning: its own workers restart it at the next snapshot, and no
    worker reaches that before all have finished the current one.
    """
    transition.set(away=transition.state.away | {slot})
    for _, snapshot in transition.state.waiting:
        transition.void(snapshot, f"slot {slot} is away, and nothing is committed without it")


def _connected(transition: Transition, slot: int, incarnation: int) -> None:
    transition.set(peers=transition.state.peers | {slot}, away=transition.state.away - {slot})
    state = transition.state
    if state.mode is not Mode.ACTIVE:
        return
    if not _alive(transition, slot, incarnation):
        if slot < len(state.incarnations) and incarnation > state.incarnations[slot]:
            transition.emit(RequestEpoch(f"the agent of slot {slot} has a new, empty memory"))
        return
    for copy in state.copies:
        if copy.open and slot in copy.group.members:
            for stripe in copy.group.parity_stripes(state.slot):
                progress = copy.coding.get((stripe, slot))
                if slot in copy.group.sources(stripe) and stripe not in copy.good and not (progress and progress.ended):
                    start = progress.next if progress else 0
                    transition.emit(Send(slot, Want(snapshot=copy.snapshot, stripe=stripe, start=start)))
        if state.slot in copy.members and slot in copy.group.members:
            transition.emit(Send(slot, Stored(snapshot=copy.snapshot, chunks=copy.members[state.slot])))
    if slot in state.topology.neighbours(state.slot):
        _say_again(transition, slot)


def _say_again(transition: Transition, slot: int) -> None:
    state = transition.state
    if state.committed is not None and state.committed.epoch == state.epoch:
        transition.emit(Send(slot, Known(snapshot=state.committed, committed=True)))
    for snapshot in sorted(state.known, key=lambda each: each.age):
        transition.emit(Send(slot, Known(snapshot=snapshot, prepared=tuple(sorted(state.known[snapshot])))))
    for snapshot in sorted(state.void, key=lambda each: each.age):
        transition.emit(Send(slot, Known(snapshot=snapshot, void=True)))


def _receive(transition: Transition, event: Received) -> None:
    message, sender = event.message, event.sender
    match message:
        case InventoryRequest(epoch=epoch):
            _advance(transition, epoch)
            transition.emit(Send(sender, inventory(transition.state)))
            return
        case Decision():
            _decide(transition, message)
            return
        case _ if not _alive(transition, sender, event.incarnation):
            return
    match message:
        case Decode(epoch=epoch, snapshot=snapshot):
            if epoch == transition.state.epoch and transition.state.copy(snapshot) is not None:
                transition.emit(StartDecode(message))
        case Fetch(epoch=epoch, snapshot=snapshot, stripe=stripe, start=start):
            copy = transition.state.copy(snapshot)
            if epoch == transition.state.epoch and copy is not None and stripe in copy.good:
                transition.emit(SendPart(sender, snapshot, stripe, start))
        case Want() if not transition.foreign(message.snapshot):
            coding.on_want(transition, sender, message)
        case ChunkEnd() if not transition.foreign(message.snapshot):
            coding.on_end(transition, sender, message)
        case ChunkLost() if not transition.foreign(message.snapshot):
            coding.on_lost_chunk(transition, sender, message)
        case Stored() if message.snapshot == transition.state.decided or not transition.foreign(message.snapshot):
            coding.on_stored(transition, sender, message)
        case Known() if not transition.foreign(message.snapshot):
            _know(transition, sender, message)
        case _:
            pass


def _know(transition: Transition, sender: int, known: Known) -> None:
    state, everything = transition.state, frozenset(range(len(transition.state.topology.groups)))
    seen = set(state.known) | state.void
    if known.snapshot not in seen and len(seen) >= KNOWN_LIMIT * 2:
        transition.log("error", f"slot {sender} tells of more unfinished snapshots than there can be")
    elif known.void:
        transition.void(known.snapshot, f"slot {sender} says so", sender)
    else:
        groups = everything if known.committed else everything & frozenset(known.prepared)
        # A peer that reported only some groups must learn of the commit; one that reported the commit need not.
        transition.learn(known.snapshot, groups, sender if known.committed else None)


# ---- recovery


def _advance(transition: Transition, epoch: int) -> None:
    """Begin a new epoch: stop unfinished work, keep every chunk and wait for the decision."""
    state = transition.state
    if epoch <= state.epoch:
        return
    mode = Mode.JOINING if state.mode is Mode.JOINING else Mode.RECOVERING
    for worker, snapshot in state.waiting:
        transition.emit(Refuse(worker, snapshot, Reason.EPOCH))
    transition.set(epoch=epoch, mode=mode, incarnations=(), waiting=(), known={}, void=frozenset(), wants={})
    for copy in state.copies:
        if copy.phase is Phase.FILLING:
            transition.drop(copy)
        elif copy.open:
            transition.emit(StopCoding(copy.snapshot))
    transition.emit(BeginEpoch(epoch))


def _decide(transition: Transition, decision: Decision) -> None:
    """Apply an epoch's decision: keep the chosen snapshot, discard the rest and take part again."""
    _advance(transition, decision.epoch)
    state = transition.state
    if decision.epoch < state.epoch or (state.mode is Mode.ACTIVE and state.decided_epoch == decision.epoch):
        return
    if len(decision.incarnations) != state.topology.slots or decision.incarnations[state.slot] != state.incarnation:
        transition.emit(
            RequestEpoch(f"slot {state.slot} was not at hand when epoch {decision.epoch} chose its snapshot")
        )
        return
    transition.set(
        mode=Mode.ACTIVE,
        incarnations=decision.incarnations,
        decided_epoch=decision.epoch,
        decided=decision.snapshot,
        decided_whole=False,
        committed=decision.snapshot,
    )
    for copy in state.copies:
        if copy.snapshot != decision.snapshot:
            transition.drop(replace(copy, phase=Phase.COMMITTED) if copy.open else copy)
    if decision.snapshot is None:
        _announce(transition, None, whole=True)
        return
    chosen = transition.state.copy(decision.snapshot) or _empty_copy(transition, decision.snapshot)
    if chosen is None:
        transition.log("error", f"no buffer is free for snapshot {decision.snapshot}: a worker still holds it")
        transition.emit(RequestEpoch(f"slot {state.slot} has no buffer for the chosen snapshot"))
        return
    transition.set(newest=max(transition.state.newest, decision.snapshot.age))
    phase = Phase.COMMITTED if len(chosen.good) == chosen.group.size else Phase.REBUILT
    # What members stored earlier may be lost by now, so they announce again what they have.
    chosen = transition.put(replace(chosen, phase=phase, coding={}, finishing=frozenset(), members={}))
    if phase is Phase.COMMITTED:
        chosen = coding.say_stored(transition, chosen)
    _announce(transition, chosen, whole=_data_whole(transition, chosen))


def _announce(transition: Transition, copy: Copy | None, *, whole: bool) -> None:
    """Announce the effect of the decision on this agent: `copy` is restored, or nothing in memory is."""
    transition.set(decided_whole=whole)
    snapshot, buffer = (copy.snapshot, copy.data) if copy is not None else (None, None)
    transition.emit(Decided(transition.state.decided_epoch, snapshot, buffer, whole))


def _plan(transition: Transition, decision: Decision, orders: tuple[tuple[int, Decode], ...]) -> None:
    """Follow a plan, which is read with its decision. Only once, and only if the decision is in force here."""
    _decide(transition, decision)
    state = transition.state
    in_force = state.mode is Mode.ACTIVE and state.decided_epoch == decision.epoch
    if in_force and state.planned_epoch != decision.epoch:
        transition.set(planned_epoch=decision.epoch)
        transition.emit(FollowOrders(orders))


def _empty_copy(transition: Transition, snapshot: SnapshotId) -> Copy | None:
    """Allocate a copy of the chosen snapshot on an agent that has none of it. Its peers fill it."""
    state, (data, parity) = transition.state, transition.free_buffers()
    if data is None or (state.parity_buffers and parity is None):
        return None
    geometry = state.geometry
    if geometry is None or geometry.layout != snapshot.layout:
        geometry = Geometry(snapshot.layout, (), 0)
    return transition.put(Copy(snapshot, geometry, state.group, Phase.REBUILT, data, parity))


def _data_whole(transition: Transition, copy: Copy) -> bool:
    return all(stripe in copy.good for stripe in copy.group.data_stripes(transition.state.slot))


def _rebuilt(transition: Transition, event: ChunkRebuilt) -> None:
    state, copy, stripe = transition.state, transition.state.copy(event.snapshot), event.record.stripe
    if copy is None or not copy.committed or stripe in copy.good:
        return
    whole = _data_whole(transition, copy)
    rebuilt = {**copy.rebuilt, stripe: event.sums} if stripe in copy.group.data_stripes(state.slot) else copy.rebuilt
    copy = transition.put(replace(copy, good={**copy.good, stripe: event.record}, rebuilt=rebuilt))
    if not whole and _data_whole(transition, copy) and state.decided == copy.snapshot:
        _announce(transition, copy, whole=True)
    if len(copy.good) == copy.group.size:
        coding.say_stored(transition, transition.put(replace(copy, phase=Phase.COMMITTED)))
        transition.log("info", f"snapshot {copy.snapshot} is whole again on slot {state.slot}")


def _scrubbed(transition: Transition, snapshot: SnapshotId, stripe: int) -> None:
    """Mark a corrupt chunk as an erasure. If its snapshot is committed, the group decodes it."""
    state, copy = transition.state, transition.state.copy(snapshot)
    if copy is None or stripe not in copy.good:
        return
    if state.mode is not Mode.ACTIVE:
        transition.put(replace(copy, good={key: record for key, record in copy.good.items() if key != stripe}))
        return
    if copy.open and state.slot not in copy.members:
        if stripe in copy.group.parity_stripes(state.slot):
            coding.restart(transition, copy, stripe)
        else:
            transition.void(snapshot, f"data of slot {state.slot} was damaged before it was coded")
        return
    coding.lose(transition, copy, {stripe})
    if copy.committed:
        order = _repair(transition, copy, stripe)
        if order is not None:
            transition.emit(StartDecode(order))
        else:
            transition.log("error", f"snapshot {snapshot}: stripe {stripe} cannot be repaired now, too few peers")


def _repair(transition: Transition, copy: Copy, stripe: int) -> Decode | None:
    state = transition.state
    held = {slot: next(r for r in records if r.stripe == stripe) for slot, records in copy.members.items()}
    others = [slot for slot in copy.group.members if slot in state.peers and slot in held and slot != state.slot]
    known = [held[slot] for slot in copy.group.parities(stripe) if slot in held]
    if len(others) < copy.group.data or not known:
        return None
    return Decode(
        epoch=state.epoch, snapshot=copy.snapshot, stripe=stripe, sources=tuple(others[: copy.group.data]),
        targets=(state.slot,), digests=known[0].sources, counts=known[0].counts,
    )  # fmt: skip
