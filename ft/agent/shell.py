"""Interface through which the parts of an agent use it, so that they need not know each other."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from keepwarm.ft.agent.log import Journal
from keepwarm.ft.agent.outbox import Outbox
from keepwarm.ft.agent.workpool import WorkPool
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.codec.reed_solomon import Codec
from keepwarm.ft.discovery.config import AgentConfig
from keepwarm.ft.discovery.shared_folder import SharedFolder
from keepwarm.ft.memory.buffers import Memory
from keepwarm.ft.protocol.ballot import Promises
from keepwarm.ft.protocol.events import Event
from keepwarm.ft.protocol.state import State
from keepwarm.ft.transport.network import Network


@dataclasses.dataclass
class Arrived:
    """A bucket in a receive buffer. An effect that uses it sets `wanted` and must arrange for `done` to be called."""

    data: Bytes
    done: Callable[[], None]
    wanted: bool = False


class Shell(Protocol):
    """The agent as seen by its parts. All members belong to the thread that drives the selector."""

    @property
    def config(self) -> AgentConfig: ...
    @property
    def clock(self) -> Callable[[], float]:
        """Monotonic clock, in seconds."""
        ...

    @property
    def memory(self) -> Memory: ...
    @property
    def codec(self) -> Codec: ...
    @property
    def network(self) -> Network: ...
    @property
    def outbox(self) -> Outbox: ...
    @property
    def pool(self) -> WorkPool: ...
    @property
    def shared(self) -> SharedFolder: ...
    @property
    def journal(self) -> Journal: ...
    @property
    def state(self) -> State:
        """Current protocol state. Only `dispatch` changes it."""
        ...

    def dispatch(self, event: Event, arrived: Arrived | None = None) -> None:
        """Pass an event to the protocol and carry out its effects, after any already in progress."""
        ...

    def route(self, sender: int, incarnation: int, message: Any) -> None:
        """Handle a message from an agent, which may be this one."""
        ...

    def promise(self, promises: Promises) -> None:
        """Record promises: the next agent with this memory keeps them."""
        ...

    def connect_peers(self, *, everyone: bool) -> None:
        """Connect to the slots that commits, repairs, reads and elections need, or to all slots with `everyone`."""
        ...
