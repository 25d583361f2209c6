"""Failure models: independent exponential or Weibull times, or a recorded trace. Seeded and vectorised."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from keepwarm.foreign_json import parse_json
from keepwarm.launch.errors import SimulationError

LLAMA_3_NODE_MTBF = 54 * 86400 * 2048 / 419
"""MTBF of a node of 8 GPUs in seconds: 419 unexpected interruptions on 16,384 GPUs in 54 days (Llama 3, 2024)."""

MOST_FAILURES = 5_000_000


class Kind(IntEnum):
    WORKER = 0
    """Processes die, but their node's memory survives."""
    NODE = 1
    RACK = 2


@dataclass(frozen=True, slots=True)
class Failures:
    """One failure history in chronological order, as arrays of equal length."""

    times: NDArray[np.float64]
    """Seconds since the start."""
    kinds: NDArray[np.int8]
    nodes: NDArray[np.int64]
    """Failed node; for a rack failure, one node of the failed rack."""


class FailureModel(Protocol):
    """Interface of failure models."""

    @property
    def rack_share(self) -> float: ...
    @property
    def worker_share(self) -> float: ...
    @property
    def draws_nodes(self) -> bool:
        """Return whether every node is equally likely to fail, independently of the past."""
        ...

    def sample(self, nodes: int, horizon: float, random: np.random.Generator) -> Failures: ...
    def count(self, horizon: float) -> float:
        """Return the expected number of failures before `horizon`, in seconds."""
        ...

    def within(self, window: float) -> float:
        """Return the probability that the next failure follows within `window` seconds."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Renewal:
    """Independent Weibull times between failures of the cluster; exponential for shape 1.

    Schroeder and Gibson (2006) fitted shapes of 0.7 to 0.8 to the failures of whole systems: a failure is then more
    likely soon after another one.
    """

    mtbf: float
    """Mean time between failures of any kind in the whole cluster, in seconds."""
    shape: float = 1.0
    rack_share: float = 0.0
    worker_share: float = 0.0

    def __post_init__(self) -> None:
        if not (self.mtbf > 0 and math.isfinite(self.mtbf)):
            raise SimulationError(f"the mean time between failures is {self.mtbf} s, it must be above 0")
        if not 0.1 <= self.shape <= 10:
            raise SimulationError(f"the Weibull shape is {self.shape}, it must lie between 0.1 and 10")
        if not (self.rack_share >= 0 and self.worker_share >= 0 and self.rack_share + self.worker_share <= 1):
            raise SimulationError(
                f"the shares of rack failures ({self.rack_share}) and worker failures ({self.worker_share}) "
                "must not be negative nor exceed 1 together"
            )

    @property
    def draws_nodes(self) -> bool:
        return True

    @property
    def scale(self) -> float:
        return self.mtbf / math.gamma(1 + 1 / self.shape)

    def count(self, horizon: float) -> float:
        return horizon / self.mtbf

    def within(self, window: float) -> float:
        return -math.expm1(-((window / self.scale) ** self.shape))

    def sample(self, nodes: int, horizon: float, random: np.random.Generator) -> Failures:
        expected = self.count(horizon)
        if expected > MOST_FAILURES:
            raise SimulationError(f"{expected:.3g} failures are more than can be simulated: shorten --duration")
        blocks, end = [], 0.0
        while end < horizon:
            gaps = self.scale * random.weibull(self.shape, size=int(expected + 4 * math.sqrt(expected) + 16))
            blocks.append(end + np.cumsum(gaps))
            end = float(blocks[-1][-1])
        times = np.concatenate(blocks)
        times = times[times < horizon]
        lot = random.random(len(times))
        kinds = np.full(len(times), Kind.NODE, np.int8)
        kinds[lot < self.worker_share] = Kind.WORKER
        kinds[lot >= 1 - self.rack_share] = Kind.RACK
        return Failures(times, kinds, random.integers(nodes, size=len(times)))


@dataclass(frozen=True, slots=True)
class Trace:
    """Recorded failures, replayed as recorded; nodes that the trace does not name are redrawn in every trial."""

    times: NDArray[np.float64]
    kinds: NDArray[np.int8]
    nodes: NDArray[np.int64]
    """Failed nodes; -1 if not named."""

    @property
    def span(self) -> float:
        """Return the time of the last failure in seconds."""
        return float(self.times[-1])

    @property
    def rack_share(self) -> float:
        return float(np.mean(self.kinds == Kind.RACK))

    @property
    def worker_share(self) -> float:
        return float(np.mean(self.kinds == Kind.WORKER))

    @property
    def draws_nodes(self) -> bool:
        return bool(np.all(self.nodes < 0))

    def count(self, horizon: float) -> float:
        return float(np.count_nonzero(self.times < horizon))

    def within(self, window: float) -> float:
        return float(np.mean(np.diff(self.times) < window)) if len(self.times) > 1 else 0.0

    def sample(self, nodes: int, horizon: float, random: np.random.Generator) -> Failures:
        if (named := int(self.nodes.max())) >= nodes:
            raise SimulationError(f"the trace names node {named}, the cluster has nodes 0 to {nodes - 1}")
        kept = self.times < horizon
        drawn = random.integers(nodes, size=len(self.times))
        return Failures(self.times[kept], self.kinds[kept], np.where(self.nodes < 0, drawn, self.nodes)[kept])


def load_trace(path: Path) -> Trace:
    """Read a trace: CSV with a header or a JSON list of objects, with keys `time_s` and optional `kind` and `node`.

    `time_s` is in seconds since the start; `kind` is worker, node (the default) or rack; `node` counts from 0.

    Raises:
        SimulationError: the file cannot be read, or a row is invalid; names the row.
    """
    rows = _read_rows(path)
    times, kinds, nodes = [], [], []
    for number, row in enumerate(rows, start=1):
        where = f"{path}, failure {number}"
        if not isinstance(row, Mapping):
            raise SimulationError(f"{where}: expected an object with the key time_s, found {row!r}")
        if unknown := sorted(str(key) for key in row if key not in ("time_s", "kind", "node")):
            raise SimulationError(f"{where}: unknown key {unknown[0]!r}; known are time_s, kind and node")
        time, node = _number(row, "time_s", where), _number(row, "node", where, default=-1.0)
        kind = str(row.get("kind") or "node").strip().upper()
        if kind not in Kind.__members__:
            raise SimulationError(f"{where}: kind is {row['kind']!r}; it must be worker, node or rack")
        if not (math.isfinite(time) and time >= 0 and math.isfinite(node) and node >= -1 and node == int(node)):
            raise SimulationError(f"{where}: time_s = {time} and node = {node} must be numbers from 0")
        times.append(time)
        kinds.append(Kind[kind])
        nodes.append(int(node))
    if not times:
        raise SimulationError(f"{path}: the trace has no failure")
    order = np.argsort(times, kind="stable")
    return Trace(np.array(times)[order], np.array(kinds, np.int8)[order], np.array(nodes)[order])


def _read_rows(path: Path) -> list[Any]:
    try:
        if path.suffix == ".json":
            rows = parse_json(path.read_bytes())
        else:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file, skipinitialspace=True))
    except OSError as error:
        raise SimulationError(f"{path}: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise SimulationError(f"{path}: not a CSV or JSON file: {error}") from error
    if not isinstance(rows, list):
        raise SimulationError(f"{path}: expected a list of failures, found {type(rows).__name__}")
    return rows


def _number(row: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = row.get(key)
    if value in (None, ""):
        if default is None:
            raise SimulationError(f"{where}: no {key}")
        return default
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise SimulationError(f"{where}: {key} is {value!r}, not a number") from None
