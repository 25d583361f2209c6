"""The snapshot protocol of one agent: a pure function `(state, event) -> (state, effects)`.

A snapshot goes FILLING (workers write) -> SEALED (this node's part is whole; coding runs) -> PREPARED (every member of
the group has stored and verified its data and parity) -> COMMITTED (every group is known to be PREPARED). Agents pass
on facts, never orders: "group g is PREPARED", "some agent has not stored s and never will" (`void`). The two exclude
each other, because an agent says either Stored or never, and within an epoch no agent forgets: a life that begins
later, or was not at hand when the epoch's choice was made, takes no part until the next epoch.

Slots of the snapshot before are given up on COMMITTED alone. From the beginning of an epoch until its choice is known
nothing is given up at all, so an inventory stays true. Delivery may lose, repeat and reorder: every message is safe to
ignore, to repeat and to come late, and `PeerConnected` says again whatever still matters.
"""

from dataclasses import replace

from ft import protocol_coding as coding
from ft.events import (
    BeginEpoch,
    BucketArrived,
    ChunkRebuilt,
    Configured,
    DataVerified,
    DurableEnded,
    DurableStarted,
    Effect,
    EpochAdvanced,
    Event,
    Grant,
    ParityVerified,
    PeerAway,
    PeerConnected,
    PeerLost,
    Pinned,
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
)  # fmt: skip
from ft.messages import (
    ChunkEnd,
    ChunkLost,
    Decode,
    Fetch,
    Holding,
    Inventory,
    InventoryRequest,
    Known,
    Pin,
    SnapshotId,
    Stored,
    Want,
)  # fmt: skip
from ft.state import Copy, Geometry, Mode, Phase, State
from ft.turn import Turn

KNOWN_LIMIT = 8
"""Snapshots of which facts are kept before they are seen here; more can only come from a defect."""


def step(state: State, event: Event) -> tuple[State, tuple[Effect, ...]]:
    """The next state, and what the shell does about it, in order. Never raises on what a peer or worker sends."""
    turn = Turn(state)
    _handle(turn, event)
    _grant_waiting(turn)
    return turn.state, tuple(turn.effects)


def inventory(state: State) -> Inventory:
    """What can be restored from this agent's memory."""
    holdings = tuple(
        Holding(copy.snapshot, tuple(copy.good[stripe] for stripe in sorted(copy.good)), copy.settled)
        for copy in state.copies
        if copy.candidate and copy.good
    )
    return Inventory(
        slot=state.slot, boot=state.boot, epoch=state.epoch, holdings=holdings,
        pinned_epoch=state.pinned_epoch, pinned=state.pinned,
    )  # fmt: skip


def _handle(turn: Turn, event: Event) -> None:
    match event:
        case Configured(geometry, topology):
            turn.set(geometry=geometry, topology=topology or turn.state.topology)
        case WorkerOpened(worker, snapshot, wait):
            _open(turn, worker, snapshot, wait)
        case WorkerSealed(worker, snapshot, sums):
            _seal(turn, worker, snapshot, sums)
        case WorkerCancelled(worker, snapshot):
            _stop(turn, worker, snapshot, f"worker {worker} cancelled")
        case WorkerLost(worker):
            asked = {snapshot for waiting, snapshot in turn.state.waiting if waiting == worker}
            written = {copy.snapshot for copy in turn.state.copies if worker in copy.writers}
            for snapshot in sorted(asked | written, key=lambda each: each.age):
                _stop(turn, worker, snapshot, f"worker {worker} died")
        case DataVerified():
            if not turn.foreign(event.snapshot):
                coding.on_data_verified(turn, event)
        case ParityVerified():
            if not turn.foreign(event.snapshot):
                coding.on_parity_verified(turn, event)
        case BucketArrived(sender, boot, bucket):
            if _alive(turn, sender, boot) and not turn.foreign(bucket.snapshot):
                coding.on_bucket(turn, event)
        case PeerConnected(slot, boot):
            _connected(turn, slot, boot)
        case PeerLost(slot):
            turn.set(peers=turn.state.peers - {slot})
        case PeerAway(slot):
            _away(turn, slot)
        case Received():
            _receive(turn, event)
        case EpochAdvanced(epoch):
            _advance(turn, epoch)
        case Scrubbed(snapshot, stripe, intact):
            if not intact:
                _scrubbed(turn, snapshot, stripe)
        case ChunkRebuilt():
            _rebuilt(turn, event)
        case DurableStarted(snapshot):
            copy = turn.state.copy(snapshot)
            # One at a time, and only with a slot to spare: the disk must never stop snapshots.
            spare = turn.state.data_slots > 2 and not any(other.held for other in turn.state.copies)
            if copy is not None and copy.settled and spare:
                turn.put(replace(copy, held=True))
        case DurableEnded(snapshot):
            copy = turn.state.copy(snapshot)
            if copy is not None and copy.held:
                copy = turn.put(replace(copy, held=False))
                if copy.phase is Phase.DURABLE:
                    turn.drop(copy)


