"""The one place that names the product: the events, messages and pure functions of `keepwarm.ft.protocol`.

Nothing else in this folder imports the product, so that a renamed message is followed here alone.
"""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keepwarm.ft.errors import AgentError
from keepwarm.ft.protocol import events, messages, restore_choice
from keepwarm.ft.protocol.kept_memory import kept, resumed
from keepwarm.ft.protocol.messages import Bucket, ChunkEnd, ChunkRecord, Decision, Decode, SnapshotId, Wire, digest
from keepwarm.ft.protocol.parity_placement import StripeGroup
from keepwarm.ft.protocol.state import Copy, Geometry, Mode, State, Topology, initial
from keepwarm.ft.protocol.step import inventory, step
from keepwarm.ft.worker.client import AgentClient

__all__ = [
    "Bucket",
    "ChunkEnd",
    "ChunkRecord",
    "Copy",
    "Decision",
    "Decode",
    "Geometry",
    "Mode",
    "SnapshotId",
    "State",
    "StripeGroup",
    "Topology",
    "digest",
    "events",
    "initial",
    "inventory",
    "kept",
    "messages",
    "resumed",
    "step",
]

Orders = tuple[tuple[int, Decode], ...]


@dataclass(frozen=True)
class Verdict:
    """What a chooser makes of the inventories it has. `wait`: it needs more of them."""

    wait: bool
    snapshot: SnapshotId | None = None


def choose(
    inventories: Mapping[int, messages.Inventory], groups: Sequence[StripeGroup], slots: int, *, late: bool
) -> Verdict:
    """Choose what to restore. `late`: the chooser's patience with silent slots is over."""
    answer = restore_choice.choose(inventories, groups, range(slots), late)
    if isinstance(answer, restore_choice.Wait):
        return Verdict(wait=True)
    return Verdict(wait=False, snapshot=getattr(answer, "snapshot", None))


def plan(inventories: Mapping[int, messages.Inventory], groups: Sequence[StripeGroup], decision: Decision) -> Orders:
    """Return the decode orders of a decision that restores something."""
    if decision.snapshot is None:
        return ()
    present = [slot for slot, incarnation in enumerate(decision.incarnations) if incarnation]
    return restore_choice.plan(inventories, groups, decision.snapshot, decision.epoch, present)


# ---- repairs: what a decoder does when chunks are lost or do not belong together

_DECODE_FAILED: Any = getattr(events, "DecodeFailed", None)
_CHUNK_WRONG: Any = getattr(messages, "ChunkWrong", None)
LOST_IS_TOLD = _DECODE_FAILED is not None
"""Whether the holder of a lost chunk tells the decoder so. If not, it requests another epoch."""


def spares(order: Decode) -> tuple[int, ...]:
    """Return the holders that an order names beside its sources."""
    return tuple(getattr(order, "spares", ()))


def accusation(order: Decode) -> Any:
    """Return the message that tells a holder that its chunk does not belong to the rest of its stripe."""
    return _CHUNK_WRONG(epoch=order.epoch, snapshot=order.snapshot, stripe=order.stripe)


def decoding_failed(node: Any, order: Decode, holders: tuple[int, ...]) -> None:
    """Tell the protocol that no k chunks of the holders decode to what was written."""
    if _DECODE_FAILED is not None:
        node.dispatch(_DECODE_FAILED(order.snapshot, order.stripe, holders))
    else:
        reason = f"stripe {order.stripe} cannot be repaired from the chunks of slots {holders}"
        node.dispatch(events.EpochNeeded(node.state.epoch, reason))


def needs_epoch(state: State, snapshot: SnapshotId) -> bool:
    """Return whether only another epoch helps when a chunk cannot be rebuilt: its snapshot is being restored."""
    return not LOST_IS_TOLD or (snapshot == state.decided and snapshot != state.committed)


def gives_up_silently() -> bool:
    """Return whether a worker whose wait for a buffer is over leaves its agent without a word.

    Asks the worker's own code, with a wait of 0 seconds and its messages caught.
    """
    said: list[Wire] = []

    class Client(AgentClient):
        def __init__(self) -> None:
            self.run, self.worker, self.deadline = "run", 0, 0.0
            self._news, self._mail, self._why, self._interrupted = threading.Condition(), [], "", False

        def _send(self, message: Wire) -> None:
            said.append(message)

    with contextlib.suppress(AgentError):
        Client().open(SnapshotId("run", 1, 1, "layout"), deadline=0.0)
    return not any(isinstance(message, messages.Cancel) for message in said)
