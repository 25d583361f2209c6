"""Snapshot protocol of one agent: a pure function `(state, event) -> (state, effects)`.

A snapshot goes FILLING (workers write) -> SEALED (this node's part is complete; coding runs) -> PREPARED (every member
of the group has stored and verified its data and parity) -> COMMITTED (every group is known to be PREPARED). Agents
pass on facts, never orders: "s was begun", "group g is PREPARED", "some agent has not stored s and never will" (s is
`void`). The last two are mutually exclusive, because an agent announces either Stored or never, and no agent forgets
within an epoch: an incarnation that starts later, or was absent when the epoch's decision was made, takes no part until
the next epoch.

The previous snapshot's buffers are released only on COMMITTED. Delivery may lose, repeat and reorder messages: every
message may safely be ignored, repeated or late. `PeerConnected`, and `Joined` from an agent that has just put the
epoch's decision into force, repeat whatever still matters.

Why no snapshot stays open for ever. An agent's watermark `newest` only grows, and up to it the agent has or may still
get only what it holds; the rest is void, and the agent says so when it hears of it. Every grant is told to all agents,
so for a snapshot s that some agent holds and another agent P does not:

- P has passed s: P hears of it, and s is void everywhere;
- P has not reached s: P's workers ask for s, or for a newer one, which passes it; or no worker trains on P's node.

And if all hold it, each of them either stores it or makes it void: its workers seal, cancel, ask for a newer snapshot
or die (`grants`), chunks arrive or their source says that they are lost (`coding`). No fact about a snapshot that may
still be committed is dropped for want of space, and none is needed about one that the watermark has passed.
"""

from msgspec.structs import replace

from keepwarm.ft.protocol import coding, grants, recovery
from keepwarm.ft.protocol.events import (  # fmt: skip
    BucketArrived,
    ChunkRebuilt,
    Configured,
    DataVerified,
    DecodeFailed,
    DurableEnded,
    DurableStarted,
    Effect,
    EpochAdvanced,
    EpochNeeded,
    Event,
    ParityVerified,
    PeerAway,
    PeerConnected,
    PeerLost,
    PlanRead,
    Received,
    RequestEpoch,
    Scrubbed,
    Send,
    SendPart,
    StartDecode,
    WorkerCancelled,
    WorkerLost,
    WorkerOpened,
    WorkerSealed,
)
from keepwarm.ft.protocol.messages import (  # fmt: skip
    AgentMessage,
    ChunkEnd,
    ChunkLost,
    ChunkWrong,
    Decision,
    Decode,
    Fetch,
    Holding,
    Inventory,
    InventoryRequest,
    Joined,
    Known,
    SnapshotId,
    Stored,
    Want,
)
from keepwarm.ft.protocol.state import Mode, Phase, State
from keepwarm.ft.protocol.transition import Transition


def step(state: State, event: Event) -> tuple[State, tuple[Effect, ...]]:
    """Return the next state and the effects for the shell, in order. Never raise on input from a peer or worker."""
    transition = Transition(state)
    _handle(transition, event)
    grants.grant_waiting(transition)
    return transition.state, tuple(transition.effects)


def inventory(state: State) -> Inventory:
    """Return what can be restored from this agent's memory."""
    holdings = tuple(
        Holding(copy.snapshot, tuple(copy.good[stripe] for stripe in sorted(copy.good)), copy.whole)
        for copy in state.copies
        if copy.candidate and copy.good
    )
    failed = sorted(state.undecodable, key=lambda each: (each.snapshot.age, each.stripe, each.holders))
    return Inventory(
        slot=state.slot, incarnation=state.incarnation, epoch=state.epoch, holdings=holdings, undecodable=tuple(failed)
    )


def _handle(transition: Transition, event: Event) -> None:
    match event:
        case Configured(geometry, topology):
            transition.set(geometry=geometry, topology=topology or transition.state.topology)
        case WorkerOpened(worker, snapshot, wait):
            grants.requested(transition, worker, snapshot, wait)
        case WorkerSealed(worker, snapshot, sums):
            grants.sealed(transition, worker, snapshot, sums)
        case WorkerCancelled(worker, snapshot):
            grants.stopped(transition, worker, snapshot, f"worker {worker} cancelled")
        case WorkerLost(worker):
            grants.lost(transition, worker)
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
        case DurableStarted(snapshot):
            _durable_started(transition, snapshot)
        case DurableEnded(snapshot):
            _durable_ended(transition, snapshot)
        case _:
            _handle_recovery(transition, event)


def _handle_recovery(transition: Transition, event: Event) -> None:
    match event:
        case EpochAdvanced(epoch):
            recovery.advance(transition, epoch)
        case EpochNeeded(epoch, reason):
            if epoch == transition.state.epoch:
                transition.emit(RequestEpoch(reason))
        case PlanRead(decision, orders):
            recovery.follow(transition, decision, orders)
        case Scrubbed(snapshot, stripe, intact):
            if not intact:
                recovery.scrubbed(transition, snapshot, stripe)
        case ChunkRebuilt():
            recovery.rebuilt(transition, event)
        case DecodeFailed():
            recovery.undecodable(transition, event)


