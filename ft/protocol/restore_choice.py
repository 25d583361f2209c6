"""Choose what to restore after a failure and plan the decoding. Pure: the same inventories give the same answer.

A candidate is a snapshot for which every stripe of every group has k chunks that belong together: parity chunks that
recorded the same data digests, data chunks with those digests, or all data chunks. Chunks that have failed to decode
together do not count. The highest (epoch, step) wins.

No minority gives up what the members hold. To restore nothing, or something older than a snapshot that a member knows
to have been committed, takes either proof, which is that the members that have not answered could not change the
result, or answers from a majority of the members of every group.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from keepwarm.ft.protocol.messages import ChunkRecord, Decode, Inventory, SnapshotId
from keepwarm.ft.protocol.parity_placement import StripeGroup

NOTHING_HELD = "no agent holds a snapshot in memory"
Version = tuple[tuple[int, int], ...]
"""(digest, count) of the k data chunks of a stripe, by column. Chunks with equal versions belong together."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Restore this snapshot. `lost` is the largest number of chunks missing from any of its stripes."""

    snapshot: SnapshotId
    lost: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for these slots: they have not answered and could change the result.

    `too_few`: not even the deadline ends this, because too few members have answered to give anything up.
    """

    slots: tuple[int, ...]
    too_few: bool = False


@dataclass(frozen=True, slots=True)
class FallBack:
    """Nothing in memory can be restored. `reason` says why the newest snapshot cannot."""

    reason: str


@dataclass(frozen=True, slots=True)
class StripeState:
    """The largest set of chunks of one stripe that belong together."""

    holders: tuple[int, ...]
    version: Version
    """Empty if no holder has parity and not all data is present: then it is not a codeword yet."""
    failed: tuple[frozenset[int], ...] = ()
    """Sets of holders within which no k chunks decode to the version."""

    def subsets(self, holders: Sequence[int], k: int) -> Iterator[tuple[int, ...]]:
        """Yield the choices of k of the holders that have not failed, those of the first holders first."""
        for chosen in itertools.combinations(holders, k):
            if not any(failed.issuperset(chosen) for failed in self.failed):
                yield chosen

    def decodable(self, k: int) -> bool:
        return next(self.subsets(self.holders, k), None) is not None


def choose(
    inventories: Mapping[int, Inventory],
    groups: Sequence[StripeGroup],
    expected: Collection[int],
    deadline_passed: bool,
) -> Choice | Wait | FallBack:
    """Choose what to restore from the inventories received so far, by slot.

    `expected` are the members: the slots whose agents should answer. They are awaited until the deadline, unless no
    answer of theirs can yield a newer snapshot, and beyond it as long as too few have answered to give anything up.
    Inventories from an epoch older than another's are late and treated as missing.
    """
    epoch = max((inventory.epoch for inventory in inventories.values()), default=0)
    here = {slot: inventory for slot, inventory in inventories.items() if inventory.epoch == epoch}
    missing = frozenset(expected) - set(here)
    seen = _held(here)
    best = next((snapshot for snapshot in seen if _lost(here, groups, snapshot) is not None), None)
    if missing and _could_change(here, groups, seen, best, missing):
        too_few = _gives_up(here, best) and not _majority(here, groups, expected)
        if too_few or not deadline_passed:
            return Wait(tuple(sorted(missing)), too_few)
    if best is not None:
        return Choice(best, _lost(here, groups, best) or 0)
    return FallBack(_why_not(here, groups, seen) + _unheard(missing, deadline_passed))


def plan(
    inventories: Mapping[int, Inventory], groups: Sequence[StripeGroup], snapshot: SnapshotId, epoch: int,
    present: Collection[int],
) -> tuple[tuple[int, Decode], ...]:  # fmt: skip
    """Return orders (decoder, order) that complete `snapshot` on the slots `present`, data chunks before parity.

    Every decoder holds one of the stripe's good chunks, so it fetches k - 1 others. The stripes of a group are assigned
    to the survivors with the least work, so that each decodes different ones and a replacement receives S, not k S.
    """
    data_first: list[tuple[int, Decode]] = []
    parity_later: list[tuple[int, Decode]] = []
    for group in groups:
        decoding, sending = Counter[int](), Counter[int]()
        for later in (False, True):
            for stripe in range(group.size):
                role = group.parities(stripe) if later else group.sources(stripe)
                state = stripe_state(inventories, group, snapshot, stripe)
                targets = tuple(s for s in role if s in present and s not in state.holders)
                if not targets or len(state.holders) < group.data:
                    continue
                by_work = sorted(state.holders, key=lambda s: (decoding[s], sending[s], s))
                decoder = by_work[0]
                rest = sorted(by_work[1:], key=lambda s: (sending[s], decoding[s], s))
                sources = next(state.subsets((decoder, *rest), group.data), None)
                if sources is None:
                    continue
                decoding[sources[0]] += 1
                sending.update(sources[1:])
                order = Decode(
                    epoch=epoch, snapshot=snapshot, stripe=stripe, sources=sources, targets=targets,
                    digests=tuple(digest for digest, _ in state.version),
                    counts=tuple(count for _, count in state.version),
                    spares=tuple(slot for slot in state.holders if slot not in sources),
                )  # fmt: skip
                decoder = sources[0]
                (parity_later if later else data_first).append((decoder, order))
    return (*data_first, *parity_later)


def stripe_state(
    inventories: Mapping[int, Inventory], group: StripeGroup, snapshot: SnapshotId, stripe: int
) -> StripeState:
    """Return the largest set of a stripe's holders whose chunks belong together, and their version."""
    chunks = {slot: record for slot in group.members if (record := _record(inventories, slot, snapshot, stripe))}
    sources = group.sources(stripe)
    versions = {_version(chunks[slot]) for slot in group.parities(stripe) if slot in chunks}
    if all(slot in chunks for slot in sources):
        versions.add(tuple((chunks[slot].digest, chunks[slot].count) for slot in sources))
    failed = tuple(
        frozenset(each.holders)
        for inventory in inventories.values()
        for each in inventory.undecodable
        if (each.snapshot, each.stripe) == (snapshot, stripe)
    )
    best = StripeState((), (), failed)
    for version in sorted(version for version in versions if len(version) == group.data):
        data = {slot for slot, known in zip(sources, version, strict=True) if _data(chunks.get(slot)) == known}
        parity = {slot for slot in group.parities(stripe) if slot in chunks and _version(chunks[slot]) == version}
        holders = tuple(slot for slot in group.members if slot in data | parity)
        if len(holders) > len(best.holders):
            best = StripeState(holders, version, failed)
    return best


