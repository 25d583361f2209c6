"""What the parts of an agent may use of it: a narrow interface, so that none of them needs to know the others."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from keepwarm.ft.agent.log import Journal
from keepwarm.ft.agent.outbox import Outbox
from keepwarm.ft.agent.workpool import WorkPool
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.codec.reed_solomon import Codec
from keepwarm.ft.discovery.config import AgentConfig
from keepwarm.ft.discovery.registry import Registry
from keepwarm.ft.memory.buffers import Memory
from keepwarm.ft.protocol.events import Event
from keepwarm.ft.protocol.state import State
from keepwarm.ft.transport.network import Network


@dataclasses.dataclass
class Arrived:
    """A bucket in a receive buffer. An effect that takes it sets `wanted` and sees to it that `done` is called."""

    data: Bytes
    done: Callable[[], None]
    wanted: bool = False


class Shell(Protocol):
    """The agent as its parts see it. All members belong to the thread that drives the selector."""

    @property
    def config(self) -> AgentConfig: ...
    @property
    def clock(self) -> Callable[[], float]:
        """Seconds of a monotonic clock."""
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
    def registry(self) -> Registry: ...
    @property
    def journal(self) -> Journal: ...
    @property
    def state(self) -> State:
        """The protocol's present state; changes with `dispatch` alone."""
        ...

    def dispatch(self, event: Event, arrived: Arrived | None = None) -> None:
        """Have the protocol handle an event and its effects carried out, after those that are under way."""
        ...

    def route(self, sender: int, incarnation: int, message: Any) -> None:
        """Handle a message of an agent, this one included."""
        ...

    def connect_peers(self, *, everyone: bool) -> None:
        """Stay connected with the slots that commits, repairs and reads need; with `everyone`, with all slots."""
        ...
