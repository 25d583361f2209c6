"""The protocol's part inside a group: sources send, parity accumulates each bucket once, members say Stored."""

from dataclasses import replace

from ft.events import (
    Accumulate,
    BucketArrived,
    ClearParity,
    DataVerified,
    FinishParity,
    ParityVerified,
    RequestEpoch,
    Send,
    SendChunk,
    Verify,
)  # fmt: skip
from ft.messages import ChunkEnd, ChunkLost, ChunkRecord, Known, SnapshotId, Stored, Want, digest
from ft.state import Copy, Phase, Progress
from ft.turn import Turn


def begin(turn: Turn, copy: Copy) -> None:
    """The copy has its slots: ask the sources of this agent's parity for their buckets."""
    for stripe in copy.group.parity_stripes(turn.state.slot):
        _ask_from_zero(turn, copy, stripe)


def restart(turn: Turn, copy: Copy, stripe: int) -> None:
    """Start a parity chunk over from zeros: adding is not idempotent, so nothing half-known may stay in it."""
    coding = {key: value for key, value in copy.coding.items() if key[0] != stripe}
    good = {key: record for key, record in copy.good.items() if key != stripe}
    _ask_from_zero(turn, turn.put(replace(copy, coding=coding, finishing=copy.finishing - {stripe}, good=good)), stripe)


def _ask_from_zero(turn: Turn, copy: Copy, stripe: int) -> None:
    assert copy.parity is not None
    turn.emit(ClearParity(copy.snapshot, stripe, copy.parity))
    for source in copy.group.sources(stripe):
        turn.emit(Send(source, Want(snapshot=copy.snapshot, stripe=stripe, start=0)))


def sealed(turn: Turn, copy: Copy) -> None:
    """All workers of this node have sealed: read it once, and serve who waits."""
    assert copy.data is not None
    flat = tuple(sum_ for worker in sorted(copy.sums) for sum_ in copy.sums[worker])
    turn.emit(Verify(copy.snapshot, copy.data, flat))
    mine = {key: start for key, start in turn.state.wants.items() if key[0] == copy.snapshot}
    turn.set(wants={key: start for key, start in turn.state.wants.items() if key not in mine})
    for (_, stripe, to), start in sorted(mine.items(), key=lambda item: item[0][1:]):
        _send_chunk(turn, copy, stripe, to, start)


def on_want(turn: Turn, sender: int, want: Want) -> None:
    state, snapshot = turn.state, want.snapshot
    copy, group = state.copy(snapshot), state.group
    if want.stripe not in range(group.size) or sender not in group.parities(want.stripe):
        return
    if state.slot not in group.sources(want.stripe):
        return
    if snapshot in state.void:
        turn.emit(Send(sender, Known(snapshot=snapshot, void=True)))
    elif turn.superseded(snapshot):
        return
    elif copy is None or copy.phase is Phase.FILLING:
        if copy is not None or snapshot.age > state.newest:
            turn.set(wants={**state.wants, (snapshot, want.stripe, sender): want.start})
    elif copy.open:
        _send_chunk(turn, copy, want.stripe, sender, want.start)
        if want.damaged and copy.data is not None:
            flat = tuple(sum_ for worker in sorted(copy.sums) for sum_ in copy.sums[worker])
            turn.emit(Verify(snapshot, copy.data, flat))


def _send_chunk(turn: Turn, copy: Copy, stripe: int, to: int, start: int) -> None:
    assert copy.data is not None
    slot = turn.state.slot
    if copy.verified and stripe not in copy.good:
        turn.emit(Send(to, ChunkLost(snapshot=copy.snapshot, stripe=stripe)))
        return
    first = copy.group.data_stripes(slot).index(stripe) * copy.geometry.chunk
    sums = copy.chunk_sums(slot, stripe)
    turn.emit(SendChunk(to, copy.snapshot, stripe, min(start, len(sums)), copy.data, first, sums))


