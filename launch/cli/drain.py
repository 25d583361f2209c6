"""`keepwarm drain RUN NODE`: have a node leave a run without losing a step, for maintenance or before it is lost."""

import json
import os
import secrets
import time
from pathlib import Path

import msgspec

from keepwarm.ft.errors import FtError
from keepwarm.ft.transport.auth import SECRET, load_secret
from keepwarm.ft.transport.identity import copied_from
from keepwarm.launch.errors import DrainError
from keepwarm.launch.node import record
from keepwarm.launch.node.connections import Dialled
from keepwarm.launch.node.peers import CONNECT_TIMEOUT_S, stand_of
from keepwarm.launch.node.shared_table import Answer, Drain, Hello, Request, Stand, Update
from keepwarm.launch.node.slot_table import Table
from keepwarm.launch.node.view import identity, name_of
from keepwarm.text import counted

ANSWER_TIMEOUT_S = 10.0


def drain(folder: Path, node: str, *, timeout: float, as_json: bool) -> None:
    """Ask a node, given by name or slot, to leave, and wait until the run has started without it; print the result.

    Raises:
        DrainError: there is no such run or node, the node cannot leave now, or it has not within `timeout` seconds. It
            stays then.
    """
    began = time.monotonic()
    store = _Store(folder)
    try:
        leaving = find(store.table, node)
        slot = store.table.slot_of(leaving)
        if refused := store.change(Drain(node=leaving)):
            raise DrainError(f"{node}: {refused}")
        while not has_left(store.table, leaving):
            if time.monotonic() > began + timeout:
                waits = waits_for(store.table, leaving)
                store.change(Drain(node=leaving, stop=True))
                raise DrainError(f"waited {timeout:g} s for {name_of(leaving)} to leave: {waits}; it stays", late=True)
            store.receive(0.5)
        _report(store.table, leaving, slot, time.monotonic() - began, as_json=as_json)
    except OSError as error:
        raise DrainError(
            f"{folder}: the connection to the store of the run was lost ({error}); `keepwarm status` shows its nodes",
            late=True,
        ) from error
    finally:
        store.close()


def find(table: Table, node: str) -> str:
    """Return the node with this name or slot. Pure. Raises DrainError."""
    if node.isdigit() and int(node) in table.owners:
        return table.owners[int(node)]
    everyone = (*table.owners.values(), *table.spares)
    found = next((one for one in everyone if name_of(one) == node), None)
    if found is None:
        known = ", ".join(f"{name_of(owner)} (slot {slot})" for slot, owner in table.owners.items())
        spares = ", ".join(map(name_of, table.spares)) or "none"
        raise DrainError(f"{node}: no node of the run has this name or slot; it has {known}; spares: {spares}")
    return found


def has_left(table: Table, node: str) -> bool:
    """Return whether a node has left and the workers of all slots may run without it. Pure."""
    return node in table.drained and (table.complete or table.ended is not None)


def waits_for(table: Table, node: str) -> str:
    """Return for whom the run waits, after a node was asked to leave. Pure."""
    if table.ended is not None:
        return f"the run has ended: {table.ended.reason}"
    if table.complete:
        return "the ranks have not committed a snapshot of the step in which they were asked to"
    late = [name_of(owner) for owner in table.owners.values() if owner not in table.arrived]
    vacant = [f"slot {slot} has no node" for slot in table.vacant]
    said = [f"{', '.join(late)} not ready to start the workers"] if late else []
    return "; ".join([*vacant, *said]) or f"the last owners have not agreed: {', '.join(table.waits_for)}"


def _report(table: Table, node: str, slot: int | None, seconds: float, *, as_json: bool) -> None:
    owner = None if slot is None else table.owners.get(slot)
    taken_by = None if owner is None else name_of(owner)
    found = {
        "node": name_of(node), "slot": slot, "taken_by": taken_by, "slots": table.slots, "restart": table.restart,
        "seconds": seconds,
    }  # fmt: skip
    if as_json:
        print(json.dumps(found))
    elif slot is None:
        print(f"{name_of(node)} was a spare and has left the run")
    elif taken_by is None:
        print(f"{name_of(node)} has left slot {slot}; the run goes on with {counted(table.slots, 'slot')}")
    else:
        print(f"{name_of(node)} has left slot {slot} to {taken_by} after {seconds:.1f} s")


class _Store:
    """A connection to the store that decides for a run, and the table as it was last sent."""

    def __init__(self, folder: Path) -> None:
        """Connect; raises DrainError."""
        if (original := copied_from(folder)) is not None:
            raise DrainError(f"{folder}: this is a copy of {original}, and no run of its own before it is resumed")
        try:
            secret = load_secret(folder / SECRET)
        except FtError as error:
            raise DrainError(f"{folder}: no run with supervisors was started here: {error}") from error
        stores = record.stores(folder)
        stands = [(stand_of(secret, one), one) for one in stores]
        found = [one for stand, one in stands if isinstance(stand, Stand) and stand.decides]
        if not found:
            tried = ", ".join(f"{one.host}:{one.heartbeat_port}" for one in stores) or "none is recorded"
            raise DrainError(f"{folder}: no store of this run answers ({tried}): it does not run, or not on nodes")
        address = found[0].host, found[0].heartbeat_port
        self._numbers = 0
        self._answers: dict[int, Answer] = {}
        self.table = Table(slots=1, max_restarts=0)
        try:
            self._connection = Dialled(
                secret, address, connect_timeout=CONNECT_TIMEOUT_S, timeout=ANSWER_TIMEOUT_S
            )  # fmt: skip
            self._connection.send(Hello(node=identity(f"drain-{os.getpid()}", secrets.token_hex(4)), heartbeat=False))
            self.receive(ANSWER_TIMEOUT_S)
        except OSError as error:
            raise DrainError(f"{folder}: the store at {address[0]}:{address[1]} gives no answer: {error}") from error

    def receive(self, timeout: float) -> None:
        """Take in one message. Raises OSError."""
        body = self._connection.receive(timeout)
        if body is None:
            return
        message = msgspec.json.decode(body, type=Update | Answer)
        if isinstance(message, Update):
            self.table = message.table
        else:
            self._answers[message.number] = message

    def change(self, change: Drain) -> str:
        """Ask for a change; return why it is refused. Raises OSError."""
        self._numbers += 1
        self._connection.send(Request(number=self._numbers, change=change))
        end = time.monotonic() + ANSWER_TIMEOUT_S
        while self._numbers not in self._answers:
            if time.monotonic() > end:
                raise TimeoutError(f"no answer within {ANSWER_TIMEOUT_S:g} s")
            self.receive(0.5)
        return self._answers[self._numbers].refused

    def close(self) -> None:
        self._connection.close()