def _data(record: ChunkRecord | None) -> tuple[int, int] | None:
    return (record.digest, record.count) if record else None


def _version(record: ChunkRecord) -> Version:
    return tuple(zip(record.sources, record.counts, strict=True))


def _record(inventories: Mapping[int, Inventory], slot: int, snapshot: SnapshotId, stripe: int) -> ChunkRecord | None:
    inventory = inventories.get(slot)
    holdings = inventory.holdings if inventory else ()
    chunks = next((holding.chunks for holding in holdings if holding.snapshot == snapshot), ())
    return next((record for record in chunks if record.stripe == stripe), None)


def _held(inventories: Mapping[int, Inventory]) -> list[SnapshotId]:
    """Return the snapshots held by any agent, newest first."""
    held = {holding.snapshot for inventory in inventories.values() for holding in inventory.holdings}
    return sorted(held, key=lambda each: (each.age, each.layout), reverse=True)


def _gives_up(inventories: Mapping[int, Inventory], best: SnapshotId | None) -> bool:
    """Return whether restoring `best` (None: nothing) gives up what a member knows to have been committed, or all."""
    committed = (each.snapshot.age for one in inventories.values() for each in one.holdings if each.committed)
    return best is None or any(age > best.age for age in committed)


def _majority(inventories: Mapping[int, Inventory], groups: Sequence[StripeGroup], expected: Collection[int]) -> bool:
    """Return whether a majority of the expected members of every group has answered."""
    members = [frozenset(group.members).intersection(expected) for group in groups]
    return all(2 * len(each & inventories.keys()) > len(each) for each in members)


def _lost(inventories: Mapping[int, Inventory], groups: Sequence[StripeGroup], snapshot: SnapshotId) -> int | None:
    """Return the largest number of chunks missing from a stripe, or None if a stripe cannot be decoded."""
    most = 0
    for group in groups:
        for stripe in range(group.size):
            state = stripe_state(inventories, group, snapshot, stripe)
            if not state.decodable(group.data):
                return None
            most = max(most, group.size - len(state.holders))
    return most


def _could_change(
    inventories: Mapping[int, Inventory], groups: Sequence[StripeGroup], seen: Sequence[SnapshotId],
    best: SnapshotId | None, missing: frozenset[int],
) -> bool:  # fmt: skip
    """Return whether chunks on the missing slots could complete a newer snapshot, known or unknown."""
    newer = seen[: seen.index(best)] if best is not None else seen
    for snapshot in newer:
        if all(
            len(_possible(inventories, group, snapshot, stripe, missing)) >= group.data
            for group in groups
            for stripe in range(group.size)
        ):
            return True
    return all(len(missing.intersection(group.members)) >= group.data for group in groups)


def _possible(
    inventories: Mapping[int, Inventory], group: StripeGroup, snapshot: SnapshotId, stripe: int, missing: frozenset[int]
) -> set[int]:
    """Return the members that have, or could have, a chunk of the stripe."""
    return {s for s in group.members if s in missing or _record(inventories, s, snapshot, stripe) is not None}


def _why_not(inventories: Mapping[int, Inventory], groups: Sequence[StripeGroup], seen: Sequence[SnapshotId]) -> str:
    if not seen:
        return NOTHING_HELD
    for group in groups:
        for stripe in range(group.size):
            state = stripe_state(inventories, group, seen[0], stripe)
            matching = state.holders
            held = _possible(inventories, group, seen[0], stripe, frozenset())
            if len(matching) >= group.data and not state.decodable(group.data):
                return (
                    f"snapshot {seen[0]}: stripe {stripe} of group {group.index} does not decode to what was written, "
                    f"from any {group.data} of the chunks of slots {sorted(matching)}"
                )
            if len(matching) < group.data:
                mixed = ", which do not belong together" if len(held) >= group.data else ""
                return (
                    f"snapshot {seen[0]}: stripe {stripe} of group {group.index} needs {group.data} good chunks and "
                    f"has {len(held)}{mixed}; those of slots {sorted(set(group.members) - held)} are lost"
                )
    return "no snapshot in memory is complete"


def _unheard(missing: frozenset[int], deadline_passed: bool) -> str:
    if not missing:
        return ""
    how = "did not answer in time" if deadline_passed else "had not answered yet, and alone cannot change that"
    return f"; slots {sorted(missing)} {how}"
