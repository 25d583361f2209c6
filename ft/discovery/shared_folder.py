"""The folder shared by all nodes as an agent's only loop sees it: nothing here waits for the storage.

A thread of its own reads and writes the files of `keepwarm.ft.discovery.registry`. The loop asks, goes on with what it
knows, and is called when there is an answer. A folder that hangs delays what needs it, which is finding agents that
have moved and writing choices, and nothing else.
"""

import functools
import math
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from keepwarm.ft.discovery.registry import Endpoint, Registry
from keepwarm.ft.protocol.messages import Address, Choice

LOOK_INTERVAL_S = 0.2
"""Least time between two looks at a slot's address, in seconds."""
CLOSE_S = 5.0
"""How long an agent that ends waits for its last writes, in seconds."""
Job = tuple[Callable[[], Any], "Future[Any]"]


class SharedFolder:
    """Everything that the loop asks of the folder. Its methods and callbacks belong to the loop's thread."""

    def __init__(
        self, registry: Registry, slot: int, follow: Callable[["Future[Any]", Callable[[Any], None]], None],
        clock: Callable[[], float] = time.monotonic, newest: int | None = None,
    ) -> None:  # fmt: skip
        """`newest` is the newest epoch that the agent knows, if any. `follow(future, then)` calls in the loop."""
        self._registry, self._slot, self._follow, self._clock = registry, slot, follow, clock
        self.moved: Callable[[int], None] = lambda slot: None
        """Called with a slot whose address has become known, or has changed."""
        self.newest_epoch = newest or 0
        """The highest epoch that was seen decided or saved in this run. It never shrinks."""
        self.looked_at = -math.inf
        """When that was read last."""
        self.published = False
        """Whether the folder has this agent's address, as far as known."""
        self.displaced = False
        """Whether a later agent of this slot has published its address."""
        self._endpoints: dict[int, Endpoint | None] = {}
        self._told: dict[int, Endpoint] = {}
        self._looked: dict[int, float] = {}
        self._reasons: dict[int, str] = {}
        self._asked: set[Hashable] = set()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="shared-folder", daemon=True)
        self._thread.start()
        self.look_newest()

    @property
    def failure(self) -> str:
        """What the last attempt to write failed with, or that it has not ended."""
        return self._registry.failure or "the folder does not answer"

    def close(self, incarnation: int) -> None:
        """Withdraw this agent's address and wait for that, at most `CLOSE_S`. Nothing is called back any more."""
        with self._lock:
            self._closed = True
        self._jobs.put((functools.partial(self._registry.withdraw, self._slot, incarnation), Future()))
        self._jobs.put(None)
        self._thread.join(CLOSE_S)

    # ---- addresses

    def publish(self, address: tuple[str, int], incarnation: int) -> None:
        """Have the folder hold this agent's address, also after it was deleted: call this from time to time."""
        mine = Endpoint(host=address[0], port=address[1], incarnation=incarnation)

        def published(held: Endpoint | None) -> None:
            self.published = held == mine
            self.displaced = held is not None and held.incarnation > incarnation

        self._ask("publish", functools.partial(_publish, self._registry, self._slot, mine), published)

    def keep(self, template: bytes, choice: Choice | None) -> None:
        """Have the folder hold what other nodes start agents from, and the choice in force, also after a deletion."""
        self._ask("keep", functools.partial(self._registry.keep, template, choice), lambda _: None)

    def look(self, slots: Iterable[int], *, again: bool = False) -> None:
        """Read the addresses of slots, each if that was not done a moment ago.

        With `again`, in any case, and a slot that had none may have one until the folder answers.
        """
        now = self._clock()
        for slot in slots:
            if again:
                self._looked.pop(slot, None)
                if self._endpoints.get(slot, True) is None:
                    del self._endpoints[slot]
            if now - self._looked.get(slot, -LOOK_INTERVAL_S) >= LOOK_INTERVAL_S:
                read = functools.partial(self._registry.endpoint, slot)
                if self._ask(("endpoint", slot), read, functools.partial(self._found, slot)):
                    self._looked[slot] = now

    def may_have(self, slot: int) -> bool:
        """Return whether a slot has published an address, or the folder has not answered yet."""
        return self._endpoints.get(slot, True) is not None

    def resolve(self, slot: int) -> tuple[str, int] | None:
        """Return a slot's address as last read, and read it again."""
        self.look([slot])
        endpoint = self._endpoints.get(slot)
        return None if endpoint is None else (endpoint.host, endpoint.port)

    def introduced(self, agents: Mapping[int, Address]) -> None:
        """Learn where agents are from others than the folder, which may not answer."""
        for slot, agent in agents.items():
            if slot != self._slot:
                self._told[slot] = Endpoint(host=agent.host, port=agent.port, incarnation=agent.incarnation)
                self._found(slot, self._endpoints.get(slot))

    def _found(self, slot: int, endpoint: Endpoint | None) -> None:
        """Take in what the folder has of a slot: it may be late, and of two incarnations the later one counts."""
        told = self._told.get(slot)
        if told is not None and (endpoint is None or endpoint.incarnation < told.incarnation):
            endpoint = told
        before, self._endpoints[slot] = self._endpoints.get(slot), endpoint
        if endpoint is not None and endpoint != before:
            self.moved(slot)

    # ---- epochs

    def look_newest(self) -> None:
        """Read the newest epoch again; `looked_at` tells when it has been read."""

        def looked(epoch: int) -> None:
            self.newest_epoch, self.looked_at = max(self.newest_epoch, epoch), self._clock()

        self._ask("newest", self._registry.newest_epoch, looked)

    def choice(self, epoch: int, then: Callable[[Choice | None], None]) -> None:
        """Read the choice of an epoch, unless that is under way."""
        self._ask(("choice", epoch), functools.partial(self._registry.choice, epoch), then)

    def choose(self, choice: Choice, then: Callable[[Choice | None], None]) -> bool:
        """Write the choice of an epoch, of which the first one stands. Return False if that is under way already."""
        return self._ask(("choose", choice.decision.epoch), functools.partial(self._registry.settle, choice), then)

    def note(self, choice: Choice, then: Callable[[Choice | None], None]) -> None:
        """Have the folder hold a choice that stands without it. `then` is told what it has."""
        self._ask(("note", choice.decision.epoch), functools.partial(self._registry.note, choice), then)

    def learn(self, epoch: int, reason: str) -> None:
        """Remember why an epoch restores nothing."""
        if reason:
            self._reasons = {epoch: reason}

    def reason(self, epoch: int) -> str:
        """Return why an epoch restores nothing, as far as its choice says so."""
        return self._reasons.get(epoch, "no committed snapshot is left in memory")

    # ---- the thread

    def _ask(self, key: Hashable, work: Callable[[], Any], then: Callable[[Any], None]) -> bool:
        """Have `work` done on the thread and `then(result)` called in the loop, unless the same is under way."""
        if key in self._asked:
            return False

        def told(result: Any) -> None:
            self._asked.discard(key)
            then(result)

        self._asked.add(key)
        future: Future[Any] = Future()
        self._follow(future, told)
        self._jobs.put((work, future))
        return True

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, future = job
            try:
                result, error = work(), None
            except Exception as raised:  # a defect, which the loop raises
                result, error = None, raised
            with self._lock:  # the loop takes answers for as long as this is held
                if self._closed:
                    continue
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)


def _publish(registry: Registry, slot: int, mine: Endpoint) -> Endpoint | None:
    """Write an endpoint unless it is there or a later incarnation has published its own. Return what is there now."""
    held = registry.endpoint(slot)
    if held == mine or (held is not None and held.incarnation > mine.incarnation):
        return held
    return mine if registry.publish(slot, (mine.host, mine.port), mine.incarnation) else None
