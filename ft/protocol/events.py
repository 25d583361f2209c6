"""Events an agent's protocol receives and effects it requests.

The shell (`keepwarm.ft.agent.agent`) passes one event at a time to `keepwarm.ft.protocol.step.step` and carries out the
effects in order. Every field is a value. An effect that expects an answer names the event that answers it. The snapshot
concerned may be gone by then: `step` ignores answers it does not expect.
"""

import enum
from dataclasses import dataclass
from typing import TypeAlias

from keepwarm.ft.protocol.messages import AgentMessage, Bucket, ChunkRecord, Decision, Decode, SnapshotId
from keepwarm.ft.protocol.state import Geometry, Topology


class Reason(enum.Enum):
    """Why a snapshot was refused. The value also says what the worker should do."""

    BUSY = "the previous snapshot is not committed yet: skip this one"
    NO_ROOM = "there is no room until the restored snapshot is whole on all nodes: skip this one"
    VOID = "another node cannot take part in this snapshot: skip it"
    EPOCH = "the snapshot belongs to another epoch: go on under the agent's epoch, after a restore if there was one"
    RECOVERING = "the agents are deciding what to restore: offer the next step again"
    FOREIGN = "the snapshot belongs to another run or layout: attach again"
    STALE = "this step was offered before in this epoch"


# ---- events


@dataclass(frozen=True, slots=True)
class Configured:
    """The workers of a layout have attached. `topology` is set only if the layout's nodes differ from before."""

    geometry: Geometry
    topology: Topology | None = None


@dataclass(frozen=True, slots=True)
class WorkerOpened:
    """A worker requests a buffer. With `wait`, it can wait until the previous snapshot is committed.

    The worker has completed a step from what this epoch restored, and gives up every older snapshot that it has not
    sealed.
    """

    worker: int
    snapshot: SnapshotId
    wait: bool = True


@dataclass(frozen=True, slots=True)
class WorkerSealed:
    """A worker has written its part. `sums` are the xxh3_64 checksums of its buckets."""

    worker: int
    snapshot: SnapshotId
    sums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WorkerCancelled:
    """A live worker has cancelled a snapshot (or its wait for one) and will not touch the buffer again."""

    worker: int
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's process is dead. The shell has verified this (pidfd), so the process can no longer write."""

    worker: int


@dataclass(frozen=True, slots=True)
class DataVerified:
    """Answer to `Verify`. `bad` lists the buckets of the data buffer that do not match their checksums."""

    snapshot: SnapshotId
    bad: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ParityVerified:
    """Answer to `FinishParity`: the digest of the finished parity chunk as read back, or None if that failed."""

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
    """The link to another agent is lost."""

    slot: int


@dataclass(frozen=True, slots=True)
class PeerAway:
    """An agent required for commits has been disconnected for so long that no worker should wait for it."""

    slot: int


@dataclass(frozen=True, slots=True)
class Received:
    """A message arrived over the link to `sender` in its incarnation `incarnation`. Not used for `Bucket`."""

    sender: int
    incarnation: int
    message: AgentMessage


@dataclass(frozen=True, slots=True)
class BucketArrived:
    """A bucket is in a receive buffer. `intact`: its bytes match the checksum in its header.

    The buffer is free again once the effects of this event have been carried out.
    """

    sender: int
    incarnation: int
    bucket: Bucket
    intact: bool


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """The background scrub has read this agent's chunk of a stripe. `intact`: it still matches its digest."""

    snapshot: SnapshotId
    stripe: int
    intact: bool


@dataclass(frozen=True, slots=True)
class ChunkRebuilt:
    """All `Part`s of this agent's chunk of `stripe` have arrived in the buffer, each matching its checksum.

    `sums` are the checksums of its buckets, for data chunks; `record` identifies it. The shell has compared it with the
    group's record where that is known (`Decode.digests`).
    """

    snapshot: SnapshotId
    record: ChunkRecord
    sums: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EpochAdvanced:
    """The supervisor or a peer has begun a new epoch. Epochs lower than the current one are ignored."""

    epoch: int


@dataclass(frozen=True, slots=True)
class EpochNeeded:
    """A problem in `epoch` can only be resolved by the next epoch. Ignored if another epoch has begun."""

    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class DecodeFailed:
    """The chunks of `holders` do not decode to what was written in `stripe`, whichever k of them are taken."""

    snapshot: SnapshotId
    stripe: int
    holders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlanRead:
    """A decision was read from the shared folder with its plan: (decoder, order) for every chunk to rebuild."""

    decision: Decision
    orders: tuple[tuple[int, Decode], ...]


