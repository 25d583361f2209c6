"""Which member of a group holds parity of which stripe: the rotation of RAID-6."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StripeGroup:
    """Nodes that protect each other with `parity` (m) chunks in each of their `size` stripes, one stripe per member.

    Parity rotates as in RAID-6 (Chen et al., 1994, section 3): row r of stripe t is on `members[(t + r) % size]`. The
    other k = size - m members, in the order of `members`, hold the data chunks of columns 0 ... k-1. Every member thus
    holds one chunk of every stripe, data in k of them and parity in m, and any m members may be lost. With S the bytes
    of the largest member state, each member holds m S / k of parity and sends and receives m S.
    """

    index: int
    members: tuple[int, ...]
    parity: int
    size: int = field(init=False, repr=False, compare=False)
    data: int = field(init=False, repr=False, compare=False)
    """k, the number of data chunks per stripe and per member."""
    _parities: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    """What `parities` returns: it is asked for with every message."""

    def __post_init__(self) -> None:
        size, rows = len(self.members), range(self.parity)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "data", size - self.parity)
        parities = (tuple(self.members[(stripe + row) % size] for row in rows) for stripe in range(size))
        object.__setattr__(self, "_parities", tuple(parities))

    def parities(self, stripe: int) -> tuple[int, ...]:
        """Return the slots that hold the stripe's parity, in row order."""
        return self._parities[stripe % self.size]

    def sources(self, stripe: int) -> tuple[int, ...]:
        """Return the slots that hold the stripe's data, in column order."""
        parities = self.parities(stripe)
        return tuple(slot for slot in self.members if slot not in parities)

    def data_stripes(self, slot: int) -> tuple[int, ...]:
        """Return the stripes in which the slot holds data, in the order of its chunks 0 ... k-1.

        Chunk c of member i belongs to stripe i + 1 + c, so members that send in order load all receivers equally.
        """
        first = self.members.index(slot) + 1
        return tuple((first + chunk) % self.size for chunk in range(self.data))

    def parity_stripes(self, slot: int) -> tuple[int, ...]:
        """Return the stripes whose parity the slot holds, in the order of its parity chunks."""
        return tuple(t for t in range(self.size) if slot in self.parities(t))
