"""Protocol within a group: sources send, parity accumulates each bucket once, members announce `Stored`."""

from msgspec.structs import replace

from keepwarm.ft.protocol.events import (  # fmt: skip
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
)
from keepwarm.ft.protocol.messages import ChunkEnd, ChunkLost, ChunkRecord, SnapshotId, Stored, Want, digest
from keepwarm.ft.protocol.state import Copy, Phase, Progress
from keepwarm.ft.protocol.transition import Transition


def begin(transition: Transition, copy: Copy) -> None:
    """Request buckets from the sources of this agent's parity, once the copy has its buffers."""
    for stripe in copy.group.parity_stripes(transition.state.slot):
        _ask_from_zero(transition, copy, stripe)


def restart(transition: Transition, copy: Copy, stripe: int) -> None:
    """Restart a parity chunk from zeros: adding is not idempotent, so no partial sum of unknown content may remain."""
    coding = {key: value for key, value in copy.coding.items() if key[0] != stripe}
    good = {key: record for key, record in copy.good.items() if key != stripe}
    _ask_from_zero(
        transition, transition.put(replace(copy, coding=coding, finishing=copy.finishing - {stripe}, good=good)), stripe
    )


def _ask_from_zero(transition: Transition, copy: Copy, stripe: int) -> None:
    assert copy.parity is not None
    transition.emit(ClearParity(copy.snapshot, stripe, copy.parity))
    for source in copy.group.sources(stripe):
        transition.emit(Send(source, Want(snapshot=copy.snapshot, stripe=stripe, start=0)))


def sealed(transition: Transition, copy: Copy) -> None:
    """Verify the data and serve waiting parity holders, once all workers of this node have sealed."""
    assert copy.data is not None
    flat = tuple(sum_ for worker in sorted(copy.sums) for sum_ in copy.sums[worker])
    transition.emit(Verify(copy.snapshot, copy.data, flat))
    mine = {key: start for key, start in transition.state.wants.items() if key[0] == copy.snapshot}
    transition.set(wants={key: start for key, start in transition.state.wants.items() if key not in mine})
    for (_, stripe, to), start in sorted(mine.items(), key=lambda item: item[0][1:]):
        _send_chunk(transition, copy, stripe, to, start)


def on_want(transition: Transition, sender: int, want: Want) -> None:
    state, snapshot = transition.state, want.snapshot
    copy, group = state.copy(snapshot), state.group
    if want.stripe not in range(group.size) or sender not in group.parities(want.stripe):
        return
    if state.slot not in group.sources(want.stripe):
        return
    if transition.answer_if_void(snapshot, sender) or transition.superseded(snapshot):
        return
    if copy is None or copy.phase is Phase.FILLING:
        if copy is not None or snapshot.age > state.newest:
            transition.set(wants={**state.wants, (snapshot, want.stripe, sender): want.start})
    elif copy.open:
        _send_chunk(transition, copy, want.stripe, sender, want.start)
        if want.damaged and copy.data is not None:
            flat = tuple(sum_ for worker in sorted(copy.sums) for sum_ in copy.sums[worker])
            transition.emit(Verify(snapshot, copy.data, flat))


def _send_chunk(transition: Transition, copy: Copy, stripe: int, to: int, start: int) -> None:
    assert copy.data is not None
    slot = transition.state.slot
    if copy.verified and stripe not in copy.good:
        transition.emit(Send(to, ChunkLost(snapshot=copy.snapshot, stripe=stripe)))
        return
    first = copy.group.data_stripes(slot).index(stripe) * copy.geometry.chunk
    sums = copy.chunk_sums(slot, stripe)
    transition.emit(SendChunk(to, copy.snapshot, stripe, min(start, len(sums)), copy.data, first, sums))


