"""Configuration of a snapshot agent, passed as a JSON file and never as arguments, and its private folder."""

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Literal

import msgspec

from keepwarm.files import atomic_write
from keepwarm.ft.codec.kernel import AUTO
from keepwarm.ft.errors import AgentError
from keepwarm.ft.groups import check_bucket
from keepwarm.ft.protocol.parity_placement import StripeGroup
from keepwarm.ft.protocol.state import Topology

SOCKET = "agent.sock"
SOCKET_BYTES = 107
"""Maximum bytes of a Unix socket path: `sun_path` of unix(7) without the trailing NUL."""
CONFIG = "agent.json"
"""An agent's configuration, in its folder on the node."""


START_S = 60.0
"""Time that an agent may take to start, in seconds, besides that for its memory."""
FAULTED_IN_A_SECOND = 1 << 30
"""Bytes of memory that any host faults in within a second; usual are 5 to 10 times as many."""


class GroupConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Slots that protect each other, with `parity` chunks in each stripe."""

    members: tuple[int, ...]
    parity: int


class DurableConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Committed snapshots that become checkpoints on storage shared by all nodes."""

    root: str
    every: int = 1
    """Write committed snapshots whose step is a multiple of this; only the newest if several are waiting."""
    keep: int = 2
    keep_every: int | None = None
    compress: bool = False
    deadline: float = 600.0
    """Seconds the lowest slot waits for the other nodes' parts."""


class FormerLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The layout before the present one, whose agents still hold its state."""

    generation: int
    slots: int
    """Number of its nodes."""
    slot: int | None
    """That of its agents to which the ranks of this node attach; None: this node has none, and reads from others."""
    epoch: int
    """The decision of these agents on what is restored, already begun."""


class LayoutAgents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The agents that the ranks of one start use.

    A run that changes its number of nodes counts its layouts. Each has agents of its own, in folders of their own, so
    that those of the next layout start beside those that hold the state of the one before.
    """

    generation: int = 0
    former: FormerLayout | None = None


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Complete agent configuration. Paths are absolute; `folder` is on the node, `shared` on shared storage."""

    run: str
    slot: int
    generation: int = 0
    """Number of the layout whose agents these are, see `LayoutAgents`."""
    folder: str
    shared: str
    secret: str
    groups: tuple[GroupConfig, ...]
    state_bytes: int
    """S, the bytes of the job's largest node state."""
    bucket_bytes: int = 4 << 20
    host: str = "127.0.0.1"
    """Address to listen on for the other agents, which is also the advertised address."""
    port: int = 0
    rate: float | None = None
    """Bytes per second sent to all peers together. null: no cap."""
    silence: float = 5.0
    """Seconds without a byte from a peer after which it counts as lost."""
    lease: float = 60.0
    """Seconds the agent stays after the last process that needs it is gone."""
    inventory_deadline: float = 10.0
    """Seconds a recovery decision waits for agents that do not answer."""
    scrub: float | None = 60.0
    """Seconds between scrubs of the memory at rest. null: no scrubbing."""
    authenticate: Literal["control", "all"] = "control"
    """What carries a MAC on the network: control frames, or the bytes of the state too."""
    threads: int = 2
    kernel: str = AUTO
    """Codec kernel: `auto`, or a name in `keepwarm.ft.codec.kernel.KERNELS`."""
    durable: DurableConfig | None = None

    def __post_init__(self) -> None:
        if self.bucket_bytes < 4096 or self.bucket_bytes % 4096 or self.bucket_bytes > 64 << 20:
            raise ValueError(f"bucket_bytes is {self.bucket_bytes}, must be a multiple of 4096 of at most 64 MiB")
        check_bucket(self.state_bytes, self.bucket_bytes)
        if self.state_bytes < 0 or self.threads < 1 or self.lease <= 0 or self.silence <= 0:
            raise ValueError("state_bytes, threads, lease and silence must be positive")
        slots = sorted(slot for group in self.groups for slot in group.members)
        if slots != list(range(len(slots))) or self.slot not in slots:
            raise ValueError(f"groups must hold each slot once, from 0 on, and slot {self.slot} among them")

    @property
    def topology(self) -> Topology:
        return Topology(
            tuple(
                StripeGroup(index=i, members=group.members, parity=group.parity if len(group.members) > 1 else 0)
                for i, group in enumerate(self.groups)
            )
        )

    @property
    def start_seconds(self) -> float:
        """Time within which the agent must have started: it faults in all of its memory first."""
        group = self.topology.group_of(self.slot)
        copies = (2 if self.durable is None else 3) + 2 * group.parity / group.data
        return START_S + copies * self.state_bytes / FAULTED_IN_A_SECOND

    @property
    def socket(self) -> Path:
        """Return the socket's path. Raise `AgentError` if it is too long for a Unix socket."""
        path = Path(self.folder) / SOCKET
        if (size := len(os.fsencode(path))) > SOCKET_BYTES:
            raise AgentError(
                f"{path}: the path of a socket has at most {SOCKET_BYTES} bytes, this one {size}: set XDG_RUNTIME_DIR "
                "to a folder with a shorter path on every node, as /tmp"
            )
        return path


