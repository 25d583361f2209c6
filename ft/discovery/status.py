"""Agent status, requested by `keepwarm snapshots` and tests."""

from typing import Any

import msgspec

from keepwarm.ft.protocol.messages import Wire


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """Time from the first grant of a snapshot on this node until its commit was known, in seconds."""

    epoch: int
    step: int
    committed: float


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot in the agent's memory."""

    epoch: int
    step: int
    layout: str
    phase: str
    data: int | None
    parity: int | None
    chunks: dict[int, str]
    """Digest of every good chunk, by stripe."""


class Status(Wire, frozen=True, kw_only=True):
    """Status of one agent at one moment. Sizes are in bytes, times in seconds."""

    run: str
    slot: int
    pid: int
    keeper: int
    """The process that holds the memory."""
    incarnation: int
    epoch: int
    mode: str
    group: tuple[int, ...]
    parity: int
    peers: tuple[int, ...]
    workers: tuple[int, ...]
    buffers: int
    buffer_bytes: int
    memory_bytes: int
    """Bytes of all buffers, data and parity."""
    grown_bytes: int
    """Bytes of them that have been taken from the system so far."""
    resident_bytes: int
    held: tuple[Held, ...]
    committed: tuple[int, int] | None
    """(epoch, step) of the newest snapshot that was committed or restored."""
    commits: tuple[Commit, ...]
    refused: dict[str, int]
    """Number of snapshots that workers were refused, by reason."""
    durable: dict[str, Any]
    scrub: dict[str, int]
