"""What happens to an agent's protocol (events) and what it wants done (effects).

The shell (`keepwarm.ft.agent.agent`) passes one event at a time to `keepwarm.ft.protocol.step.step` and carries the
effects out in order. Every field is a value; an effect that needs no answer says nothing more, the others name the
event that answers them. A snapshot that an effect's answer belongs to may be gone by then: `step` ignores answers it
does not expect.
"""

import enum
from dataclasses import dataclass
from typing import TypeAlias

from keepwarm.ft.protocol.messages import AgentMessage, Bucket, ChunkRecord, Decision, Decode, SnapshotId
from keepwarm.ft.protocol.state import Geometry, Topology


class Reason(enum.Enum):
    """Why a snapshot was refused; what the worker should do is in the words."""

    BUSY = "the previous snapshot is not committed yet: skip this one"
    VOID = "another node cannot take part in this snapshot: skip it"
    EPOCH = "the snapshot belongs to another epoch: go on under the agent's epoch, after a restore if there was one"
    RECOVERING = "the agents are deciding what to restore: offer the next step again"
    FOREIGN = "the snapshot belongs to another run or layout: attach again"
    STALE = "this step was offered before in this epoch"


# ---- events


@dataclass(frozen=True, slots=True)
class Configured:
    """Workers of a layout have attached. `topology` is new only when the layout's nodes are others than before."""

    geometry: Geometry
    topology: Topology | None = None


@dataclass(frozen=True, slots=True)
class WorkerOpened:
    """A worker asks for a buffer. With `wait` it can wait until the previous snapshot is committed."""

    worker: int
    snapshot: SnapshotId
    wait: bool = True


@dataclass(frozen=True, slots=True)
class WorkerSealed:
    """A worker has written its part; `sums` are the xxh3_64 of its buckets."""

    worker: int
    snapshot: SnapshotId
    sums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WorkerCancelled:
    """A living worker gave up a snapshot (or its wait for one) and will not touch the buffer again."""

    worker: int
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's process is dead: the shell has made sure of it (pidfd), so that it cannot write any more."""

    worker: int


@dataclass(frozen=True, slots=True)
class DataVerified:
    """Answer to `Verify`: `bad` are the buckets of the data buffer whose bytes do not match their checksum."""

    snapshot: SnapshotId
    bad: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ParityVerified:
    """Answer to `FinishParity`: the digest of the finished parity chunk as read back, or None when that failed."""

    snapshot: SnapshotId
    stripe: int
    digest: int | None


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A link to another agent is authenticated."""

    slot: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The link to another agent is gone."""

    slot: int


@dataclass(frozen=True, slots=True)
class PeerAway:
    """An agent without which nothing is committed has had no link for so long that nobody should wait for it."""

    slot: int


@dataclass(frozen=True, slots=True)
class Received:
    """A message came over the link to `sender`, in its incarnation `incarnation`. Not for `Bucket`."""

    sender: int
    incarnation: int
    message: AgentMessage


@dataclass(frozen=True, slots=True)
class BucketArrived:
    """A bucket lies in a receive buffer; `intact`: its bytes have the checksum that its header says.

    The buffer is free again when the effects of this event are carried out.
    """

    sender: int
    incarnation: int
    bucket: Bucket
    intact: bool


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """The background scrub read this agent's chunk of a stripe; `intact`: it still has its digest."""

    snapshot: SnapshotId
    stripe: int
    intact: bool


@dataclass(frozen=True, slots=True)
class ChunkRebuilt:
    """All `Part`s of this agent's chunk of `stripe` arrived and lie in the buffer, each with its checksum.

    `sums` are the checksums of its buckets, for data chunks; `record` identifies it. The shell has compared it with
    what the group recorded where that is known (`Decode.digests`).
    """

    snapshot: SnapshotId
    record: ChunkRecord
    sums: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EpochAdvanced:
    """The supervisor or a peer began a new epoch. Lower ones than the present are ignored."""

    epoch: int


@dataclass(frozen=True, slots=True)
class EpochNeeded:
    """Something was found in `epoch` that only the next epoch can mend. Nothing when another one has begun."""

    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class PlanRead:
    """A decision was read where it was written, with its plan: (decoder, order) of every chunk that is rebuilt."""

    decision: Decision
    orders: tuple[tuple[int, Decode], ...]


@dataclass(frozen=True, slots=True)
class DurableStarted:
    """The durable tier begins to read a committed snapshot's data buffer."""

    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class DurableEnded:
    """The durable tier needs the snapshot no longer, written or not."""

    snapshot: SnapshotId


