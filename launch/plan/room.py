"""Whether a run that changes its layout goes through memory: a pure decision, made beforehand."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes of host memory that the snapshots of two layouts take on a node, and how many there are."""

    before: int
    """Of the layout that ends: its agents stay until the next layout has committed."""
    after: int
    """Of the next one, and of what its ranks read from other nodes."""
    total: int
    """What is free without either of them."""

    @property
    def needed(self) -> int:
        return self.before + self.after

    @property
    def enough(self) -> bool:
        return self.needed <= self.total
