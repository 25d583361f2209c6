"""What runs where: each supervisor's record of its node in the run folder, for whoever watches, drills or cleans up.

    RUN/nodes/<node>.json      the node's slot and the pids of its supervisor, snapshot agent and workers
    RUN/nodes/store-<n>.json   the n-th store process of the run; the highest n is the present one
    RUN/nodes/store-end.json   how the run ended, and under which store, for nodes that could not reach it then

Torch-free. A record may be older than what it speaks of: a killed node cannot say so.
"""

import contextlib
import os
from pathlib import Path
from typing import Literal

import msgspec

from keepwarm.files import READABLE, atomic_write
from keepwarm.trainer.job.run_folder import RunFolder

State = Literal["joining", "spare", "starting", "running", "restarting", "fenced", "ended"]
"""joining: looks for a store and a slot; spare: no slot is vacant; starting: workers are being started; running: they
run; restarting: they were ended to be started again; fenced: another node has the slot; ended: the supervisor left."""


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One node as its supervisor last described it; pids are those of the node's own host."""

    node: str
    """Name, the same for as long as the supervisor lives."""
    host: str
    """Address at which other nodes reach it."""
    slot: int | None
    """Place in the layout; None for a spare."""
    supervisor: int
    agent: int | None = None
    """The snapshot agent of the slot; None without snapshots and for a spare."""
    workers: dict[int, int] = {}
    """pid by rank."""
    generation: int = 0
    """Round of the rendezvous that the workers were started in."""
    state: State = "joining"


class StoreRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The process in which nodes meet, and where it listens."""

    number: int
    pid: int
    host: str
    port: int
    """Of the key-value store."""
    desk: int
    """Port at which supervisors show that they live."""
    by: str
    """Node that started it."""


class EndRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended."""

    number: int
    """Of the store that was told. A later start of the same run opens a later one."""
    code: int
    reason: str


def make_folder(folder: Path) -> Path:
    """The folder of the records in a run folder; for its owner alone."""
    nodes = RunFolder(folder).nodes
    nodes.mkdir(mode=0o700, parents=True, exist_ok=True)
    return nodes


def write(folder: Path, record: NodeRecord) -> None:
    """Replace a node's record in a run folder, whole or not at all."""
    atomic_write(make_folder(folder) / f"{record.node}.json", msgspec.json.encode(record), mode=READABLE)


def read_all(folder: Path) -> list[NodeRecord]:
    """The records of a run folder in the order of their names; none when no supervisor has ever run there."""
    found = []
    for path in sorted(RunFolder(folder).nodes.glob("*.json")):
        if not path.name.startswith("store-"):
            with contextlib.suppress(OSError, msgspec.DecodeError):
                found.append(msgspec.json.decode(path.read_bytes(), type=NodeRecord))
    return found


def write_store(folder: Path, record: StoreRecord) -> None:
    """Say where a store listens, once it does."""
    atomic_write(RunFolder(folder).nodes / f"store-{record.number}.json", msgspec.json.encode(record), mode=READABLE)


def write_end(folder: Path, record: EndRecord) -> None:
    """Every supervisor that knows of the end says so."""
    atomic_write(RunFolder(folder).nodes / "store-end.json", msgspec.json.encode(record), mode=READABLE)


def read_end(folder: Path) -> EndRecord | None:
    """How this or an earlier start of the run ended; None while none has."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((RunFolder(folder).nodes / "store-end.json").read_bytes(), type=EndRecord)
    return None


def claim_store(folder: Path, number: int) -> bool:
    """Whether the caller is the one who opens the n-th store of the run: exclusive creation decides."""
    nodes = make_folder(folder)
    try:
        os.close(os.open(nodes / f"store-{number}.claim", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def newest_claim(folder: Path) -> int:
    """The highest number of a store that anyone has opened, or is about to; -1 when none was."""
    numbers = (path.stem.removeprefix("store-") for path in RunFolder(folder).nodes.glob("store-*.claim"))
    return max((int(number) for number in numbers if number.isdigit()), default=-1)


def newest_store(folder: Path) -> StoreRecord | None:
    """The present store of a run; None before the first one is open."""
    found = []
    for path in RunFolder(folder).nodes.glob("store-*.json"):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found.append(msgspec.json.decode(path.read_bytes(), type=StoreRecord))
    return max(found, key=lambda record: record.number, default=None)