# ---- the durable tier


def _durable_started(transition: Transition, snapshot: SnapshotId) -> None:
    copy, copies = transition.state.copy(snapshot), transition.state.copies
    # One at a time, and only with a spare buffer: the disk must never block snapshots.
    spare = transition.state.data_buffers > 2 and not any(other.held for other in copies)
    if copy is not None and copy.committed and spare:
        transition.put(replace(copy, held=True))


def _durable_ended(transition: Transition, snapshot: SnapshotId) -> None:
    copy = transition.state.copy(snapshot)
    if copy is not None and copy.held:
        copy = transition.put(replace(copy, held=False))
        if copy.phase is Phase.DURABLE:
            transition.drop(copy)


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
            transition.emit(RequestEpoch(f"slot {slot} has another agent"))
        return
    _repeat(transition, slot)
    for copy in state.copies:
        if copy.committed and slot in copy.members and state.slot in copy.members:
            for stripe in sorted(set(range(copy.group.size)) - copy.good.keys()):
                if (order := recovery.repair(transition, copy, stripe)) is not None:
                    transition.emit(StartDecode(order))


def _repeat(transition: Transition, slot: int) -> None:
    """Tell an agent again what still matters: this is lost while there is no link or no decision in force there."""
    state = transition.state
    for copy in state.copies:
        if copy.open and slot in copy.group.members:
            for stripe in copy.group.parity_stripes(state.slot):
                progress = copy.coding.get((stripe, slot))
                if slot in copy.group.sources(stripe) and stripe not in copy.good and not (progress and progress.ended):
                    start = progress.next if progress else 0
                    transition.emit(Send(slot, Want(snapshot=copy.snapshot, stripe=stripe, start=start)))
        current = copy.open or copy.snapshot in (state.decided, state.committed)
        if current and state.slot in copy.members and slot in copy.group.members:
            transition.emit(Send(slot, coding.stored(transition, copy)))
    if slot not in state.topology.neighbours(state.slot):
        return
    if state.committed is not None and not transition.foreign(state.committed, state.epoch):
        epoch = transition.statement_epoch(state.committed)
        transition.emit(Send(slot, Known(snapshot=state.committed, committed=True, epoch=epoch)))
    for snapshot in sorted(state.known, key=lambda each: each.age):
        transition.emit(Send(slot, transition.known(snapshot)))
    for snapshot in sorted(state.void, key=lambda each: each.age):
        transition.emit(Send(slot, Known(snapshot=snapshot, void=True)))


def _receive(transition: Transition, event: Received) -> None:
    message, sender = event.message, event.sender
    match message:
        case InventoryRequest(epoch=epoch):
            recovery.advance(transition, epoch)
            transition.emit(Send(sender, inventory(transition.state)))
        case Decision():
            recovery.decide(transition, message)
        case _ if _alive(transition, sender, event.incarnation):
            _receive_alive(transition, sender, message)


def _receive_alive(transition: Transition, sender: int, message: AgentMessage) -> None:
    match message:
        case Joined(epoch=epoch):
            if epoch == transition.state.epoch:
                _repeat(transition, sender)
        case Decode() | Fetch() | ChunkWrong():
            _decoding(transition, sender, message)
        case Want() if not transition.foreign(message.snapshot):
            coding.on_want(transition, sender, message)
        case ChunkEnd() if not transition.foreign(message.snapshot):
            coding.on_end(transition, sender, message)
        case ChunkLost() if not transition.foreign(message.snapshot):
            coding.on_lost_chunk(transition, sender, message)
        case Stored() if not transition.foreign(message.snapshot, message.epoch):
            coding.on_stored(transition, sender, message)
        case Known() if not transition.foreign(message.snapshot, message.epoch):
            _know(transition, sender, message)
        case _:
            pass


def _decoding(transition: Transition, sender: int, message: Decode | Fetch | ChunkWrong) -> None:
    copy = transition.state.copy(message.snapshot)
    if message.epoch != transition.state.epoch or copy is None:
        return
    match message:
        case Decode():
            transition.emit(StartDecode(message))
        case Fetch(snapshot=snapshot, stripe=stripe, start=start):
            there = stripe in copy.good
            answer = SendPart(sender, snapshot, stripe, start) if there else None
            transition.emit(answer or Send(sender, ChunkLost(snapshot=snapshot, stripe=stripe)))
        case ChunkWrong(snapshot=snapshot, stripe=stripe):
            if sender in copy.group.members:
                recovery.distrust(transition, snapshot, stripe)


def _know(transition: Transition, sender: int, known: Known) -> None:
    everything = frozenset(range(len(transition.state.topology.groups)))
    if known.void:
        if known.snapshot.epoch == transition.state.epoch:
            transition.void(known.snapshot, f"slot {sender} says so", sender)
    elif not transition.answer_if_void(known.snapshot, sender):
        groups = everything if known.committed else everything & frozenset(known.prepared)
        transition.learn(known.snapshot, groups, sender)