def on_bucket(transition: Transition, event: BucketArrived) -> None:
    bucket, copy = event.bucket, _coding(transition, event.bucket.snapshot, event.bucket.stripe, event.sender)
    if copy is None or copy.parity is None:
        return
    key = (bucket.stripe, event.sender)
    progress = copy.coding.get(key, Progress())
    if progress.ended or bucket.index != progress.next or bucket.index >= copy.geometry.chunk:
        return
    if not event.intact:
        transition.log(
            "warning", f"bucket {bucket.index} of stripe {bucket.stripe} from slot {event.sender} is damaged"
        )
        want = Want(snapshot=copy.snapshot, stripe=bucket.stripe, start=progress.next, damaged=True)
        transition.emit(Send(event.sender, want))
        return
    after = Progress(progress.next + 1, digest((bucket.sum,), progress.digest))
    transition.put(replace(copy, coding={**copy.coding, key: after}))
    column = copy.group.sources(bucket.stripe).index(event.sender)
    transition.emit(Accumulate(copy.snapshot, bucket.stripe, event.sender, column, bucket.index, copy.parity))


def on_end(transition: Transition, sender: int, end: ChunkEnd) -> None:
    copy = _coding(transition, end.snapshot, end.stripe, sender)
    if copy is None or copy.parity is None:
        return
    key = (end.stripe, sender)
    progress = copy.coding.get(key, Progress())
    if progress.ended:
        return
    if progress.next < end.count <= copy.geometry.chunk:
        transition.emit(Send(sender, Want(snapshot=copy.snapshot, stripe=end.stripe, start=progress.next)))
        return
    if (progress.next, progress.digest) != (end.count, end.digest):
        transition.log("warning", f"stripe {end.stripe} starts over: slot {sender} sent other buckets than it sealed")
        restart(transition, copy, end.stripe)
        return
    coding = {**copy.coding, key: replace(progress, ended=True)}
    copy = transition.put(replace(copy, coding=coding))
    if all(coding.get((end.stripe, source), Progress()).ended for source in copy.group.sources(end.stripe)):
        assert copy.parity is not None
        transition.put(replace(copy, finishing=copy.finishing | {end.stripe}))
        transition.emit(FinishParity(copy.snapshot, end.stripe, copy.parity))


def on_lost_chunk(transition: Transition, sender: int, lost: ChunkLost) -> None:
    copy = _coding(transition, lost.snapshot, lost.stripe, sender)
    if copy is not None and transition.state.slot not in copy.members:
        transition.void(lost.snapshot, f"slot {sender} lost its chunk of stripe {lost.stripe} before it was coded")


def _coding(transition: Transition, snapshot: SnapshotId, stripe: int, sender: int) -> Copy | None:
    """Return the copy whose parity of `stripe` still accepts buckets from `sender`, or None."""
    copy = transition.state.copy(snapshot)
    if copy is None or not copy.open or stripe not in range(copy.group.size):
        return None
    waits = transition.state.slot in copy.group.parities(stripe) and sender in copy.group.sources(stripe)
    return copy if waits and stripe not in copy.good and stripe not in copy.finishing else None


