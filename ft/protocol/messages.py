"""What agents say to each other, and workers to their agent: typed, length-limited, never pickled.

A frame is a big-endian u32 length, that many bytes of msgpack (at most `MESSAGE_LIMIT`), and for the two messages that
carry bytes, `Bucket` and `Part`, `size` bytes of payload right after it (at most the bucket size the two sides agreed
on). `encode` and `decode` deal with the msgpack alone; the transport owns lengths, payloads and deadlines.

Words: a *stripe* is one codeword of a group, a *chunk* is what one member stores of one stripe (data or parity), a
*bucket* is the unit in which a chunk is copied, checksummed, sent and coded. Checksums are xxh3_64, chunks are
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
"""Bytes of msgpack in one frame."""
MEMBERS_LIMIT = 64
"""Members of one group: k + m <= 32 in the code, near-equal groups can be one code larger."""

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
    """The checksum that identifies a chunk: h <- xxh3_64(h, checksum) over its buckets in order, from `start`.

    A chain, so that it grows bucket by bucket: `digest([*a, *b]) == digest(b, digest(a))`. An empty chunk has 0.
    """
    value = start
    for sum_ in sums:
        value = xxhash.xxh3_64_intdigest(struct.pack("<QQ", value, sum_))
    return value


class Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of every message: immutable, tagged by class name, unknown fields refused."""


