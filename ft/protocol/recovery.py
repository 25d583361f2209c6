"""Protocol of an epoch: keep every chunk, put the decision into force, fill what is missing.

A choice frees nothing. The agents keep, beside the snapshot that was chosen, what else may be restored:

- until a worker asks for a buffer, and so has completed a step from what was restored: everything;
- after that, and until the chosen snapshot is whole on all members: the newest one that was committed or restored
  earlier. There are two buffers of each kind, so no new snapshot has room meanwhile, and workers go on without
  (`Reason.NO_ROOM`);
- nothing that was in memory, if nothing in memory was restored.

If anything fails before that, the next epoch chooses again from all of it. Members announce that they have stored the
chosen snapshot as they do for a new one, and the tree carries that its groups are PREPARED; when all are, the older
one is released.
"""

from msgspec.structs import replace

from keepwarm.ft.protocol import coding
from keepwarm.ft.protocol.events import (  # fmt: skip
    BeginEpoch,
    ChunkRebuilt,
    Decided,
    DecodeFailed,
    FollowOrders,
    Reason,
    Refuse,
    RequestEpoch,
    Send,
    StartDecode,
    StopCoding,
)
from keepwarm.ft.protocol.messages import ChunkRecord, Decision, Decode, Joined, SnapshotId, Undecodable
from keepwarm.ft.protocol.state import Copy, Geometry, Mode, Phase
from keepwarm.ft.protocol.transition import Transition


def advance(transition: Transition, epoch: int) -> None:
    """Begin a new epoch: stop unfinished work, keep every chunk and wait for the decision."""
    state = transition.state
    if epoch <= state.epoch and epoch != (state.unsettled or -1):
        return
    mode = Mode.JOINING if state.mode is Mode.JOINING else Mode.RECOVERING
    for worker, snapshot in state.waiting:
        transition.emit(Refuse(worker, snapshot, Reason.EPOCH))
    transition.set(epoch=epoch, unsettled=0, mode=mode, waiting=(), known={}, void=frozenset(), wants={})
    for copy in state.copies:
        if copy.phase is Phase.FILLING:
            transition.drop(copy)
        elif copy.open:
            transition.emit(StopCoding(copy.snapshot))
    transition.emit(BeginEpoch(epoch))


def decide(transition: Transition, decision: Decision) -> None:
    """Put an epoch's decision into force and take part again. What was not chosen is kept."""
    advance(transition, decision.epoch)
    state, chosen_id = transition.state, decision.snapshot
    if decision.epoch < state.epoch or (state.mode is Mode.ACTIVE and state.decided_epoch == decision.epoch):
        return
    if len(decision.incarnations) != state.topology.slots or decision.incarnations[state.slot] != state.incarnation:
        reason = f"slot {state.slot} was not at hand when epoch {decision.epoch} chose its snapshot"
        transition.emit(RequestEpoch(reason))
        return
    chosen = None if chosen_id is None else _room_for(transition, chosen_id)
    if chosen_id is not None and chosen is None:
        transition.log("error", f"no buffer is free for snapshot {chosen_id}: a worker still holds it")
        transition.emit(RequestEpoch(f"slot {state.slot} has no buffer for the chosen snapshot"))
        return
    _set_aside(transition, decision)
    transition.set(
        mode=Mode.ACTIVE, incarnations=decision.incarnations, decided_epoch=decision.epoch, decided=chosen_id,
        decided_whole=False, resumed=False, committed=_committed_before(transition, chosen_id),
    )  # fmt: skip
    transition.emit(*(Send(slot, Joined(epoch=decision.epoch)) for slot in state.near))
    if chosen is None:
        _announce(transition, None, whole=True)
        return
    transition.set(newest=max(transition.state.newest, chosen.snapshot.age))
    phase = Phase.COMMITTED if len(chosen.good) == chosen.group.size else Phase.REBUILT
    # What members stored earlier may be lost by now, so they announce again what they have.
    chosen = replace(chosen, phase=phase, restored=True, coding={}, finishing=frozenset(), members={})
    transition.put(chosen)
    _announce(transition, chosen, whole=_data_whole(transition, chosen))
    if phase is Phase.COMMITTED:
        coding.check_prepared(transition, coding.say_stored(transition, chosen))