def on_bucket(turn: Turn, event: BucketArrived) -> None:
    bucket, copy = event.bucket, _coding(turn, event.bucket.snapshot, event.bucket.stripe, event.sender)
    if copy is None or copy.parity is None:
        return
    key = (bucket.stripe, event.sender)
    progress = copy.coding.get(key, Progress())
    if progress.ended or bucket.index != progress.next or bucket.index >= copy.geometry.chunk:
        return
    if not event.intact:
        turn.log("warning", f"bucket {bucket.index} of stripe {bucket.stripe} from slot {event.sender} is damaged")
        want = Want(snapshot=copy.snapshot, stripe=bucket.stripe, start=progress.next, damaged=True)
        turn.emit(Send(event.sender, want))
        return
    after = Progress(progress.next + 1, digest((bucket.sum,), progress.digest))
    turn.put(replace(copy, coding={**copy.coding, key: after}))
    column = copy.group.sources(bucket.stripe).index(event.sender)
    turn.emit(Accumulate(copy.snapshot, bucket.stripe, event.sender, column, bucket.index, copy.parity))


def on_end(turn: Turn, sender: int, end: ChunkEnd) -> None:
    copy = _coding(turn, end.snapshot, end.stripe, sender)
    if copy is None or copy.parity is None:
        return
    key = (end.stripe, sender)
    progress = copy.coding.get(key, Progress())
    if progress.ended:
        return
    if progress.next < end.count <= copy.geometry.chunk:
        turn.emit(Send(sender, Want(snapshot=copy.snapshot, stripe=end.stripe, start=progress.next)))
        return
    if (progress.next, progress.digest) != (end.count, end.digest):
        turn.log("warning", f"stripe {end.stripe} starts over: slot {sender} sent other buckets than it sealed")
        restart(turn, copy, end.stripe)
        return
    coding = {**copy.coding, key: replace(progress, ended=True)}
    copy = turn.put(replace(copy, coding=coding))
    if all(coding.get((end.stripe, source), Progress()).ended for source in copy.group.sources(end.stripe)):
        assert copy.parity is not None
        turn.put(replace(copy, finishing=copy.finishing | {end.stripe}))
        turn.emit(FinishParity(copy.snapshot, end.stripe, copy.parity))


def on_lost_chunk(turn: Turn, sender: int, lost: ChunkLost) -> None:
    copy = _coding(turn, lost.snapshot, lost.stripe, sender)
    if copy is not None and turn.state.slot not in copy.members:
        turn.void(lost.snapshot, f"slot {sender} lost its chunk of stripe {lost.stripe} before it was coded")


def _coding(turn: Turn, snapshot: SnapshotId, stripe: int, sender: int) -> Copy | None:
    """The copy whose parity of `stripe` still takes buckets from `sender`."""
    copy = turn.state.copy(snapshot)
    if copy is None or not copy.open or stripe not in range(copy.group.size):
        return None
    waits = turn.state.slot in copy.group.parities(stripe) and sender in copy.group.sources(stripe)
    return copy if waits and stripe not in copy.good and stripe not in copy.finishing else None