# ---- workers


def _open(turn: Turn, worker: int, snapshot: SnapshotId, wait: bool) -> None:
    state, reason = turn.state, _refusal(turn, snapshot)
    copy = state.copy(snapshot)
    if reason is not None:
        turn.emit(Refuse(worker, snapshot, reason))
        if state.mode is Mode.JOINING:
            turn.emit(RequestEpoch(f"slot {state.slot} has an empty memory"))
    elif copy is not None:
        _grant(turn, worker, copy)
    elif any(other.open for other in state.copies) or turn.free_slots()[0] is None or _no_parity(turn):
        if wait and not state.away:
            turn.set(waiting=(*state.waiting, (worker, snapshot)))
        else:
            turn.emit(Refuse(worker, snapshot, Reason.BUSY))
            turn.void(snapshot, f"slot {state.slot} was busy")
    else:
        data, parity = turn.free_slots()
        assert state.geometry is not None
        copy = turn.put(Copy(snapshot, state.geometry, state.group, Phase.FILLING, data, parity))
        turn.set(newest=snapshot.age)
        coding.begin(turn, copy)
        _grant(turn, worker, copy)


def _no_parity(turn: Turn) -> bool:
    return turn.state.parity_slots > 0 and turn.free_slots()[1] is None


def _refusal(turn: Turn, snapshot: SnapshotId) -> Reason | None:
    state = turn.state
    if state.geometry is None or snapshot.run != state.run or snapshot.layout != state.geometry.layout:
        return Reason.FOREIGN
    if state.mode is not Mode.ACTIVE:
        return Reason.SETTLING
    if snapshot.epoch != state.epoch:
        return Reason.EPOCH
    if snapshot in state.void:
        return Reason.VOID
    copy = state.copy(snapshot)
    if copy is not None and copy.phase is Phase.FILLING:
        return None
    return Reason.STALE if snapshot.age <= state.newest or turn.superseded(snapshot) else None


def _grant(turn: Turn, worker: int, copy: Copy) -> None:
    if worker in copy.sums or worker in copy.writers or worker >= len(copy.geometry.parts):
        turn.emit(Refuse(worker, copy.snapshot, Reason.STALE))
        return
    assert copy.data is not None
    turn.put(replace(copy, writers=copy.writers | {worker}))
    turn.emit(Grant(worker, copy.snapshot, copy.data, copy.geometry.first(worker)))


def _grant_waiting(turn: Turn) -> None:
    waiting = turn.state.waiting
    if not waiting or (any(copy.open for copy in turn.state.copies) and turn.state.copy(waiting[0][1]) is None):
        return
    turn.set(waiting=())
    for worker, snapshot in waiting:
        _open(turn, worker, snapshot, wait=True)