@dataclass(frozen=True, slots=True)
class DurableStarted:
    """The durable tier starts reading a committed snapshot's data buffer."""

    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class DurableEnded:
    """The durable tier no longer needs the snapshot, whether or not it was written."""

    snapshot: SnapshotId


Event: TypeAlias = (
    Configured | WorkerOpened | WorkerSealed | WorkerCancelled | WorkerLost | DataVerified | ParityVerified
    | PeerConnected | PeerLost | PeerAway | Received | BucketArrived | Scrubbed | ChunkRebuilt | EpochAdvanced
    | EpochNeeded | DecodeFailed | PlanRead | DurableStarted | DurableEnded
)  # fmt: skip


# ---- effects


@dataclass(frozen=True, slots=True)
class Grant:
    """Tell the worker to write its part into data buffer `buffer`, starting at bucket `first` (`messages.Granted`)."""

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
    """Send a message to another agent. Messages to one agent keep their order while its link lasts.

    Without a link the message is dropped.
    """

    to: int
    message: AgentMessage


@dataclass(frozen=True, slots=True)
class SendChunk:
    """Send this agent's data chunk of a stripe as `Bucket`s starting at bucket `start`, then a `ChunkEnd`.

    `sums` are the checksums of all buckets of the chunk, from 0. `first` is the bucket of the data buffer where the
    chunk begins. Replaces any unfinished send of the same (snapshot, stripe, to). The shell handles staggering and
    bandwidth.
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
    """Drop unfinished sending, verification and coding of a snapshot. Its buffers may be given to another one."""

    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class Verify:
    """Verify the data buffer against the workers' checksums. Answer: `DataVerified`."""

    snapshot: SnapshotId
    buffer: int
    sums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClearParity:
    """Zero this agent's parity chunk of a stripe before it accumulates (again)."""

    snapshot: SnapshotId
    stripe: int
    buffer: int


@dataclass(frozen=True, slots=True)
class Accumulate:
    """Add the bucket that just arrived to bucket `index` of a stripe's parity, scaled by `source`'s coefficient."""

    snapshot: SnapshotId
    stripe: int
    source: int
    column: int
    index: int
    buffer: int


@dataclass(frozen=True, slots=True)
class FinishParity:
    """Read and checksum the parity chunk, now that all sources of the stripe are in. Answer: `ParityVerified`."""

    snapshot: SnapshotId
    stripe: int
    buffer: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Announce to the workers, the durable tier and the log that the snapshot is committed.

    A restored snapshot of an earlier epoch is committed when it is whole on all members for the first time.
    """

    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class Release:
    """Release the buffers a snapshot has left, which may be granted again. None: it had none, or keeps that one."""

    snapshot: SnapshotId
    data: int | None
    parity: int | None


@dataclass(frozen=True, slots=True)
class Decided:
    """Put this epoch's decision into force: answer workers' `Restore` from the state if `whole`.

    `whole` is False while some of this agent's data chunks are missing. Another `Decided` follows when they are
    restored.
    """

    epoch: int
    snapshot: SnapshotId | None
    whole: bool


@dataclass(frozen=True, slots=True)
class FollowOrders:
    """Decode what `orders` assign to this agent and expect what others decode. Each is (decoder, order).

    Emitted once per epoch, when its decision is in force.
    """

    orders: tuple[tuple[int, Decode], ...]


@dataclass(frozen=True, slots=True)
class StartDecode:
    """Fetch from `order.sources`, decode, verify against `order.digests` and send to `order.targets`."""

    order: Decode


@dataclass(frozen=True, slots=True)
class SendPart:
    """Send this agent's chunk of a stripe (data or parity) as `Part`s starting at bucket `start`."""

    to: int
    snapshot: SnapshotId
    stripe: int
    start: int


@dataclass(frozen=True, slots=True)
class BeginEpoch:
    """Tell the workers that a new epoch has begun and copies in progress are cancelled (`messages.EpochBegan`)."""

    epoch: int


@dataclass(frozen=True, slots=True)
class RequestEpoch:
    """Ask the supervisors for a new epoch. Repeated requests for the same cause are harmless."""

    reason: str


@dataclass(frozen=True, slots=True)
class Log:
    """Write a log line at level `info`, `warning` or `error`."""

    level: str
    text: str


Effect: TypeAlias = (
    Grant | Refuse | Revoke | Send | SendChunk | StopCoding | Verify | ClearParity | Accumulate | FinishParity
    | Commit | Release | Decided | FollowOrders | StartDecode | SendPart | BeginEpoch | RequestEpoch | Log
)  # fmt: skip