def on_data_verified(transition: Transition, event: DataVerified) -> None:
    state, copy = transition.state, transition.state.copy(event.snapshot)
    if copy is None or copy.phase not in (Phase.SEALED, Phase.PREPARED):
        return
    group, chunk = copy.group, copy.geometry.chunk
    stripes = group.data_stripes(state.slot)
    bad = {stripes[bucket // chunk] for bucket in event.bad}
    if bad and state.slot not in copy.members:
        transition.void(event.snapshot, f"data of slot {state.slot} does not match its workers' checksums")
    elif bad:
        lose(transition, copy, bad)
    elif not copy.verified:
        records = {}
        for stripe in stripes:
            sums = copy.chunk_sums(state.slot, stripe)
            records[stripe] = ChunkRecord(stripe, digest(sums), (), len(sums))
        check_stored(transition, transition.put(replace(copy, verified=True, good={**copy.good, **records})))


def lose(transition: Transition, copy: Copy, stripes: set[int]) -> None:
    """Mark damaged chunks of a stored snapshot as erasures and tell the agents still waiting for them."""
    transition.put(replace(copy, good={key: record for key, record in copy.good.items() if key not in stripes}))
    transition.log("warning", f"snapshot {copy.snapshot}: damaged chunks in stripes {sorted(stripes)}")
    for stripe in sorted(stripes & set(copy.group.data_stripes(transition.state.slot))):
        for parity in copy.group.parities(stripe):
            transition.emit(Send(parity, ChunkLost(snapshot=copy.snapshot, stripe=stripe)))


def on_parity_verified(transition: Transition, event: ParityVerified) -> None:
    copy = transition.state.copy(event.snapshot)
    if copy is None or not copy.open or event.stripe not in copy.finishing:
        return
    if event.digest is None:
        transition.log("warning", f"stripe {event.stripe} starts over: its parity could not be read back")
        restart(transition, copy, event.stripe)
        return
    parts = [copy.coding[event.stripe, source] for source in copy.group.sources(event.stripe)]
    sources, counts = tuple(part.digest for part in parts), tuple(part.next for part in parts)
    record = ChunkRecord(event.stripe, event.digest, sources, copy.geometry.chunk, counts)
    finishing = copy.finishing - {event.stripe}
    check_stored(
        transition, transition.put(replace(copy, finishing=finishing, good={**copy.good, event.stripe: record}))
    )


def check_stored(transition: Transition, copy: Copy) -> None:
    """Announce `Stored` once all data and parity of this agent are good. It is never withdrawn."""
    if copy.phase is Phase.SEALED and len(copy.good) == copy.group.size and transition.state.slot not in copy.members:
        check_prepared(transition, say_stored(transition, copy))


def say_stored(transition: Transition, copy: Copy) -> Copy:
    records = tuple(copy.good[stripe] for stripe in sorted(copy.good))
    copy = transition.put(replace(copy, members={**copy.members, transition.state.slot: records}))
    transition.send_group(stored(transition, copy))
    return copy


def stored(transition: Transition, copy: Copy) -> Stored:
    """Return what this agent has announced of the snapshot."""
    return Stored(
        snapshot=copy.snapshot,
        chunks=copy.members[transition.state.slot],
        epoch=transition.statement_epoch(copy.snapshot),
    )


def on_stored(transition: Transition, sender: int, announced: Stored) -> None:
    """Record what a member stored, even after the commit is known: it is needed to repair chunks that decay later.

    For a snapshot chosen at recovery, members announce `Stored` once they have all of it again.
    """
    copy = transition.state.copy(announced.snapshot)
    if transition.answer_if_void(announced.snapshot, sender):
        return
    if copy is None or sender not in copy.group.members or sender in copy.members:
        return
    if not copy.open and not copy.committed:
        return
    if {record.stripe for record in announced.chunks} != set(range(copy.group.size)):
        transition.log("error", f"slot {sender} says Stored for other stripes than its group has")
        return
    check_prepared(transition, transition.put(replace(copy, members={**copy.members, sender: announced.chunks})))


def check_prepared(transition: Transition, copy: Copy) -> None:
    """Enter PREPARED once every member has stored and verified its data and its parity, and these belong together.

    A snapshot chosen at recovery keeps its phase, but is announced to be PREPARED in this epoch all the same.
    """
    restored = copy.snapshot == transition.state.decided and copy.committed
    if len(copy.members) < copy.group.size or not (restored or copy.phase is Phase.SEALED):
        return
    for stripe in range(copy.group.size):
        held = {slot: next(r for r in records if r.stripe == stripe) for slot, records in copy.members.items()}
        data = [held[slot] for slot in copy.group.sources(stripe)]
        made_of = (tuple(r.digest for r in data), tuple(r.count for r in data))
        if any((held[slot].sources, held[slot].counts) != made_of for slot in copy.group.parities(stripe)):
            transition.log("error", f"snapshot {copy.snapshot}: parity of stripe {stripe} was made of other data")
            transition.emit(RequestEpoch(f"snapshot {copy.snapshot} of group {copy.group.index} does not fit together"))
            return
    if not restored:
        transition.put(replace(copy, phase=Phase.PREPARED))
    transition.learn(copy.snapshot, frozenset({copy.group.index}))