def _room_for(transition: Transition, snapshot: SnapshotId) -> Copy | None:
    """Return the copy of the chosen snapshot, an empty one if there is none. Its peers fill it.

    The two buffers may hold other snapshots, if this agent was left out of a choice or went on from another one. Then
    the oldest that was neither committed nor restored makes room.
    """
    state = transition.state
    copy = state.copy(snapshot)
    if copy is not None and copy.candidate:
        return copy
    if copy is not None and copy.phase is Phase.DRAINING:
        return None
    others = [other for other in state.copies if other.candidate]
    for other in (None, *sorted(others, key=lambda each: (each.precious, each.snapshot.age))):
        if other is not None:
            transition.drop(other)
        data, parity = transition.free_buffers()
        data = data if copy is None else copy.data
        if data is not None and (parity is not None or not state.parity_buffers):
            break
    else:
        return None
    if copy is not None:  # superseded here, and the durable tier still reads its data
        return transition.put(replace(copy, phase=Phase.REBUILT, parity=parity))
    geometry = state.geometry
    if geometry is None or geometry.layout != snapshot.layout:
        geometry = Geometry(snapshot.layout, (), 0)
    return transition.put(Copy(snapshot, geometry, state.group, Phase.REBUILT, data, parity))


def _set_aside(transition: Transition, decision: Decision) -> None:
    """Keep what was not chosen. Members that have lost their memory since are no help to repair it."""
    before, after = transition.state.incarnations, decision.incarnations
    for copy in transition.state.copies:
        if not copy.candidate or copy.snapshot == decision.snapshot:
            continue
        if not copy.good:
            transition.drop(replace(copy, phase=Phase.KEPT))
            continue
        same = {slot: records for slot, records in copy.members.items() if before and before[slot] == after[slot]}
        phase = copy.phase if copy.whole else Phase.KEPT
        transition.put(replace(copy, phase=phase, coding={}, finishing=frozenset(), members=same))


def _committed_before(transition: Transition, chosen: SnapshotId | None) -> SnapshotId | None:
    """Return the newest snapshot held that is older than the chosen one and was committed or restored.

    One that was restored counts, because an agent does not know what only a dead one knew: that it was committed. An
    agent that came later may hold all of it and not know yet that all others do.
    """
    copies = transition.state.copies
    ages = [copy.snapshot for copy in copies if chosen and copy.precious and copy.snapshot.age < chosen.age]
    return max(ages, key=lambda snapshot: snapshot.age, default=None)


def _announce(transition: Transition, copy: Copy | None, *, whole: bool) -> None:
    """Announce the effect of the decision on this agent: `copy` is restored, or nothing in memory is."""
    transition.set(decided_whole=whole)
    snapshot = copy.snapshot if copy is not None else None
    transition.emit(Decided(transition.state.decided_epoch, snapshot, whole))


def follow(transition: Transition, decision: Decision, orders: tuple[tuple[int, Decode], ...]) -> None:
    """Follow a plan, which is read with its decision. Only once, and only if the decision is in force here."""
    decide(transition, decision)
    state = transition.state
    in_force = state.mode is Mode.ACTIVE and state.decided_epoch == decision.epoch
    if in_force and state.planned_epoch != decision.epoch:
        transition.set(planned_epoch=decision.epoch)
        transition.emit(FollowOrders(orders))
        _miss(transition, orders)


def _miss(transition: Transition, orders: tuple[tuple[int, Decode], ...]) -> None:
    """Request an epoch if chunks were lost after this agent had told what it holds: the plan brings none of them back.

    The members cannot repair them either, since some of them may never announce that they have all of theirs.
    """
    state, copy = transition.state, transition.state.copy(transition.state.decided)
    if copy is None or copy.phase is not Phase.REBUILT:
        return
    ordered = {order.stripe for _, order in orders if state.slot in order.targets}
    missed = sorted(set(range(copy.group.size)) - copy.good.keys() - ordered)
    if missed:
        transition.emit(RequestEpoch(f"slot {state.slot} has lost stripes {missed} since it told what it holds"))


def _data_whole(transition: Transition, copy: Copy) -> bool:
    return all(stripe in copy.good for stripe in copy.group.data_stripes(transition.state.slot))


# ---- chunks that come back, and chunks that are lost