def _seal(turn: Turn, worker: int, snapshot: SnapshotId, sums: tuple[int, ...]) -> None:
    copy = turn.state.copy(snapshot)
    if copy is None or worker not in copy.writers:
        return
    if copy.phase is not Phase.FILLING or len(sums) != copy.geometry.parts[worker]:
        _stop(turn, worker, snapshot, f"worker {worker} sealed {len(sums)} buckets, not what its part has")
        return
    copy = turn.put(replace(copy, writers=copy.writers - {worker}, sums={**copy.sums, worker: sums}))
    if len(copy.sums) == len(copy.geometry.parts):
        copy = turn.put(replace(copy, phase=Phase.SEALED))
        coding.sealed(turn, copy)


def _stop(turn: Turn, worker: int, snapshot: SnapshotId, why: str) -> None:
    """A worker will not write (any more) into a snapshot that it asked for or was granted."""
    state = turn.state
    if (worker, snapshot) in state.waiting:
        turn.set(waiting=tuple(each for each in state.waiting if each != (worker, snapshot)))
        turn.void(snapshot, why)
    copy = turn.state.copy(snapshot)
    if copy is None or worker not in copy.writers:
        return
    copy = turn.put(replace(copy, writers=copy.writers - {worker}))
    if copy.phase is Phase.DRAINING:
        turn.drop(copy)
    else:
        turn.void(snapshot, why)


# ---- peers


def _alive(turn: Turn, slot: int, boot: int) -> bool:
    """Whether this life of the slot takes part in the present epoch."""
    lives = turn.state.lives
    return turn.state.mode is Mode.ACTIVE and slot < len(lives) and lives[slot] == boot


def _away(turn: Turn, slot: int) -> None:
    """The snapshot before may never be committed now: whoever waits for that would hold up training.

    The agent that is away may even be kept from coming back by those who wait: its own workers start it again, at the
    next snapshot, and no worker reaches that before all have joined the present one.
    """
    turn.set(away=turn.state.away | {slot})
    for _, snapshot in turn.state.waiting:
        turn.void(snapshot, f"slot {slot} is away, and nothing is committed without it")


def _connected(turn: Turn, slot: int, boot: int) -> None:
    turn.set(peers=turn.state.peers | {slot}, away=turn.state.away - {slot})
    state = turn.state
    if state.mode is not Mode.ACTIVE:
        return
    if not _alive(turn, slot, boot):
        if slot < len(state.lives) and boot > state.lives[slot]:
            turn.emit(RequestEpoch(f"the agent of slot {slot} has a new, empty memory"))
        return
    for copy in state.copies:
        if copy.open and slot in copy.group.members:
            for stripe in copy.group.parity_stripes(state.slot):
                progress = copy.coding.get((stripe, slot))
                if slot in copy.group.sources(stripe) and stripe not in copy.good and not (progress and progress.ended):
                    start = progress.next if progress else 0
                    turn.emit(Send(slot, Want(snapshot=copy.snapshot, stripe=stripe, start=start)))
        if state.slot in copy.members and slot in copy.group.members:
            turn.emit(Send(slot, Stored(snapshot=copy.snapshot, chunks=copy.members[state.slot])))
    if slot in state.topology.neighbours(state.slot):
        _say_again(turn, slot)


def _say_again(turn: Turn, slot: int) -> None:
    state = turn.state
    if state.committed is not None and state.committed.epoch == state.epoch:
        turn.emit(Send(slot, Known(snapshot=state.committed, committed=True)))
    for snapshot in sorted(state.known, key=lambda each: each.age):
        turn.emit(Send(slot, Known(snapshot=snapshot, prepared=tuple(sorted(state.known[snapshot])))))
    for snapshot in sorted(state.void, key=lambda each: each.age):
        turn.emit(Send(slot, Known(snapshot=snapshot, void=True)))


