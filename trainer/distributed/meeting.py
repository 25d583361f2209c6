"""Wait for work that takes the other ranks long, such as writing a checkpoint, outside of collectives.

A collective has a deadline that knows nothing of how much there is to do. Here ranks report through the store how far
they are, and a wait ends early only if no rank has reported anything for a while.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from torch._C._distributed_c10d import Store
from torch.distributed import DistStoreError

REPORT_EVERY_S = 1.0
"""How often a rank at work reports, and one that waits looks."""


@dataclass(kw_only=True, slots=True)
class Meeting:
    """One place in the program that all ranks reach, each in its own time. Every meeting has a name of its own."""

    store: Store | None
    """None: no rank is waited for; the collective that follows waits."""
    name: str
    size: int
    stall: timedelta
    """How long nothing may move."""
    stopped: threading.Event = field(default_factory=threading.Event)
    """Set by another thread to end the wait."""
    moved: Callable[[], object] = lambda: None
    """Called whenever this rank or another one has moved."""
    clock: Callable[[], float] = time.monotonic
    _reported: float = field(init=False, default=0.0)

    def advance(self) -> None:
        """Report that this rank's work goes on; call it as often as convenient."""
        if self.clock() - self._reported < REPORT_EVERY_S:
            return
        self._reported = self.clock()
        self.moved()
        if self.store is not None:
            self.store.add(f"{self.name}/moved", 1)

    def arrive(self) -> bool:
        """Report that this rank's work is done, and return whether all ranks have arrived.

        False: nothing has moved for `stall`. The next collective then names a rank that is missing.

        Raises:
            RuntimeError: the store is gone, or the wait was stopped: the peers are lost.
        """
        if self.store is None:
            return True
        if self.store.add(f"{self.name}/arrived", 1) == self.size:
            self.store.set(f"{self.name}/all", "")
        seen, since = (0, 0), self.clock()
        while not self._all(self.store):
            now = self._count(self.store, "arrived"), self._count(self.store, "moved")
            if self.stopped.is_set():
                raise RuntimeError(f"{self.name}: stopped while {self.size - now[0]} ranks were at work")
            if now != seen:
                seen, since = now, self.clock()
                self.moved()
            elif self.clock() - since > self.stall.total_seconds():
                return False
        return True

    def _all(self, store: Store) -> bool:
        """Return whether all ranks have arrived; wait for them a moment."""
        try:
            store.wait([f"{self.name}/all"], timedelta(seconds=REPORT_EVERY_S))
        except DistStoreError:
            return False
        return True

    def _count(self, store: Store, what: str) -> int:
        key = f"{self.name}/{what}"
        return int(store.get(key)) if store.check([key]) else 0
