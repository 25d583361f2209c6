"""How one snapshot agent is told what to do: a JSON file, never arguments, and where it keeps what is its own."""

import hashlib
import os
import stat
from enum import IntEnum
from pathlib import Path

import msgspec

from keepwarm.files import atomic_write
from keepwarm.ft.codec.kernel import AUTO
from keepwarm.ft.errors import AgentError
from keepwarm.ft.protocol.state import Group, Topology

SOCKET = "agent.sock"
SOCKET_BYTES = 107
"""Bytes that the path of a Unix socket may have: `sun_path` of unix(7) without its last zero."""
LOCK = "lock"
LOG = "agent.log"


class AgentExit(IntEnum):
    """What an agent process ends with when it cannot begin; the process that started it acts on the code."""

    BAD_CONFIG = 2
    TAKEN = 3
    """The agent of the slot runs already, or its folder cannot be used."""
    MEMORY_TOO_SMALL = 4


class GroupConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Slots that protect each other, with `parity` chunks in each stripe."""

    members: tuple[int, ...]
    parity: int


class DurableConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Committed snapshots that become checkpoints on storage that all nodes share."""

    root: str
    every: int = 1
    """Steps: of the committed snapshots those are written whose step is a multiple, the newest if several wait."""
    keep: int = 2
    keep_every: int | None = None
    compress: bool = False
    deadline: float = 600.0
    """Seconds that the lowest slot waits for the other nodes' parts."""


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an agent is told. Paths are absolute; `folder` is on the node, `shared` on storage all nodes see."""

    run: str
    slot: int
    folder: str
    shared: str
    secret: str
    groups: tuple[GroupConfig, ...]
    state_bytes: int
    """S: bytes of the largest node state of the job."""
    bucket_bytes: int = 4 << 20
    host: str = "127.0.0.1"
    """Address to listen on for the other agents, and the one they are told."""
    port: int = 0
    rate: float | None = None
    """Bytes per second sent to all peers together; null: no cap."""
    silence: float = 5.0
    """Seconds without a byte from a peer after which it counts as lost."""
    lease: float = 60.0
    """Seconds that the agent stays after the last process that needs it has gone."""
    inventory_deadline: float = 10.0
    """Seconds that a choice at recovery waits for agents that do not answer."""
    scrub: float | None = 60.0
    """Seconds between two passes over the memory at rest; null: none."""
    threads: int = 2
    kernel: str = AUTO
    """Codec kernel: `auto`, or a name in `keepwarm.ft.codec.kernel.KERNELS`."""
    durable: DurableConfig | None = None

    def __post_init__(self) -> None:
        if self.bucket_bytes < 4096 or self.bucket_bytes % 4096 or self.bucket_bytes > 64 << 20:
            raise ValueError(f"bucket_bytes is {self.bucket_bytes}, must be a multiple of 4096 of at most 64 MiB")
        if self.state_bytes < 0 or self.threads < 1 or self.lease <= 0 or self.silence <= 0:
            raise ValueError("state_bytes, threads, lease and silence must be positive")
        slots = sorted(slot for group in self.groups for slot in group.members)
        if slots != list(range(len(slots))) or self.slot not in slots:
            raise ValueError(f"groups must hold each slot once, from 0 on, and slot {self.slot} among them")

    @property
    def topology(self) -> Topology:
        return Topology(
            tuple(
                Group(index=i, members=group.members, parity=group.parity if len(group.members) > 1 else 0)
                for i, group in enumerate(self.groups)
            )
        )

    @property
    def socket(self) -> Path:
        """Raises `AgentError` when the folder's path is too long for a socket in it."""
        path = Path(self.folder) / SOCKET
        if (size := len(os.fsencode(path))) > SOCKET_BYTES:
            raise AgentError(
                f"{path}: the path of a socket has at most {SOCKET_BYTES} bytes, this one {size}: set XDG_RUNTIME_DIR "
                "to a folder with a shorter path on every node, as /tmp"
            )
        return path


def load(path: Path) -> AgentConfig:
    try:
        return msgspec.json.decode(path.read_bytes(), type=AgentConfig)
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise AgentError(f"{path}: {error}") from error


def write(config: AgentConfig) -> Path:
    """Store the config in the agent's folder, which is made, readable by its owner alone."""
    folder = private_folder(Path(config.folder))
    path = folder / "agent.json"
    atomic_write(path, msgspec.json.format(msgspec.json.encode(config)))
    return path


NODE = "KEEPWARM_NODE"
"""Environment variable that names the node, where several are emulated on one machine: each has agents of its own."""


def runtime_folder(run: str, slot: int) -> Path:
    """Where the agent of a run and slot keeps its socket on this node; short, as socket paths must be."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    root = Path(base) / "keepwarm" if base else Path("/tmp") / f"keepwarm-{os.geteuid()}"
    node = os.environ.get(NODE)
    suffix = f".{hashlib.sha256(node.encode()).hexdigest()[:8]}" if node else ""
    return root / f"{_folder_name(run)}-{slot}{suffix}"


def agents_here(run: str) -> dict[int, Path]:
    """The socket of every agent of a run that has a folder on this node, by slot; the agent may be dead."""
    folders = runtime_folder(run, 0).parent.glob(f"{_folder_name(run)}-*")
    by_age = sorted(folders, key=_changed)  # of emulated nodes the last that had the slot
    found = {int(folder.name.rpartition("-")[2].partition(".")[0]): folder / SOCKET for folder in by_age}
    return dict(sorted(found.items()))


def _changed(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # its agent has just left
        return 0.0


def _folder_name(run: str) -> str:
    return hashlib.sha256(run.encode()).hexdigest()[:16]


def private_folder(path: Path) -> Path:
    """Make `path` and its parent 0700; refuse when they are someone else's."""
    for folder in (path.parent, path):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise AgentError(f"{path}: must be a folder of user {os.geteuid()}, it is not: remove it")
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path