class SnapshotId(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Identity of a snapshot. Two snapshots of one step taken in different epochs are different snapshots."""

    run: Name
    epoch: Count
    step: Count
    layout: Name

    @property
    def age(self) -> tuple[int, int]:
        """(epoch, step): of two snapshots of a run the one with the higher age is newer."""
        return self.epoch, self.step

    def __str__(self) -> str:
        return f"{self.epoch}.{self.step}"


# ---- handshake, both directions, before anything else is read


class Hello(Wire, frozen=True):
    """First frame of either side. `incarnation` numbers the incarnations of a slot's memory: higher is later."""

    role: Name
    run: Name
    slot: Small
    epoch: Count
    incarnation: Count
    nonce: Nonce


class Proof(Wire, frozen=True):
    """Second frame of either side: HMAC over both `Hello` frames with the job's secret."""

    mac: Annotated[bytes, Meta(min_length=32, max_length=64)]


class Farewell(Wire, frozen=True):
    """The sender is about to close the connection, and why. No answer."""

    reason: Text


# ---- coding, inside a group


class Want(Wire, frozen=True):
    """To a source: my parity of `stripe` has your buckets before `start`; send from there on.

    Sent when the parity buffer is granted, after a damaged bucket, after a reconnect and when a stripe starts over.
    """

    snapshot: SnapshotId
    stripe: Small
    start: Small
    damaged: bool = False
    """Bucket `start` came with another checksum than its header's: read your data again."""


class Bucket(Wire, frozen=True):
    """Bucket `index` of the sender's data chunk in `stripe`; `size` bytes of payload follow, whose xxh3_64 is `sum`."""

    snapshot: SnapshotId
    stripe: Small
    index: Small
    sum: Sum
    size: Count


class ChunkEnd(Wire, frozen=True):
    """The sender's chunk in `stripe` has `count` buckets (what is missing up to the chunk size is zeros)."""

    snapshot: SnapshotId
    stripe: Small
    count: Small
    digest: Sum


class ChunkLost(Wire, frozen=True):
    """To those who want it: the sender's data chunk in `stripe` is damaged and nobody can code it any more."""

    snapshot: SnapshotId
    stripe: Small


class ChunkRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One good chunk: its stripe and the digest of its `count` buckets (what a data chunk lacks to full size is zeros).

    For parity, `sources` and `counts` are the digests and counts of the k data chunks it was made of, by column.
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
    """To the group: the sender has stored and verified its data and its parity of `snapshot`. Never taken back."""

    snapshot: SnapshotId
    chunks: Records


# ---- knowledge, along the tree of agents: facts that stay true, merged by union, repeated freely


class Known(Wire, frozen=True):
    """What the sender knows of `snapshot`: groups that are PREPARED, or that it can never be (`void`)."""

    snapshot: SnapshotId
    prepared: Annotated[tuple[Small, ...], Meta(max_length=65_536)] = ()
    committed: bool = False
    void: bool = False


# ---- recovery


class InventoryRequest(Wire, frozen=True):
    """Epoch `epoch` has begun: stop what belongs to earlier ones and say what you hold."""

    epoch: Count


class Holding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The good chunks of one snapshot in one agent's memory, and whether the agent knows it to be committed."""

    snapshot: SnapshotId
    chunks: Records
    committed: bool = False


class Inventory(Wire, frozen=True):
    """Everything that can be restored from slot `slot`. Until a `Decision` of this epoch nothing of it is given up.

    `decided_epoch` and `decided` repeat the last choice that the sender was told of (0 and None: never).
    """

    slot: Small
    incarnation: Count
    epoch: Count
    holdings: Annotated[tuple[Holding, ...], Meta(max_length=8)]
    decided_epoch: Count = 0
    decided: SnapshotId | None = None


class Decision(Wire, frozen=True):
    """The choice of `epoch`, written by compare-and-set: keep `snapshot` alone (None: nothing in memory is used).

    `incarnations[slot]` is that of the agent that takes part in this epoch, 0 where there is none. Within an epoch
    every other incarnation of a slot is fenced: what forgot its promises may not make new ones until the next epoch.
    """

    epoch: Count
    snapshot: SnapshotId | None
    incarnations: Annotated[tuple[Count, ...], Meta(max_length=65_536)]


class Decode(Wire, frozen=True):
    """To a survivor: rebuild the chunks of `targets` in `stripe` from those of `sources` and send them there.

    `sources` are k members whose chunks are good, the receiver first if it is one of them;
    `digests` and `counts` are those of the stripe's data chunks by column, to check and to cut what comes out.
    """

    epoch: Count
    snapshot: SnapshotId
    stripe: Small
    sources: Few
    targets: Few
    digests: Annotated[tuple[Sum, ...], Meta(max_length=MEMBERS_LIMIT)]
    counts: Few = ()


class Fetch(Wire, frozen=True):
    """Send me your chunk (data or parity) of `stripe`, as `Part`s, from bucket `start` on."""

    epoch: Count
    snapshot: SnapshotId
    stripe: Small
    start: Small = 0


class Part(Wire, frozen=True):
    """Bucket `index` of `count` of slot `owner`'s chunk in `stripe`; `size` bytes of payload follow."""

    epoch: Count
    snapshot: SnapshotId
    stripe: Small
    owner: Small
    index: Small
    count: Small
    sum: Sum
    size: Count


# ---- a worker and its agent, over the Unix socket


class Attach(Wire, frozen=True):
    """Worker `worker` (its local rank) of `workers` on this node joins; its part of a buffer has `buckets` buckets."""

    run: Name
    layout: Name
    worker: Small
    workers: Small
    buckets: Small


class Attached(Wire, frozen=True):
    """The memfds of the buffers come with this message; the worker's part starts at bucket `first` of each of them."""

    epoch: Count
    buffers: Small
    buffer_bytes: Count
    bucket_bytes: Count
    first: Small


class Open(Wire, frozen=True):
    """May I write `snapshot`? A step is offered once per epoch. With `wait` the answer comes when a buffer is free."""

    snapshot: SnapshotId
    wait: bool = True


class Granted(Wire, frozen=True):
    """Write your part of `snapshot` into data buffer `buffer`; it is yours until `Seal` or `Cancel`."""

    snapshot: SnapshotId
    buffer: Small


class Refused(Wire, frozen=True):
    """Not `snapshot`; `reason` is one of `keepwarm.ft.protocol.events.Reason`, `text` says it in words."""

    snapshot: SnapshotId
    reason: Name
    text: Text = ""


class Seal(Wire, frozen=True):
    """The worker's part of `snapshot` is written; one xxh3_64 per bucket, in order. It is not touched again."""

    snapshot: SnapshotId
    sums: Sums


class Cancel(Wire, frozen=True):
    """The worker gives up `snapshot` and does not touch its buffer again."""

    snapshot: SnapshotId


class Revoked(Wire, frozen=True):
    """`snapshot` can no longer be committed: stop writing and answer `Cancel`."""

    snapshot: SnapshotId


class Committed(Wire, frozen=True):
    """`snapshot` is committed; `seconds` is how long that took from the first grant."""

    snapshot: SnapshotId
    seconds: float


class Restore(Wire, frozen=True):
    """Which snapshot is restored in `epoch`? Answered by `Restored` once this node's data chunks are whole."""

    epoch: Count


class Restored(Wire, frozen=True):
    """The decided snapshot lies in data buffer `buffer` with bucket checksums `sums`; None: nothing is, see `text`."""

    epoch: Count
    snapshot: SnapshotId | None
    buffer: Small = 0
    sums: Sums = ()
    text: Text = ""


READ_STRIPE = 1_000_000
"""Stands for the stripe in a `Part` that answers a `Read`: its index counts from the start of the owner's data."""


class Read(Wire, frozen=True):
    """Send me buckets `first ... first + count` of slot `owner`'s data of the decided snapshot, as `Part`s."""

    epoch: Count
    snapshot: SnapshotId
    owner: Small
    first: Small
    count: Small


class EpochBegan(Wire, frozen=True):
    """Offer snapshots under `epoch` from now on; what was not committed is given up or was chosen."""

    epoch: Count


class Save(Wire, frozen=True):
    """A supervisor to its agent: write to disk what this epoch restores, as the layout is about to change."""

    epoch: Count


class StatusRequest(Wire, frozen=True):
    """What `keepwarm snapshots` asks."""


AgentMessage: TypeAlias = (
    Hello | Proof | Farewell | Want | Bucket | ChunkEnd | ChunkLost | Stored | Known
    | InventoryRequest | Inventory | Decision | Decode | Fetch | Part | Read
)  # fmt: skip
"""What goes over TCP between agents."""

WorkerMessage: TypeAlias = (
    Hello | Proof | Farewell | Attach | Attached | Open | Granted | Refused | Seal | Cancel | Revoked | Committed
    | EpochBegan | Restore | Restored | Read | Part | Save | StatusRequest
)  # fmt: skip
"""What goes over the Unix socket between a worker and its agent."""

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_agent_decoder: msgspec.msgpack.Decoder[AgentMessage] = msgspec.msgpack.Decoder(AgentMessage)


def encode(message: Wire) -> bytes:
    """The msgpack of a message. Raises `TransportError` when it is longer than `MESSAGE_LIMIT`."""
    data = _encoder.encode(message)
    if len(data) > MESSAGE_LIMIT:
        raise TransportError(f"{type(message).__name__} of {len(data)} bytes is over the limit of {MESSAGE_LIMIT}")
    return data


def decode_agent(data: bytes | bytearray | memoryview) -> AgentMessage:
    """The inverse of `encode` for what agents send. Raises `TransportError` on anything else."""
    return _decode(_agent_decoder, data)


def _decode(decoder: "msgspec.msgpack.Decoder[T]", data: bytes | bytearray | memoryview) -> T:
    if len(data) > MESSAGE_LIMIT:
        raise TransportError(f"message of {len(data)} bytes is over the limit of {MESSAGE_LIMIT}")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TransportError(f"malformed message: {error}") from error
