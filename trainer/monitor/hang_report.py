"""Reports of where each rank stands when training hangs: one file per rank, written by the rank itself."""

import tempfile
import time
from faulthandler import dump_traceback
from pathlib import Path

import msgspec

from keepwarm.files import READABLE, atomic_write
from keepwarm.trainer.monitor import flight_recorder
from keepwarm.trainer.monitor.hang import Report, Waiting


def take(rank: int, step: int, seconds: float) -> Report:
    """Describe where this process stands."""
    flights = flight_recorder.read()
    waiting = (flight for flight in flights if flight.reached and not flight.ended)
    reached: dict[str, int] = {}
    for flight in flights:
        if not flight.message:
            # A queue without one that has begun still tells that this rank is a member of the group.
            reached[flight.group] = max(flight.number if flight.reached else 0, reached.get(flight.group, 0))
    return Report(
        rank=rank,
        step=step,
        seconds=seconds,
        waiting=tuple(
            Waiting(group=flight.group, operation=flight.operation, number=flight.number, message=flight.message)
            for flight in waiting
        ),
        reached=reached,
        stacks=stacks(),
    )


def longest_wait() -> float:
    """Return for how many seconds this process has waited in a collective or for a message; 0 if it does not."""
    began = [flight.began for flight in flight_recorder.read() if flight.reached and not flight.ended]
    return max(0.0, (time.time_ns() - min(began)) / 1e9) if began else 0.0


def stacks() -> str:
    """Return the stacks of all threads of this process, newest call first."""
    with tempfile.TemporaryFile() as file:
        dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def write(folder: Path, report: Report) -> None:
    """Write a report atomically."""
    text = msgspec.json.format(msgspec.json.encode(report))
    atomic_write(folder / f"rank_{report.rank:05d}.json", text, mode=READABLE)


def written(folder: Path, since: float) -> list[Path]:
    """Return the reports written since a time, in seconds since 1970, by rank; none if there is no folder."""
    return [path for path in sorted(folder.glob("rank_*.json")) if path.stat().st_mtime >= since]


def read(folder: Path, since: float) -> list[Report]:
    """Return the reports written since a time, in seconds since 1970, by rank."""
    return [msgspec.json.decode(path.read_bytes(), type=Report) for path in written(folder, since)]