def _receive(turn: Turn, event: Received) -> None:
    message, sender = event.message, event.sender
    match message:
        case InventoryRequest(epoch=epoch):
            _advance(turn, epoch)
            turn.emit(Send(sender, inventory(turn.state)))
            return
        case Pin():
            _pin(turn, message)
            return
        case _ if not _alive(turn, sender, event.boot):
            return
    match message:
        case Decode(epoch=epoch, snapshot=snapshot):
            if epoch == turn.state.epoch and turn.state.copy(snapshot) is not None:
                turn.emit(StartDecode(message))
        case Fetch(epoch=epoch, snapshot=snapshot, stripe=stripe, start=start):
            copy = turn.state.copy(snapshot)
            if epoch == turn.state.epoch and copy is not None and stripe in copy.good:
                turn.emit(SendPart(sender, snapshot, stripe, start))
        case Want() if not turn.foreign(message.snapshot):
            coding.on_want(turn, sender, message)
        case ChunkEnd() if not turn.foreign(message.snapshot):
            coding.on_end(turn, sender, message)
        case ChunkLost() if not turn.foreign(message.snapshot):
            coding.on_lost_chunk(turn, sender, message)
        case Stored() if message.snapshot == turn.state.pinned or not turn.foreign(message.snapshot):
            coding.on_stored(turn, sender, message)
        case Known() if not turn.foreign(message.snapshot):
            _know(turn, sender, message)
        case _:
            pass


def _know(turn: Turn, sender: int, known: Known) -> None:
    state, everything = turn.state, frozenset(range(len(turn.state.topology.groups)))
    seen = set(state.known) | state.void
    if known.snapshot not in seen and len(seen) >= KNOWN_LIMIT * 2:
        turn.log("error", f"slot {sender} tells of more unfinished snapshots than there can be")
    elif known.void:
        turn.void(known.snapshot, f"slot {sender} says so", sender)
    else:
        groups = everything if known.committed else everything & frozenset(known.prepared)
        # Who told of a part must hear of the whole; who told of the whole need not.
        turn.learn(known.snapshot, groups, sender if known.committed else None)


# ---- recovery


def _advance(turn: Turn, epoch: int) -> None:
    """A new epoch: stop what is unfinished, keep every chunk, wait for the choice."""
    state = turn.state
    if epoch <= state.epoch:
        return
    mode = Mode.JOINING if state.mode is Mode.JOINING else Mode.SETTLING
    for worker, snapshot in state.waiting:
        turn.emit(Refuse(worker, snapshot, Reason.EPOCH))
    turn.set(epoch=epoch, mode=mode, lives=(), waiting=(), known={}, void=frozenset(), wants={})
    for copy in state.copies:
        if copy.phase is Phase.FILLING:
            turn.drop(copy)
        elif copy.open:
            turn.emit(StopCoding(copy.snapshot))
    turn.emit(BeginEpoch(epoch))


def _pin(turn: Turn, pin: Pin) -> None:
    """The choice of an epoch: keep it, give up the rest, take part again."""
    _advance(turn, pin.epoch)
    state = turn.state
    if pin.epoch < state.epoch or (state.mode is Mode.ACTIVE and state.pinned_epoch == pin.epoch):
        return
    if len(pin.lives) != state.topology.slots or pin.lives[state.slot] != state.boot:
        turn.emit(RequestEpoch(f"slot {state.slot} was not at hand when epoch {pin.epoch} chose its snapshot"))
        return
    turn.set(mode=Mode.ACTIVE, lives=pin.lives, pinned_epoch=pin.epoch, pinned=pin.snapshot, committed=pin.snapshot)
    for copy in state.copies:
        if copy.snapshot != pin.snapshot:
            turn.drop(replace(copy, phase=Phase.COMMITTED) if copy.open else copy)
    if pin.snapshot is None:
        turn.emit(Pinned(pin.epoch, None, None, whole=True))
        return
    chosen = turn.state.copy(pin.snapshot) or _empty_copy(turn, pin.snapshot)
    if chosen is None:
        turn.log("error", f"no slot is free for snapshot {pin.snapshot}: a worker still holds it")
        turn.emit(RequestEpoch(f"slot {state.slot} has no slot for the chosen snapshot"))
        return
    turn.set(newest=max(turn.state.newest, pin.snapshot.age))
    phase = Phase.COMMITTED if len(chosen.good) == chosen.group.size else Phase.REBUILT
    # What the members had stored before may be lost by now: they say again what they have.
    chosen = turn.put(replace(chosen, phase=phase, coding={}, finishing=frozenset(), members={}))
    if phase is Phase.COMMITTED:
        chosen = coding.say_stored(turn, chosen)
    turn.emit(Pinned(pin.epoch, pin.snapshot, chosen.data, whole=_data_whole(turn, chosen)))


