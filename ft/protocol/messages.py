"""Messages between agents, and between workers and their agent: typed, length-limited, never pickled.

A frame is a big-endian u32 length, that many bytes of msgpack (at most `MESSAGE_LIMIT`) and, for the two messages that
carry bytes, `Bucket` and `Part`, `size` bytes of payload (at most the agreed bucket size). `encode` and `decode` handle
only the msgpack; the transport handles lengths, payloads and deadlines.

Terms: a *stripe* is one codeword of a group, a *chunk* is one member's share of a stripe (data or parity), and a
*bucket* is the unit in which a chunk is copied, checksummed, sent and coded. Checksums are xxh3_64. Chunks are
identified by `digest`, the checksum of their buckets' checksums. Slots, stripes and indices count from 0.
"""

import struct
from collections.abc import Iterable
from typing import Annotated, TypeAlias, TypeVar

import msgspec
import xxhash
from msgspec import Meta

from keepwarm.ft.errors import TransportError

MESSAGE_LIMIT = 4 << 20
"""Maximum msgpack bytes in one frame."""
MEMBERS_LIMIT = 64
"""Maximum members of one group: the code has k + m <= 32, but near-equal groups can be larger than one code."""

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=128)]
Text: TypeAlias = Annotated[str, Meta(max_length=1024)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
Small: TypeAlias = Annotated[int, Meta(ge=0, le=1_000_000)]
Sum: TypeAlias = Annotated[int, Meta(ge=0)]
"""xxh3_64, 0 <= value < 2^64 (msgpack has no wider integer)."""
Sums: TypeAlias = Annotated[tuple[Sum, ...], Meta(max_length=262_144)]
Few: TypeAlias = Annotated[tuple[Small, ...], Meta(max_length=MEMBERS_LIMIT)]
Nonce: TypeAlias = Annotated[bytes, Meta(min_length=16, max_length=64)]


def digest(sums: Iterable[int], start: int = 0) -> int:
    """Return the checksum that identifies a chunk: h <- xxh3_64(h, checksum) over its buckets in order, from `start`.

    It is a chain and so can be extended bucket by bucket: `digest([*a, *b]) == digest(b, digest(a))`. An empty chunk
    has digest 0.
    """
    value = start
    for sum_ in sums:
        value = xxhash.xxh3_64_intdigest(struct.pack("<QQ", value, sum_))
    return value


class Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages: immutable, tagged by class name, unknown fields rejected."""


class SnapshotId(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Identity of a snapshot. Two snapshots of one step taken in different epochs are different snapshots."""

    run: Name
    epoch: Count
    step: Count
    layout: Name

    @property
    def age(self) -> tuple[int, int]:
        """(epoch, step). Of two snapshots of a run, the one with the higher age is newer."""
        return self.epoch, self.step

    def __str__(self) -> str:
        return f"{self.epoch}.{self.step}"


# ---- handshake, both directions, before anything else is read


class Hello(Wire, frozen=True):
    """First frame from each side. `incarnation` numbers the incarnations of a slot's memory; higher is later."""

    role: Name
    run: Name
    slot: Small
    epoch: Count
    incarnation: Count
    nonce: Nonce


class Proof(Wire, frozen=True):
    """Second frame from each side: HMAC over both `Hello` frames with the job's secret."""

    mac: Annotated[bytes, Meta(min_length=32, max_length=64)]


class Farewell(Wire, frozen=True):
    """Announce that the sender is about to close the connection, and why. No answer."""

    reason: Text


# ---- coding, inside a group


class Want(Wire, frozen=True):
    """Tell a source: my parity of `stripe` has your buckets before `start`; send from there on.

    Sent when the parity buffer is granted, after a damaged bucket, after a reconnect and when a stripe restarts.
    """

    snapshot: SnapshotId
    stripe: Small
    start: Small
    damaged: bool = False
    """Bucket `start` did not match the checksum in its header: verify your data."""


class Bucket(Wire, frozen=True):
    """Bucket `index` of the sender's data chunk in `stripe`, followed by `size` bytes of payload with xxh3_64 `sum`."""

    snapshot: SnapshotId
    stripe: Small
    index: Small
    sum: Sum
    size: Count


class ChunkEnd(Wire, frozen=True):
    """Marks the end of the sender's chunk in `stripe` after `count` buckets; the rest of the chunk size is zeros."""

    snapshot: SnapshotId
    stripe: Small
    count: Small
    digest: Sum


class ChunkLost(Wire, frozen=True):
    """Tell receivers that the sender's data chunk of `stripe` is corrupt and cannot be encoded."""

    snapshot: SnapshotId
    stripe: Small


class ChunkRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One good chunk: its stripe and the digest of its `count` buckets. The rest of a data chunk is zeros.

    For parity, `sources` and `counts` are the digests and counts of the k data chunks it was computed from, by column.
    """

    stripe: Small
    digest: Sum
    sources: Annotated[tuple[Sum, ...], Meta(max_length=MEMBERS_LIMIT)] = ()
    count: Small = 0
    counts: Few = ()

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.counts):
            raise ValueError(f"{len(self.sources)} digests and {len(self.counts)} counts of sources")


Records: TypeAlias = Annotated[tuple[ChunkRecord, ...], Meta(max_length=MEMBERS_LIMIT)]


class Stored(Wire, frozen=True):
    """Tell the group that the sender has stored and verified its data and parity of `snapshot`. Never withdrawn.

    `epoch` is that of the statement: 0 for the snapshot's own. A snapshot that was restored is stored once more, since
    some of its chunks may have been lost in the meantime.
    """

    snapshot: SnapshotId
    chunks: Records
    epoch: Count = 0


# ---- knowledge, along the tree of agents: facts that stay true, merged by union, repeated freely


class Known(Wire, frozen=True):
    """Facts about `snapshot`: that it was begun, the groups known to be PREPARED, or that it is `void`.

    `committed`: all groups are. `void`: an agent has not stored it and never will, so it can never be committed.
    `epoch` is as in `Stored`.
    """

    snapshot: SnapshotId
    prepared: Annotated[tuple[Small, ...], Meta(max_length=65_536)] = ()
    committed: bool = False
    void: bool = False
    epoch: Count = 0


class Joined(Wire, frozen=True):
    """Tell group members and neighbours that the sender has put the choice of `epoch` into force.

    It has ignored what they said in this epoch until now. They repeat what still matters.
    """

    epoch: Count


# ---- recovery


class InventoryRequest(Wire, frozen=True):
    """Announce epoch `epoch`: stop the work of earlier epochs and report what you hold."""

    epoch: Count


class Holding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The good chunks of one snapshot in one agent's memory, and whether the agent knows that it was committed."""

    snapshot: SnapshotId
    chunks: Records
    committed: bool = False


class Undecodable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A fact: no k chunks of these `holders` decode to what was written in `stripe` of `snapshot`."""

    snapshot: SnapshotId
    stripe: Small
    holders: Few


class Inventory(Wire, frozen=True):
    """Everything that can be restored from slot `slot`. None of it is released before workers have gone on.

    `undecodable` lists the decodings of these snapshots that failed.
    """

    slot: Small
    incarnation: Count
    epoch: Count
    holdings: Annotated[tuple[Holding, ...], Meta(max_length=8)]
    undecodable: Annotated[tuple[Undecodable, ...], Meta(max_length=4096)] = ()


class Decision(Wire, frozen=True):
    """The decision of `epoch`, of which there is one: restore `snapshot` (None: nothing in memory).

    It frees nothing: see `keepwarm.ft.protocol.recovery`.

    `incarnations[slot]` is the incarnation of the agent that takes part in this epoch, or 0 if there is none. Within an
    epoch every other incarnation of a slot is fenced: an agent that forgot its promises may not make new ones until the
    next epoch.
    """

    epoch: Count
    snapshot: SnapshotId | None
    incarnations: Annotated[tuple[Count, ...], Meta(max_length=65_536)]
    reason: Text = ""
    """Why nothing in memory is restored."""


class Decode(Wire, frozen=True):
    """Tell a survivor to rebuild the chunks of `targets` in `stripe` from those of `sources` and send them there.

    `sources` are k members whose chunks are good, the receiver first if it is one of them; `spares` are the other
    members with a good chunk, in case that the sources do not decode to what was written. `digests` and `counts` are
    those of the stripe's data chunks by column, used to verify and trim the result.
    """

    epoch: Count
    snapshot: SnapshotId
    stripe: Small
    sources: Few
    targets: Few
    digests: Annotated[tuple[Sum, ...], Meta(max_length=MEMBERS_LIMIT)]
    counts: Few = ()
    spares: Few = ()


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Decision of an epoch and its decoding plan: (decoder, order).

    They are one, so that an agent that knows the choice also knows the orders, even if links or agents were lost.
    """

    decision: Decision
    orders: tuple[tuple[Small, Decode], ...] = ()


class Proposal(Wire, frozen=True):
    """Ask for a vote on what an epoch restores. Answered by `Vote`."""

    choice: Choice


class Vote(Wire, frozen=True):
    """Tell for which choice the sender has voted in `epoch`: the first one that it was asked about, and no other ever.

    `digest` identifies the choice, 0 for none, and `new` says that the sender may have forgotten a vote of this epoch:
    see `keepwarm.ft.protocol.ballot`.
    """

    epoch: Count
    digest: Sum
    new: bool = False


class Chosen(Wire, frozen=True):
    """Tell the choice that stands for its epoch. Where it is too long for a frame, `Decision` is sent in its place."""

    choice: Choice


class Fetch(Wire, frozen=True):
    """Request the receiver's chunk (data or parity) of `stripe` as `Part`s, starting at bucket `start`."""

    epoch: Count
    snapshot: SnapshotId
    stripe: Small
    start: Small = 0


class ChunkWrong(Wire, frozen=True):
    """Tell a member that its chunk of `stripe` matches its digest but not the rest of the stripe: it is an erasure."""

    epoch: Count
    snapshot: SnapshotId
    stripe: Small


class Part(Wire, frozen=True):
    """Bucket `index` of `count` of slot `owner`'s chunk in `stripe`, followed by `size` bytes of payload.

    `sum` is the checksum of the payload as it was sealed, coded or decoded, not of what is in memory when it is sent.
    `digest` is that of the whole chunk, so that the receiver finds a bucket in the wrong place.
    """

    epoch: Count
    snapshot: SnapshotId
    stripe: Small
    owner: Small
    index: Small
    count: Small
    sum: Sum
    size: Count
    digest: Sum = 0


# ---- a worker and its agent, over the Unix socket


class Attach(Wire, frozen=True):
    """Attach worker `worker` (its local rank) of `workers` on this node. Its part of a buffer has `buckets` buckets."""

    run: Name
    layout: Name
    worker: Small
    workers: Small
    buckets: Small


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Where an agent listens for the others, in its present incarnation."""

    host: Name
    port: Annotated[int, Meta(ge=0, le=65_535)]
    incarnation: Count


class Introduced(Wire, frozen=True):
    """Tell an agent where those of other slots listen, as the ranks have heard from their own agents."""

    agents: Annotated[dict[Small, Address], Meta(max_length=65_536)]


class Attached(Wire, frozen=True):
    """Carries the buffers' memfds. The worker's part starts at bucket `first` of each buffer. `exposed`: `Exposed`.

    `address` is that of the agent.
    """

    epoch: Count
    buffers: Small
    buffer_bytes: Count
    bucket_bytes: Count
    first: Small
    address: Address
    exposed: bool = False


class Open(Wire, frozen=True):
    """Request a buffer for `snapshot`. A step is offered once per epoch. With `wait`, wait for a free buffer.

    It gives up whatever older snapshot the worker has requested or was granted and has not sealed.
    """

    snapshot: SnapshotId
    wait: bool = True


class Granted(Wire, frozen=True):
    """Grant data buffer `buffer` for the worker's part of `snapshot`, until `Seal` or `Cancel`."""

    snapshot: SnapshotId
    buffer: Small


class Refused(Wire, frozen=True):
    """Refuse `snapshot`. `reason` is a `keepwarm.ft.protocol.events.Reason`, and `text` explains it."""

    snapshot: SnapshotId
    reason: Name
    text: Text = ""


class Seal(Wire, frozen=True):
    """Declare the worker's part of `snapshot` written, with one xxh3_64 per bucket, in order. It is final."""

    snapshot: SnapshotId
    sums: Sums


class Cancel(Wire, frozen=True):
    """Cancel `snapshot`, granted or still waiting. The worker does not touch its buffer again."""

    snapshot: SnapshotId


class Revoked(Wire, frozen=True):
    """Revoke `snapshot`, which can no longer be committed: stop writing and answer `Cancel`."""

    snapshot: SnapshotId


class Committed(Wire, frozen=True):
    """Announce that `snapshot` is committed. `seconds` is the time since its first grant."""

    snapshot: SnapshotId
    seconds: float


class Exposed(Wire, frozen=True):
    """Tell workers whether a snapshot should be taken at once: see `keepwarm.ft.protocol.state.State.exposed`."""

    exposed: bool


class Restore(Wire, frozen=True):
    """Ask which snapshot `epoch` restores. Answered by `Restored` once this node has all of its data chunks."""

    epoch: Count


class Restored(Wire, frozen=True):
    """The decided snapshot is in data buffer `buffer` with bucket checksums `sums`. None: nothing is, see `text`.

    `decided_at` is when the decision became known here, in seconds since 1970, and `decoded` the buckets that all nodes
    decode for it.
    """

    epoch: Count
    snapshot: SnapshotId | None
    buffer: Small = 0
    sums: Sums = ()
    text: Text = ""
    decided_at: float = 0.0
    decoded: Count = 0


END_OF_JOB = "end of the job"
"""Reason of a worker's `Farewell` that ends the agent once all have said so."""
READ_STRIPE = 1_000_000
"""Stripe number of a `Part` that answers a `Read`: its index then counts from the start of the owner's data."""


class Read(Wire, frozen=True):
    """Request buckets `first ... first + count` of slot `owner`'s data of the decided snapshot, as `Part`s."""

    epoch: Count
    snapshot: SnapshotId
    owner: Small
    first: Small
    count: Small


class EpochBegan(Wire, frozen=True):
    """Tell workers to offer snapshots under `epoch` from now on. Uncommitted ones are discarded unless chosen."""

    epoch: Count


class Save(Wire, frozen=True):
    """Sent by a supervisor: write what this epoch restores to disk, because the layout is about to change."""

    epoch: Count


class StatusRequest(Wire, frozen=True):
    """Request the status shown by `keepwarm snapshots`."""


AgentMessage: TypeAlias = (
    Hello | Proof | Farewell | Want | Bucket | ChunkEnd | ChunkLost | Stored | Known | Joined
    | InventoryRequest | Inventory | Decision | Proposal | Vote | Chosen | Decode | Fetch | ChunkWrong | Part | Read
)  # fmt: skip
"""Messages sent over TCP between agents."""

WorkerMessage: TypeAlias = (
    Hello | Proof | Farewell | Attach | Attached | Introduced | Open | Granted | Refused | Seal | Cancel | Revoked
    | Committed | EpochBegan | Exposed | Restore | Restored | Read | Part | Save | StatusRequest
)  # fmt: skip
"""Messages sent over the Unix socket between a worker and its agent."""

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_agent_decoder: msgspec.msgpack.Decoder[AgentMessage] = msgspec.msgpack.Decoder(AgentMessage)


def encode(message: Wire) -> bytes:
    """Return the msgpack of a message. Raise `TransportError` if it is longer than `MESSAGE_LIMIT`."""
    data = _encoder.encode(message)
    if len(data) > MESSAGE_LIMIT:
        raise TransportError(f"{type(message).__name__} of {len(data)} bytes is over the limit of {MESSAGE_LIMIT}")
    return data


def decode_agent(data: bytes | bytearray | memoryview) -> AgentMessage:
    """Decode a message from an agent, the inverse of `encode`. Raise `TransportError` on anything else."""
    return _decode(_agent_decoder, data)


def _decode(decoder: "msgspec.msgpack.Decoder[T]", data: bytes | bytearray | memoryview) -> T:
    if len(data) > MESSAGE_LIMIT:
        raise TransportError(f"message of {len(data)} bytes is over the limit of {MESSAGE_LIMIT}")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TransportError(f"malformed message: {error}") from error
