"""What a history is about, drawn from its seed: the groups, the workers and which faults there are."""

import random
from dataclasses import dataclass, field

from tests.model_checker.port import Geometry, StripeGroup, Topology


@dataclass(frozen=True)
class Shape:
    """Groups by their sizes, chunks of parity in each, and whether there is a durable tier."""

    sizes: tuple[int, ...]
    parity: int
    disk: bool = False

    @property
    def topology(self) -> Topology:
        """Groups whose members take turns, as a placement over failure domains gives them."""
        members: list[list[int]] = [[] for _ in self.sizes]
        slot = 0
        while slot < sum(self.sizes):
            for index, size in enumerate(self.sizes):
                if len(members[index]) < size:
                    members[index].append(slot)
                    slot += 1
        return Topology(tuple(StripeGroup(index, tuple(each), self.parity) for index, each in enumerate(members)))

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.sizes))})/{self.parity}{' with disk' if self.disk else ''}"


SHAPES = (
    Shape((3,), 1),
    Shape((2, 2), 1, disk=True),
    Shape((4,), 2),
    Shape((3, 3), 1),
    Shape((4, 4), 2, disk=True),
    Shape((3, 4), 1, disk=True),
)

FAULTS = {
    "network": 0.5,
    "flaps": 0.6,
    "agents": 0.7,
    "ranks": 0.5,
    "rot": 0.5,
    "flips": 0.1,
    "late": 0.2,
    "deadlines": 0.3,
    "disasters": 0.1,
    "bursts": 0.3,
    "crashes": 0.35,
}
"""The share of histories with a kind of fault.

`flips`: parity changes before its checksum is taken. `late`: agents are called silent while they live. `deadlines`:
workers give up waiting. `disasters`: more than m agents of a group are lost. `bursts`: many steps pass in one go.
`crashes`: agents die and others go on with their memory, one at a time or all at once.
"""


@dataclass(frozen=True)
class Setting:
    """Everything that is fixed for one history."""

    seed: int
    shape: Shape
    workers: int = 1
    chunk: int = 1
    short: int = 0
    """Buckets that the last slot's state is shorter than a full buffer."""
    wait: bool = True
    warm: bool = True
    """Begins with agents that have decided their first epoch."""
    faults: frozenset[str] = frozenset()
    topology: Topology = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "topology", self.shape.topology)

    def geometry(self, slot: int) -> Geometry:
        """Return the layout of the slot's buffer: one part for each worker."""
        buckets = self.topology.group_of(slot).data * self.chunk
        if slot == self.topology.slots - 1:
            buckets -= self.short
        first = buckets // self.workers
        parts = (first, buckets - first) if self.workers == 2 else (buckets,)
        return Geometry("layout", parts, self.chunk)

    def __str__(self) -> str:
        busy = "wait" if self.wait else "skip"
        return (
            f"seed {self.seed}: groups {self.shape}, {self.workers} worker(s) a slot, {self.chunk} bucket(s) a chunk, "
            f"busy: {busy}, faults: {', '.join(sorted(self.faults)) or 'none'}"
        )


def drawn(seed: int) -> Setting:
    """Return the setting of a seed."""
    rng = random.Random(f"setting {seed}")
    shape = SHAPES[seed % len(SHAPES)]
    small = sum(shape.sizes) <= 4
    chunk = rng.choice((1, 2)) if small else 1
    others = frozenset(name for name, share in FAULTS.items() if name != "crashes" and rng.random() < share)
    crashes = random.Random(f"revived {seed}").random() < FAULTS["crashes"]  # the rest is drawn as without them
    faults = others | {"crashes"} if crashes else others
    return Setting(
        seed, shape, workers=2 if small and min(shape.sizes) - shape.parity > 1 and rng.random() < 0.4 else 1,
        chunk=chunk, short=1 if chunk == 2 and rng.random() < 0.5 else 0, wait=rng.random() < 0.6,
        warm=rng.random() < 0.8, faults=faults,
    )  # fmt: skip