def _empty_copy(turn: Turn, snapshot: SnapshotId) -> Copy | None:
    """A place for the chosen snapshot on an agent that has nothing of it: its peers fill it."""
    state, (data, parity) = turn.state, turn.free_slots()
    if data is None or (state.parity_slots and parity is None):
        return None
    geometry = state.geometry
    if geometry is None or geometry.layout != snapshot.layout:
        geometry = Geometry(snapshot.layout, (), 0)
    return turn.put(Copy(snapshot, geometry, state.group, Phase.REBUILT, data, parity))


def _data_whole(turn: Turn, copy: Copy) -> bool:
    return all(stripe in copy.good for stripe in copy.group.data_stripes(turn.state.slot))


def _rebuilt(turn: Turn, event: ChunkRebuilt) -> None:
    state, copy, stripe = turn.state, turn.state.copy(event.snapshot), event.record.stripe
    if copy is None or not copy.settled or stripe in copy.good:
        return
    whole = _data_whole(turn, copy)
    rebuilt = {**copy.rebuilt, stripe: event.sums} if stripe in copy.group.data_stripes(state.slot) else copy.rebuilt
    copy = turn.put(replace(copy, good={**copy.good, stripe: event.record}, rebuilt=rebuilt))
    if not whole and _data_whole(turn, copy) and state.pinned == copy.snapshot:
        turn.emit(Pinned(state.pinned_epoch, copy.snapshot, copy.data, whole=True))
    if len(copy.good) == copy.group.size:
        coding.say_stored(turn, turn.put(replace(copy, phase=Phase.COMMITTED)))
        turn.log("info", f"snapshot {copy.snapshot} is whole again on slot {state.slot}")


def _scrubbed(turn: Turn, snapshot: SnapshotId, stripe: int) -> None:
    """A chunk has rotted: an erasure. Of a settled snapshot it is decoded anew from the group."""
    state, copy = turn.state, turn.state.copy(snapshot)
    if copy is None or stripe not in copy.good:
        return
    if state.mode is not Mode.ACTIVE:
        turn.put(replace(copy, good={key: record for key, record in copy.good.items() if key != stripe}))
        return
    if copy.open and state.slot not in copy.members:
        if stripe in copy.group.parity_stripes(state.slot):
            coding.restart(turn, copy, stripe)
        else:
            turn.void(snapshot, f"data of slot {state.slot} was damaged before it was coded")
        return
    coding.lose(turn, copy, {stripe})
    if copy.settled:
        order = _repair(turn, copy, stripe)
        if order is not None:
            turn.emit(StartDecode(order))
        else:
            turn.log("error", f"snapshot {snapshot}: stripe {stripe} cannot be repaired now, too few peers")


def _repair(turn: Turn, copy: Copy, stripe: int) -> Decode | None:
    state = turn.state
    held = {slot: next(r for r in records if r.stripe == stripe) for slot, records in copy.members.items()}
    others = [slot for slot in copy.group.members if slot in state.peers and slot in held and slot != state.slot]
    known = [held[slot] for slot in copy.group.parities(stripe) if slot in held]
    if len(others) < copy.group.data or not known:
        return None
    return Decode(
        epoch=state.epoch, snapshot=copy.snapshot, stripe=stripe, sources=tuple(others[: copy.group.data]),
        targets=(state.slot,), digests=known[0].sources, counts=known[0].counts,
    )  # fmt: skip
