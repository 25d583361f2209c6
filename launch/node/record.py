"""Records of nodes and stores in the run folder, by which status, drills and clean-up find processes.

    RUN/nodes/<node>.json      the node's slot and the pids of its supervisor, snapshot agent and workers
    RUN/nodes/store-<n>.json   the n-th store process of the run; the highest n is in use
    RUN/nodes/store-end.json   how the run ended, and under which store, for nodes cut off from it

Torch-free. A record may be out of date: a killed node cannot update its own.
"""

import contextlib
import os
from pathlib import Path
from typing import Literal

import msgspec

from keepwarm.files import READABLE, atomic_write
from keepwarm.side_writer import attempt
from keepwarm.trainer.job.run_folder import RunFolder

State = Literal["joining", "spare", "starting", "running", "restarting", "fenced", "ended"]
"""joining: looks for a store and a slot; spare: no slot is vacant; starting: workers are being started; running: they
run; restarting: they were ended and will start again; fenced: another node has the slot; ended: the supervisor left."""


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One node as last recorded by its supervisor; pids belong to the node's own host."""

    node: str
    """Name, constant during the life of the supervisor."""
    host: str
    """Address at which other nodes reach this one."""
    slot: int | None
    """Place in the layout; None for a spare."""
    supervisor: int
    agent: int | None = None
    """The snapshot agent of the slot; None without snapshots and for a spare."""
    workers: dict[int, int] = {}
    """pid by rank."""
    restart: int = 0
    """For which the workers were started: how often the ranks of the run have begun again."""
    state: State = "joining"


class StoreRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The store process and where it listens."""

    number: int
    pid: int
    host: str
    port: int
    """Of the key-value store."""
    heartbeat_port: int
    """Port to which supervisors send heartbeats."""


class EndRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended."""

    number: int
    """Number of the store that knew of the end. A later start of the same run opens a later one."""
    code: int
    reason: str


def make_folder(folder: Path) -> Path:
    """Create the folder of the records in a run folder, for its owner only, and return it."""
    nodes = RunFolder(folder).nodes
    nodes.mkdir(mode=0o700, parents=True, exist_ok=True)
    return nodes


def write(folder: Path, record: NodeRecord) -> None:
    """Replace a node's record in a run folder atomically; on a full disk the old one stays."""
    with attempt(f"{record.node}.json"):
        atomic_write(make_folder(folder) / f"{record.node}.json", msgspec.json.encode(record), mode=READABLE)


def read_all(folder: Path) -> list[NodeRecord]:
    """Return the records of a run folder ordered by node name; empty if no supervisor has ever run there."""
    found = []
    for path in sorted(RunFolder(folder).nodes.glob("*.json")):
        if not path.name.startswith("store-"):
            with contextlib.suppress(OSError, msgspec.DecodeError):
                found.append(msgspec.json.decode(path.read_bytes(), type=NodeRecord))
    return found


def write_store(folder: Path, record: StoreRecord) -> None:
    """Publish the address of a store that has begun to listen."""
    atomic_write(RunFolder(folder).nodes / f"store-{record.number}.json", msgspec.json.encode(record), mode=READABLE)


def write_end(folder: Path, record: EndRecord) -> None:
    """Record the end of the run; every supervisor that knows of it does."""
    with attempt("store-end.json"):
        atomic_write(RunFolder(folder).nodes / "store-end.json", msgspec.json.encode(record), mode=READABLE)


def read_end(folder: Path) -> EndRecord | None:
    """Return how this or an earlier start of the run ended; None if none has."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((RunFolder(folder).nodes / "store-end.json").read_bytes(), type=EndRecord)
    return None


def claim_store(folder: Path, number: int) -> bool:
    """Claim the n-th store of the run by exclusive creation; return whether the caller is to open it."""
    nodes = make_folder(folder)
    try:
        os.close(os.open(nodes / f"store-{number}.claim", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def newest_claim(folder: Path) -> int:
    """Return the highest number of a store that was opened or is about to be; -1 if there is none."""
    numbers = (path.stem.removeprefix("store-") for path in RunFolder(folder).nodes.glob("store-*.claim"))
    return max((int(number) for number in numbers if number.isdigit()), default=-1)


def newest_store(folder: Path) -> StoreRecord | None:
    """Return the newest store of a run; None before the first one is open."""
    found = []
    for path in RunFolder(folder).nodes.glob("store-*.json"):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found.append(msgspec.json.decode(path.read_bytes(), type=StoreRecord))
    return max(found, key=lambda record: record.number, default=None)
