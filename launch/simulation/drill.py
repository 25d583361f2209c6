"""Read measured recovery times from the output of `keepwarm drill --json`."""

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from keepwarm.foreign_json import parse_json
from keepwarm.launch.errors import SimulationError
from keepwarm.launch.simulation.scheme import Restart, Times
from keepwarm.trainer.monitor.events import LEVELS

PER_BYTE = ("fetch", "decode", "verify")
"""Phases whose duration grows with the size of a node's state."""
DETECT = "detect"
RESTARTS = {"local": "worker", "decoded": "node", "disk": "durable"}
"""Restart in `Times` that corresponds to each recovery level."""


def apply_drill(times: Times, path: Path, scale: float = 1.0) -> Times:
    """Return `times` with the median detection and recovery times of every recovery level in the drill.

    `scale` multiplies the phases that move bytes: it is the simulated size of a node's state over that in the drill.

    Raises:
        SimulationError: the file is not from a drill, the drill was not bitwise equal, or had no recovery.
    """
    faults = _read(path)
    restarts: dict[str, list[Restart]] = {}
    for number, fault in enumerate(faults, start=1):
        where = f"{path}, fault {number}"
        if (level := _level(fault, where)) in RESTARTS:
            restarts.setdefault(RESTARTS[level], []).append(_restart(fault, scale, where))
    if not restarts:
        raise SimulationError(
            f"{path}: no fault was recovered from at level {', '.join(RESTARTS)}; use a drill with some --kill"
        )
    return replace(
        times,
        worker=_typical(restarts.get("worker"), times.worker),
        node=_typical(restarts.get("node"), times.node),
        durable=_typical(restarts.get("durable"), times.durable),
    )


def _typical(found: list[Restart] | None, otherwise: Restart) -> Restart:
    if not found:
        return otherwise
    return Restart(median(restart.detection for restart in found), median(restart.recovery for restart in found))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        drill = parse_json(path.read_bytes())
    except OSError as error:
        raise SimulationError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise SimulationError(f"{path}: not a JSON file: {error}") from error
    faults = drill.get("faults") if isinstance(drill, dict) else None
    if not isinstance(faults, list) or not all(isinstance(fault, dict) for fault in faults):
        raise SimulationError(f"{path}: expected what `keepwarm drill --json` prints, an object with a list of faults")
    if drill.get("bitwise_equal") is not True:
        raise SimulationError(f"{path}: the drill did not end bitwise equal; its times are not those of a recovery")
    return faults


def _level(fault: dict[str, Any], where: str) -> str | None:
    if "rung" in fault:
        raise SimulationError(f"{where}: `rung` is now `level`, with a name instead of a number; repeat the drill")
    level = fault.get("level")
    if level is not None and level not in LEVELS:
        raise SimulationError(f"{where}: level is {level!r}, expected one of {', '.join(LEVELS)}")
    return level


def _restart(fault: dict[str, Any], scale: float, where: str) -> Restart:
    phases = fault.get("seconds")
    if not isinstance(phases, dict) or not all(isinstance(s, int | float) and s >= 0 for s in phases.values()):
        raise SimulationError(f"{where}: expected seconds by phase, found {phases!r}")
    scaled = {phase: s * (scale if phase in PER_BYTE else 1.0) for phase, s in phases.items()}
    # Phases may overlap or leave gaps, so use the total for the waiting time.
    total = fault.get("total_s", sum(phases.values()))
    if not isinstance(total, int | float) or total < 0:
        raise SimulationError(f"{where}: total_s is {total!r}, not a number of seconds")
    return Restart.within(total + sum(scaled.values()) - sum(phases.values()), scaled.get(DETECT, 0.0))