def load(path: Path, descriptor: int) -> AgentConfig:
    """Return what the keeper read from `path` when it started, from its copy of it."""
    try:
        content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        return msgspec.json.decode(content, type=AgentConfig)
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise AgentError(f"{path}: {error}") from error


def write(config: AgentConfig) -> Path:
    """Write the config to the agent's folder, which is created if needed and readable only by its owner."""
    folder = private_folder(Path(config.folder))
    path = folder / CONFIG
    atomic_write(path, msgspec.json.format(msgspec.json.encode(config)))
    return path


NODE = "KEEPWARM_NODE"
"""Environment variable that names the node if several are emulated on one machine, each with its own agents."""


def runtime_folder(run: str, slot: int, generation: int = 0) -> Path:
    """Return the folder of an agent's socket on this node. It is short, because socket paths must be."""
    layout = f".g{generation}" if generation else ""
    return _runtime_root() / f"{_folder_name(run)}-{slot}{layout}{_node_suffix()}"


def runtime_folders(run: str) -> list[Path]:
    """Return the folders of a run's agents on this node, of every layout. The agents may be dead."""
    name = re.compile(rf"{_folder_name(run)}-\d+(\.g\d+)?{re.escape(_node_suffix())}")
    root = _runtime_root()
    return [folder for folder in root.glob(f"{_folder_name(run)}-*") if name.fullmatch(folder.name)]


def _runtime_root() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "keepwarm" if base else Path("/tmp") / f"keepwarm-{os.geteuid()}"


def _node_suffix() -> str:
    node = os.environ.get(NODE)
    return f".{hashlib.sha256(node.encode()).hexdigest()[:8]}" if node else ""


def agents_here(run: str) -> dict[int, Path]:
    """Return the sockets, by slot, of a run's agents with a folder on this node. The agents may be dead."""
    folders = _runtime_root().glob(f"{_folder_name(run)}-*")
    by_age = sorted(folders, key=_changed)  # of several emulated nodes or layouts, the last to own the slot
    found = {int(folder.name.rpartition("-")[2].partition(".")[0]): folder / SOCKET for folder in by_age}
    return dict(sorted(found.items()))


def _changed(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # its agent has just exited
        return 0.0


def _folder_name(run: str) -> str:
    return hashlib.sha256(run.encode()).hexdigest()[:16]


def private_folder(path: Path) -> Path:
    """Create `path` and its parent with mode 0700. Refuse links and folders that another user owns or can change."""
    for folder in (path.parent, path):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise AgentError(f"{folder}: must be a folder of user {os.geteuid()}, it is not: remove it")
        if folder != path and status.st_mode & 0o022:
            mode = stat.S_IMODE(status.st_mode)
            raise AgentError(
                f"{folder}: other users can change it (mode {mode:04o}): remove it, or chmod go-w {folder}"
            )
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path
