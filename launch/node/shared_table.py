"""The table of `keepwarm.launch.node.slot_table` in the store, under one key changed by compare-and-set."""

from collections.abc import Callable

import msgspec
from torch._C._distributed_c10d import TCPStore

from keepwarm.launch.node.slot_table import Table

_KEY = "keepwarm/table"


def change(store: TCPStore, first: Table, step: Callable[[Table], Table]) -> tuple[Table, bool]:
    """Replace the table by `step(table)`, retrying while other nodes are faster; return (table, whether it changed).

    `first` is the table of a store that has none yet.
    """
    text = store.get(_KEY).decode() if store.check([_KEY]) else ""
    while True:
        table = msgspec.json.decode(text, type=Table) if text else first
        after = step(table)
        if after == table:
            return table, False
        wanted = msgspec.json.encode(after).decode()
        text = store.compare_set(_KEY, text, wanted).decode()
        if text == wanted:
            return after, True


def read(store: TCPStore) -> Table | None:
    """Return the table; None before the first node has joined."""
    return msgspec.json.decode(store.get(_KEY), type=Table) if store.check([_KEY]) else None