def rebuilt(transition: Transition, event: ChunkRebuilt) -> None:
    state, copy, stripe = transition.state, transition.state.copy(event.snapshot), event.record.stripe
    if copy is None or not copy.committed or stripe in copy.good:
        return
    whole = _data_whole(transition, copy)
    sums = {**copy.rebuilt, stripe: event.sums} if stripe in copy.group.data_stripes(state.slot) else copy.rebuilt
    copy = transition.put(replace(copy, good={**copy.good, stripe: event.record}, rebuilt=sums))
    if not whole and _data_whole(transition, copy) and state.decided == copy.snapshot:
        _announce(transition, copy, whole=True)
    if len(copy.good) == copy.group.size:
        transition.log("info", f"snapshot {copy.snapshot} is whole again on slot {state.slot}")
        copy = transition.put(replace(copy, phase=Phase.COMMITTED))
        if state.slot not in copy.members and copy.snapshot == state.decided:
            coding.check_prepared(transition, coding.say_stored(transition, copy))


def scrubbed(transition: Transition, snapshot: SnapshotId, stripe: int) -> None:
    """Mark a corrupt chunk as an erasure. If its snapshot is committed, the group decodes it."""
    state, copy = transition.state, transition.state.copy(snapshot)
    if copy is None or stripe not in copy.good:
        return
    if state.mode is not Mode.ACTIVE or copy.phase is Phase.KEPT:
        transition.put(replace(copy, good={key: record for key, record in copy.good.items() if key != stripe}))
        return
    if copy.open and state.slot not in copy.members:
        if stripe in copy.group.parity_stripes(state.slot):
            coding.restart(transition, copy, stripe)
        else:
            transition.void(snapshot, f"data of slot {state.slot} was damaged before it was coded")
        return
    coding.lose(transition, copy, {stripe})
    if not copy.committed:
        return
    order = repair(transition, copy, stripe)
    if order is not None:
        transition.emit(StartDecode(order))
    elif snapshot == state.decided and state.committed != snapshot:
        # No agent would repair it, and no new snapshot might have room until it is whole.
        transition.emit(RequestEpoch(f"slot {state.slot} has lost a chunk of stripe {stripe} that was restored"))
    else:
        transition.log("error", f"snapshot {snapshot}: stripe {stripe} cannot be repaired now, too few peers")


def repair(transition: Transition, copy: Copy, stripe: int) -> Decode | None:
    """Return the order to decode this agent's chunk of a snapshot that its group has stored, or None."""
    state = transition.state
    held = {slot: next(r for r in records if r.stripe == stripe) for slot, records in copy.members.items()}
    others = [slot for slot in copy.group.members if slot in state.peers and slot in held and slot != state.slot]
    known = [held[slot] for slot in copy.group.parities(stripe) if slot in held]
    if len(others) < copy.group.data or not known:
        return None
    return Decode(
        epoch=state.epoch, snapshot=copy.snapshot, stripe=stripe, sources=tuple(others[: copy.group.data]),
        targets=(state.slot,), digests=known[0].sources, counts=known[0].counts,
        spares=tuple(others[copy.group.data :]),
    )  # fmt: skip


def undecodable(transition: Transition, event: DecodeFailed) -> None:
    """Record that some chunks do not belong together, so that no later choice or plan relies on them.

    If the snapshot is being restored, the next epoch takes other chunks, another snapshot or none. One that is merely
    repaired at rest stays as it is, until the next snapshot replaces it.
    """
    state = transition.state
    failed = Undecodable(event.snapshot, event.stripe, tuple(sorted(event.holders)))
    if state.copy(event.snapshot) is None or failed in state.undecodable:
        return
    transition.set(undecodable=state.undecodable | {failed})
    text = f"snapshot {event.snapshot}: stripe {event.stripe} does not decode from the chunks of slots {failed.holders}"
    transition.log("error", text)
    if event.snapshot == state.decided and state.committed != event.snapshot:
        transition.emit(RequestEpoch(text))


def distrust(transition: Transition, snapshot: SnapshotId, stripe: int) -> None:
    """Treat this agent's chunk as corrupt: a member has found that it does not match the rest of its stripe."""
    copy = transition.state.copy(snapshot)
    if copy is not None and stripe in copy.good:
        record: ChunkRecord = copy.good[stripe]
        transition.log("error", f"snapshot {snapshot}: chunk {record.digest:016x} of stripe {stripe} is wrong")
        scrubbed(transition, snapshot, stripe)
