"""Read torch's flight recorder: the newest collectives begun by this rank. The only module that knows its format."""

import contextlib
import json
import os
import time
from typing import Any

import msgspec

RECORDED = 512
"""Number of collectives that it keeps."""


class Flight(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A collective, or a point-to-point message between two ranks."""

    group: str
    operation: str
    number: int
    """Counted per group, from 1: equal on all ranks that take part."""
    message: bool
    began: int
    """Nanoseconds since 1970."""
    ended: bool


_since = 0
"""Nanoseconds since 1970; earlier entries belong to destroyed process groups."""


def enable() -> None:
    """Turn the recorder on. Call before creating the process group."""
    global _since
    _since = time.time_ns()
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED))


def read() -> list[Flight]:
    """Return the recorded collectives, oldest first; empty if torch has none or its format is unknown."""
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        from torch._C import _distributed_c10d

        dump = getattr(_distributed_c10d, "_dump_fr_trace_json")  # noqa: B009 (torch declares no type for it)
        entries: list[dict[str, Any]] = json.loads(dump(includeCollectives=True)).get("entries", [])
        return [flight for entry in entries if (flight := _flight(entry)).began >= _since]
    return []


def _flight(entry: dict[str, Any]) -> Flight:
    name, description = entry["process_group"]
    return Flight(
        group=f"{description or 'all'} ({name})",
        operation=entry["profiling_name"],
        number=entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
        message=entry["is_p2p"],
        began=entry["time_created_ns"],
        ended=entry["retired"],
    )
