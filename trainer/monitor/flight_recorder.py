"""Read torch's flight recorders: the newest collectives of this rank. The only module that knows their format.

gloo and NCCL have a recorder each. A collective of gloo begins when it is called. One of NCCL is queued when it is
called, and begins when the GPU reaches it, which `TORCH_NCCL_ENABLE_TIMING` makes known: a rank whose GPU hangs or is
slow queues as fast as the others.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec

DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""Functions of `torch._C._distributed_c10d`; the first only where torch has NCCL. Some versions return all from both.
"""
RECORDED = 512
"""Number of collectives that are kept on CPUs, and that ranks compare to find stragglers."""
RECORDED_ON_GPU = 20_000
"""The same on GPUs, where a step queues all of its collectives ahead of the GPU. As torchtitan sets it."""
SIZE = "TORCH_FR_BUFFER_SIZE"
TIMING = "TORCH_NCCL_ENABLE_TIMING"
_TRUE = ("1", "t", "true", "y", "yes")


class Flight(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A collective, or a point-to-point message between two ranks."""

    group: str
    operation: str
    number: int
    """Counted per group, from 1: equal on all ranks that take part."""
    message: bool
    began: int
    """When the process called it, in nanoseconds since 1970."""
    ended: bool
    reached: bool = True
    """Whether the device has come to it."""
    lasted: int | None = None
    """Nanoseconds on the GPU, the wait for later ranks included; None: not measured."""


_since = 0
"""Nanoseconds since 1970; earlier entries belong to destroyed process groups."""


def enable(*, gpu: bool) -> None:
    """Turn the recorders on. Call before creating the process group.

    What NCCL's watchdog does is in `keepwarm.trainer.distributed.nccl`.
    """
    global _since
    _since = time.time_ns()
    os.environ.setdefault(SIZE, str(RECORDED_ON_GPU if gpu else RECORDED))
    if gpu:
        os.environ.setdefault(TIMING, "1")


def read() -> list[Flight]:
    """Return the recorded collectives, oldest first; empty if torch has none or its format is unknown."""
    flights: dict[tuple[str, str, int, int], Flight] = {}
    for name in DUMPS:
        for flight in _recorded(name):
            if flight.began >= _since:
                flights.setdefault((flight.group, flight.operation, flight.number, flight.began), flight)
    return sorted(flights.values(), key=lambda flight: flight.began)


def _recorded(name: str) -> Iterator[Flight]:
    """Yield what one recorder holds."""
    from torch._C import _distributed_c10d

    dump = getattr(_distributed_c10d, name, None)
    timed = os.environ.get(TIMING, "").lower() in _TRUE
    with suppress(AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        entries: list[dict[str, Any]] = [] if dump is None else json.loads(dump(includeCollectives=True))["entries"]
        for entry in entries:
            yield _flight(entry, timed=timed)


def _flight(entry: dict[str, Any], *, timed: bool) -> Flight:
    name, description = entry["process_group"]
    ended = entry["retired"] or entry["state"] == "completed"
    on_gpu = entry["profiling_name"].startswith("nccl:")
    lasted = entry.get("duration_ms")
    return Flight(
        group=f"{description or 'all'} ({name})",
        operation=entry["profiling_name"],
        number=entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
        message=entry["is_p2p"],
        began=entry["time_created_ns"],
        ended=ended,
        reached=ended or not (on_gpu and timed) or entry["state"] == "started",
        lasted=None if lasted is None else round(lasted * 1e6),
    )
