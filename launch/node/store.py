"""The store in which the nodes of a run meet: a `TCPStore` in a process of its own, so that any node may die.

    python -P -m keepwarm.launch.node.store RUN_FOLDER --number N --host ADDRESS --peer-timeout SECONDS

It holds the table of slots and what workers exchange to connect. Beside it, a heartbeat server notices nodes that die
and removes them from the table. Nothing that must survive lies only here: when the process dies, the supervisor that
creates `store-<n>.claim` in the run folder opens the next one, and the supervisors fill it with what they know.
"""

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

from keepwarm.launch.node import record as node_record
from keepwarm.launch.node import shared_table, slot_table
from keepwarm.launch.node.heartbeat import HeartbeatServer
from keepwarm.launch.node.record import StoreRecord
from keepwarm.launch.node.slot_table import Table
from keepwarm.trainer.monitor import events


def main(arguments: Sequence[str]) -> None:
    """Open a store, publish its address, and serve until no supervisor needs it."""
    # Batch systems signal every process of a job. Supervisors act on that, and need their store meanwhile.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -P -m keepwarm.launch.node.store", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--peer-timeout", type=float, required=True)
    given = parser.parse_args(arguments)
    listener = socket.create_server((given.host, 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        given.host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(),
        timeout=timedelta(seconds=30),
    )  # fmt: skip

    def on_lost(node: str, cause: str, silence: float) -> None:
        _remove(store, given.folder, node, cause, silence)

    server = HeartbeatServer(given.host, given.peer_timeout, on_lost)
    record = StoreRecord(number=given.number, pid=os.getpid(), host=given.host, port=port, heartbeat_port=server.port)
    node_record.write_store(given.folder, record)
    server.run(lambda: _superseded(store, given.folder, given.number))


def _superseded(store: TCPStore, folder: Path, number: int) -> bool:
    table = shared_table.read(store)
    ended = table is not None and table.ended is not None
    return ended or node_record.newest_claim(folder) > number


def _remove(store: TCPStore, folder: Path, node: str, cause: str, silence: float) -> None:
    """Take a dead node out of the table, and record the failure if it had a slot."""
    slot: list[int | None] = [None]

    def lose(table: Table) -> Table:
        slot[0] = table.slot_of(node)
        return slot_table.lose(table, node, f"{node}: {cause}", time.time(), silence=silence)

    first = Table(slots=1, max_restarts=0)
    if shared_table.read(store) is not None and shared_table.change(store, first, lose)[1] and slot[0] is not None:
        events.append(folder, events.Failure(node=node, kind="lost", cause=cause, slots=(slot[0],)))


if __name__ == "__main__":
    main(sys.argv[1:])
