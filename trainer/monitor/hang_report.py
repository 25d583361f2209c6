"""Where a rank stands when training hangs: taken in the rank, one file each, read by whoever judges them."""

import tempfile
from faulthandler import dump_traceback
from pathlib import Path

import msgspec

from keepwarm.files import READABLE, atomic_write
from keepwarm.trainer.monitor import flight_recorder
from keepwarm.trainer.monitor.hang import Report, Waiting


def take(rank: int, step: int, seconds: float) -> Report:
    """Where this process stands."""
    flights = flight_recorder.read()
    waiting = (one for one in flights if not one.ended)
    reached: dict[str, int] = {}
    for one in flights:
        if not one.message:
            reached[one.group] = max(one.number, reached.get(one.group, 0))
    return Report(
        rank=rank,
        step=step,
        seconds=seconds,
        waiting=tuple(Waiting(group=one.group, operation=one.operation, number=one.number) for one in waiting),
        reached=reached,
        stacks=stacks(),
    )


def stacks() -> str:
    """Of all threads of this process, newest call first."""
    with tempfile.TemporaryFile() as file:
        dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def write(folder: Path, one: Report) -> None:
    """Whole or not at all."""
    atomic_write(folder / f"rank_{one.rank:05d}.json", msgspec.json.format(msgspec.json.encode(one)), mode=READABLE)


def read(folder: Path) -> list[Report]:
    """The reports so far, by rank."""
    return [msgspec.json.decode(path.read_bytes(), type=Report) for path in sorted(folder.glob("rank_*.json"))]
