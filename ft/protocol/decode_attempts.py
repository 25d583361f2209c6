"""Which k chunks a stripe is decoded from: others after each failure, until none are left. Pure."""

import itertools
from collections import Counter
from collections.abc import Collection, Mapping

from keepwarm.ft.protocol.messages import Decode
from keepwarm.ft.protocol.parity_placement import StripeGroup

DAMAGED_FETCHES = 3
"""Number of times that a chunk arrives other than it was sent before its holder is left out."""


class DecodeAttempts:
    """The attempts at one stripe.

    Data chunks have known digests, but a parity chunk may be wrong and match its own. What is decoded is therefore
    compared with the digests of the data; if it differs, other parity chunks are tried.
    """

    def __init__(self, order: Decode, group: StripeGroup) -> None:
        self.using: tuple[int, ...] = order.sources
        self.holders = (*order.sources, *order.spares)
        self._sources, self._data = group.sources(order.stripe), group.data
        self._failed: set[tuple[int, ...]] = set()
        self._damaged = Counter[int]()
        self._suspects: dict[int, int] = {}

    @property
    def suspects(self) -> set[int]:
        """Return the holders of parity that failed attempts used, to compare with what another attempt computes."""
        return self._suspects.keys() - set(self.using)

    def damaged(self, slot: int) -> bool:
        """Note a chunk that arrived damaged. Return whether to gather it again, which may have failed too often."""
        self._damaged[slot] += 1
        return self._damaged[slot] < DAMAGED_FETCHES

    def without(self, slot: int, targets: Collection[int]) -> bool:
        """Use other holders than `slot`. Return False if there are too few."""
        self._damaged[slot] = DAMAGED_FETCHES
        return self._choose(targets)

    def mismatch(self, digests: Mapping[int, int], targets: Collection[int]) -> bool:
        """Use other parity, since a chunk in use is wrong. Return False if none is left.

        `digests` are those of the chunks as they were used.
        """
        self._failed.add(tuple(sorted(self.using)))
        self._suspects |= {slot: digests[slot] for slot in self.using if slot not in self._sources}
        return self._choose(targets)

    def wrong(self, digests: Mapping[int, int]) -> tuple[int, ...]:
        """Return the holders whose chunks differ from those with `digests`, computed by an attempt that succeeded."""
        return tuple(slot for slot in sorted(self.suspects) if digests[slot] != self._suspects[slot])

    def replaced(self, slots: Collection[int]) -> None:
        """Forget what failed attempts used of these holders, whose chunks are replaced."""
        for slot in slots:
            self._suspects.pop(slot, None)

    def _choose(self, targets: Collection[int]) -> bool:
        """Use all holders of data and other parity. A wrong choice of parity fails with any data."""
        here = [slot for slot in self.holders if self._damaged[slot] < DAMAGED_FETCHES and slot not in targets]
        data = [slot for slot in here if slot in self._sources]
        parity = [slot for slot in here if slot not in data]
        for chosen in itertools.combinations(parity, self._data - len(data)):
            if tuple(sorted((*data, *chosen))) not in self._failed:
                self.using = (*data, *chosen)
                return True
        return False