def on_data_verified(turn: Turn, event: DataVerified) -> None:
    state, copy = turn.state, turn.state.copy(event.snapshot)
    if copy is None or copy.phase not in (Phase.SEALED, Phase.PREPARED):
        return
    group, chunk = copy.group, copy.geometry.chunk
    stripes = group.data_stripes(state.slot)
    bad = {stripes[bucket // chunk] for bucket in event.bad}
    if bad and state.slot not in copy.members:
        turn.void(event.snapshot, f"data of slot {state.slot} does not match its workers' checksums")
    elif bad:
        lose(turn, copy, bad)
    elif not copy.verified:
        records = {}
        for stripe in stripes:
            sums = copy.chunk_sums(state.slot, stripe)
            records[stripe] = ChunkRecord(stripe, digest(sums), (), len(sums))
        check_stored(turn, turn.put(replace(copy, verified=True, good={**copy.good, **records})))


def lose(turn: Turn, copy: Copy, stripes: set[int]) -> None:
    """Chunks of a stored snapshot are damaged: erasures, and those who still wait for them must not."""
    turn.put(replace(copy, good={key: record for key, record in copy.good.items() if key not in stripes}))
    turn.log("warning", f"snapshot {copy.snapshot}: damaged chunks in stripes {sorted(stripes)}")
    for stripe in sorted(stripes & set(copy.group.data_stripes(turn.state.slot))):
        for parity in copy.group.parities(stripe):
            turn.emit(Send(parity, ChunkLost(snapshot=copy.snapshot, stripe=stripe)))


def on_parity_verified(turn: Turn, event: ParityVerified) -> None:
    copy = turn.state.copy(event.snapshot)
    if copy is None or not copy.open or event.stripe not in copy.finishing:
        return
    if event.digest is None:
        turn.log("warning", f"stripe {event.stripe} starts over: its parity could not be read back")
        restart(turn, copy, event.stripe)
        return
    parts = [copy.coding[event.stripe, source] for source in copy.group.sources(event.stripe)]
    sources, counts = tuple(part.digest for part in parts), tuple(part.next for part in parts)
    record = ChunkRecord(event.stripe, event.digest, sources, copy.geometry.chunk, counts)
    finishing = copy.finishing - {event.stripe}
    check_stored(turn, turn.put(replace(copy, finishing=finishing, good={**copy.good, event.stripe: record})))


def check_stored(turn: Turn, copy: Copy) -> None:
    """Once data and all parity of this agent are good it says so, and never takes it back."""
    if copy.phase is Phase.SEALED and len(copy.good) == copy.group.size and turn.state.slot not in copy.members:
        check_prepared(turn, say_stored(turn, copy))


def say_stored(turn: Turn, copy: Copy) -> Copy:
    records = tuple(copy.good[stripe] for stripe in sorted(copy.good))
    turn.send_group(Stored(snapshot=copy.snapshot, chunks=records))
    return turn.put(replace(copy, members={**copy.members, turn.state.slot: records}))


def on_stored(turn: Turn, sender: int, stored: Stored) -> None:
    """Also when word of the commit was faster: a chunk that rots later is repaired from what the members stored.

    Of a snapshot that was chosen at recovery members say it when they have all of it again. Whoever learns it so
    answers: word of the choice may have been slower than what this agent said.
    """
    copy = turn.state.copy(stored.snapshot)
    if copy is None or sender not in copy.group.members or sender in copy.members:
        return
    if not copy.open and not copy.settled:
        return
    if {record.stripe for record in stored.chunks} != set(range(copy.group.size)):
        turn.log("error", f"slot {sender} says Stored for other stripes than its group has")
        return
    copy = turn.put(replace(copy, members={**copy.members, sender: stored.chunks}))
    own = copy.members.get(turn.state.slot)
    if own is not None and copy.snapshot == turn.state.pinned:
        turn.emit(Send(sender, Stored(snapshot=copy.snapshot, chunks=own)))
    check_prepared(turn, copy)


def check_prepared(turn: Turn, copy: Copy) -> None:
    """PREPARED: every member has stored and verified its data and its parity, and they belong together."""
    if copy.phase is not Phase.SEALED or len(copy.members) < copy.group.size:
        return
    for stripe in range(copy.group.size):
        held = {slot: next(r for r in records if r.stripe == stripe) for slot, records in copy.members.items()}
        data = [held[slot] for slot in copy.group.sources(stripe)]
        made_of = (tuple(r.digest for r in data), tuple(r.count for r in data))
        if any((held[slot].sources, held[slot].counts) != made_of for slot in copy.group.parities(stripe)):
            turn.log("error", f"snapshot {copy.snapshot}: parity of stripe {stripe} was made of other data")
            turn.emit(RequestEpoch(f"snapshot {copy.snapshot} of group {copy.group.index} does not fit together"))
            return
    turn.put(replace(copy, phase=Phase.PREPARED))
    turn.learn(copy.snapshot, frozenset({copy.group.index}))