Event: TypeAlias = (
    Configured | WorkerOpened | WorkerSealed | WorkerCancelled | WorkerLost | DataVerified | ParityVerified
    | PeerConnected | PeerLost | PeerAway | Received | BucketArrived | Scrubbed | ChunkRebuilt | EpochAdvanced
    | EpochNeeded | PlanRead | DurableStarted | DurableEnded
)  # fmt: skip


# ---- effects


@dataclass(frozen=True, slots=True)
class Grant:
    """Tell the worker to write its part into data buffer `buffer`, from bucket `first` on (`messages.Granted`)."""

    worker: int
    snapshot: SnapshotId
    buffer: int
    first: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the worker that it gets no buffer (`messages.Refused`)."""

    worker: int
    snapshot: SnapshotId
    reason: Reason


@dataclass(frozen=True, slots=True)
class Revoke:
    """Tell the worker to stop writing (`messages.Revoked`). Answer: `WorkerCancelled` or `WorkerLost`."""

    worker: int
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to another agent. Messages to one agent stay in order while its link lasts; dropped without."""

    to: int
    message: AgentMessage


@dataclass(frozen=True, slots=True)
class SendChunk:
    """Send this agent's data chunk of a stripe as `Bucket`s from bucket `start` on, then a `ChunkEnd`.

    `sums` are those of all buckets of the chunk, from 0; `first` is the bucket of the data buffer where it begins.
    Replaces an unfinished sending of the same (snapshot, stripe, to). Staggering and bandwidth are the shell's.
    """

    to: int
    snapshot: SnapshotId
    stripe: int
    start: int
    buffer: int
    first: int
    sums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StopCoding:
    """Forget unfinished sending, verifying and coding of a snapshot; its buffers may be given to another one."""

    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class Verify:
    """Read the data buffer against the workers' checksums. Answer: `DataVerified`."""

    snapshot: SnapshotId
    buffer: int
    sums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClearParity:
    """Make this agent's parity chunk of a stripe zero before it accumulates (again)."""

    snapshot: SnapshotId
    stripe: int
    buffer: int


@dataclass(frozen=True, slots=True)
class Accumulate:
    """Add the bucket that just arrived into bucket `index` of the parity of a stripe, with `source`'s coefficient.

    Emitted exactly once for each (snapshot, stripe, source, index) after a `ClearParity` of that stripe.
    """

    snapshot: SnapshotId
    stripe: int
    source: int
    column: int
    index: int
    buffer: int


@dataclass(frozen=True, slots=True)
class FinishParity:
    """All sources of a stripe are in: read the parity chunk and checksum it. Answer: `ParityVerified`."""

    snapshot: SnapshotId
    stripe: int
    buffer: int


@dataclass(frozen=True, slots=True)
class Commit:
    """The snapshot is committed: tell the workers, the durable tier and the log."""

    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class Release:
    """A snapshot has left its buffers (None: it had none, or keeps that one). They may be granted again."""

    snapshot: SnapshotId
    data: int | None
    parity: int | None


@dataclass(frozen=True, slots=True)
class Decided:
    """The decision of this epoch is in force: answer workers' `Restore` from the state when `whole`.

    `whole` is False while own data chunks are missing; another `Decided` follows when they are back.
    """

    epoch: int
    snapshot: SnapshotId | None
    buffer: int | None
    whole: bool


@dataclass(frozen=True, slots=True)
class FollowOrders:
    """Once per epoch, when its decision is in force: decode what `orders` ask of this agent, expect what others decode.

    Each is (decoder, order).
    """

    orders: tuple[tuple[int, Decode], ...]


@dataclass(frozen=True, slots=True)
class StartDecode:
    """Fetch from `order.sources`, decode, check against `order.digests`, send to `order.targets`."""

    order: Decode


@dataclass(frozen=True, slots=True)
class SendPart:
    """Send this agent's chunk of a stripe (data or parity) as `Part`s from bucket `start` on."""

    to: int
    snapshot: SnapshotId
    stripe: int
    start: int


@dataclass(frozen=True, slots=True)
class BeginEpoch:
    """Tell the workers of the new epoch, that copies in progress are given up (`messages.EpochBegan`)."""

    epoch: int


@dataclass(frozen=True, slots=True)
class RequestEpoch:
    """Ask the supervisors for a new epoch; repeated requests for one cause are harmless."""

    reason: str


@dataclass(frozen=True, slots=True)
class Log:
    """A line for the log: level is `info`, `warning` or `error`."""

    level: str
    text: str


Effect: TypeAlias = (
    Grant | Refuse | Revoke | Send | SendChunk | StopCoding | Verify | ClearParity | Accumulate | FinishParity
    | Commit | Release | Decided | FollowOrders | StartDecode | SendPart | BeginEpoch | RequestEpoch | Log
)  # fmt: skip
