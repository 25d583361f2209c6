"""Symbolic bytes: a bucket of data is a number, a bucket of parity the set of what was added to it.

The number says which snapshot, slot and bucket it belongs to, so equal numbers are equal bytes. Adding twice the same
bucket to parity cancels out, as it does in a field of characteristic 2.
"""

from collections.abc import Collection, Mapping, Sequence

from tests.model_checker.port import StripeGroup

Age = tuple[int, int]
"""(epoch, step) of a snapshot."""
Parity = frozenset[tuple[int, int]]
"""Contributions (source, data bucket) of one bucket of parity."""
Bytes = int | Parity
Chunk = list[Bytes]
ZEROS = 0
WRONG = 1 << 61
"""Data from here on are what no worker wrote: the result of a decoding that went wrong or of bits that flipped."""
FLIPS = 1 << 20
"""The first so many are bits that flipped."""
NOTHING: Parity = frozenset()


def written(age: Age, slot: int, bucket: int) -> int:
    """Return what the workers of `slot` write to `bucket` in the snapshot."""
    return (((age[0] << 16 | age[1]) << 6 | slot) << 6 | bucket) + 1


def flipped(content: Bytes, salt: int) -> Bytes:
    """Return the content after a bit has flipped. Every `salt` gives other bytes."""
    if isinstance(content, frozenset):
        return content ^ {(-1, WRONG + salt)}
    return WRONG + salt


def checksum(content: Bytes) -> int:
    return content if isinstance(content, int) else hash(content) & ((1 << 62) - 1)


def decode(
    group: StripeGroup, stripe: int, present: Mapping[int, Chunk], wanted: Collection[int], buckets: int
) -> dict[int, Chunk]:
    """Return the chunks of the slots `wanted`, computed from k others. What does not belong together gives garbage."""
    sources = group.sources(stripe)
    out: dict[int, Chunk] = {slot: [] for slot in wanted}
    for index in range(buckets):
        column: dict[int, int] = {}
        sums: list[Parity] = []
        for slot, chunk in present.items():
            content = chunk[index] if index < len(chunk) else (ZEROS if slot in sources else NOTHING)
            if isinstance(content, frozenset):
                sums.append(content)
            else:
                column[slot] = content
        data = _solve(sources, column, sums)
        parity = frozenset((slot, data[slot]) for slot in sources if data[slot] != ZEROS)
        for slot in wanted:
            out[slot].append(data[slot] if slot in sources else parity)
    return out


def _solve(sources: Sequence[int], column: dict[int, int], sums: list[Parity]) -> dict[int, int]:
    """Return the data bucket of every source, from those in `column` and from parity."""
    unknown = [slot for slot in sources if slot not in column]
    data = dict(column)
    if not unknown:
        return data
    known = frozenset((slot, value) for slot, value in column.items() if value != ZEROS)
    rests = {each ^ known for each in sums}
    rest = next(iter(rests))
    values = {slot: [value for source, value in rest if source == slot] for slot in unknown}
    fits = len(rests) == 1 and all(len(found) < 2 for found in values.values())
    fits = fits and all(source in values for source, _ in rest)
    for slot in unknown:
        if fits:
            data[slot] = values[slot][0] if values[slot] else ZEROS
        else:
            data[slot] = WRONG + FLIPS + (hash((slot, frozenset(rests))) & (WRONG - 1))
    return data
