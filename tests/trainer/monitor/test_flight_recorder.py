"""NCCL's recorder is read beside gloo's, and tells which GPU keeps the others waiting.

The entries have the form that `FlightRecorder::dump_json` of torch writes: every key, times as integers, 0 for unknown.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from torch._C import _distributed_c10d

from keepwarm.trainer.monitor import flight_recorder, hang, hang_report
from keepwarm.trainer.monitor.flight_recorder import DUMPS
from keepwarm.trainer.monitor.hang import Report
from keepwarm.trainer.monitor.stragglers import Trace, stragglers

NCCL, GLOO = DUMPS
MILLISECOND = 1_000_000


def entry(
    number: int, state: str, *, at: int | None = None, lasted: float | None = None, group: str = "default_pg"
) -> dict[str, Any]:
    """Return an all-reduce of NCCL's recorder."""
    created = flight_recorder._since + (number * 10 * MILLISECOND if at is None else at)
    duration = {} if lasted is None else {"duration_ms": lasted}
    return duration | {
        "record_id": number - 1,
        "pg_id": 0,
        "process_group": ["0", group],
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "op_id": number,
        "profiling_name": "nccl:all_reduce",
        "thread_id": "140156889738112",
        "thread_name": "python",
        "time_created_ns": created,
        "input_sizes": [[3, 4]],
        "input_dtypes": ["Float"],
        "output_sizes": [[3, 4]],
        "output_dtypes": ["Float"],
        "state": state,
        "time_discovered_started_ns": created + 1 if state != "scheduled" else 0,
        "time_discovered_completed_ns": created + 2 if state == "completed" else 0,
        "retired": state == "completed",
        "timeout_ms": 600000,
        "is_p2p": False,
    }


class Recorders:
    """Stand in for torch's two recorders."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.entries: dict[str, Sequence[Mapping[str, Any]]] = {NCCL: [], GLOO: []}
        for name in DUMPS:
            patch.setattr(_distributed_c10d, name, lambda name=name, **_: self._dump(name), raising=False)
        patch.setenv(flight_recorder.TIMING, "1")

    def _dump(self, name: str) -> str:
        # torch leaves the key out of an empty recorder.
        entries = {"entries": self.entries[name]} if self.entries[name] else {}
        return json.dumps({"version": "2.10", "pg_config": {}, "pg_status": {}, "nccl_comm_state": {}} | entries)

    def report(self, rank: int, *entries: Mapping[str, Any]) -> Report:
        """Return the hang report of a rank with these entries."""
        self.entries[NCCL] = entries
        return hang_report.take(rank, 41, 120.0)


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Recorders:
    return Recorders(monkeypatch)


def test_read_both_recorders_in_the_order_of_calls(recorders: Recorders) -> None:
    gloo = entry(1, "scheduled", at=15 * MILLISECOND) | {"profiling_name": "gloo:barrier", "retired": True}
    recorders.entries = {NCCL: [entry(1, "completed"), entry(2, "started")], GLOO: [gloo]}
    found = flight_recorder.read()
    assert [(one.operation, one.number, one.ended) for one in found] == [
        ("nccl:all_reduce", 1, True),
        ("gloo:barrier", 1, True),
        ("nccl:all_reduce", 2, False),
    ]


def test_read_torch_that_returns_all_from_both_gives_each_once(recorders: Recorders) -> None:
    both = [entry(1, "completed"), entry(2, "scheduled")]
    recorders.entries = {NCCL: both, GLOO: both}
    assert [(one.number, one.reached) for one in flight_recorder.read()] == [(1, True), (2, False)]


def test_hang_gpu_that_does_not_reach_a_queued_collective_is_late(recorders: Recorders) -> None:
    """All processes have queued the same: only the GPU of rank 2 has not come to number 7."""
    waits = [entry(6, "completed"), entry(7, "started"), entry(8, "scheduled")]
    stuck = [entry(6, "completed"), entry(7, "scheduled"), entry(8, "scheduled")]
    verdict = hang.judge([recorders.report(rank, *(stuck if rank == 2 else waits)) for rank in range(4)], 4)
    assert (verdict.silent, verdict.late) == ((), (2,))
    assert "ranks 0, 1, 3 in nccl:all_reduce number 7 of group default_pg (0)" in verdict.text


def test_hang_process_that_queued_nothing_more_is_late(recorders: Recorders) -> None:
    reports = [
        recorders.report(0, entry(6, "completed"), entry(7, "started")),
        recorders.report(1, entry(6, "completed")),
    ]
    assert hang.judge(reports, 2).late == (1,)


def test_hang_first_collective_of_a_group_not_reached_is_late(recorders: Recorders) -> None:
    reports = [recorders.report(0, entry(1, "started")), recorders.report(1, entry(1, "scheduled"))]
    assert hang.judge(reports, 2).late == (1,)


def test_hang_rank_that_waits_for_the_late_one_is_not_blamed(recorders: Recorders) -> None:
    """Rank 1 waits for rank 0 in their group, and therefore keeps rank 2 waiting in another one."""
    reports = [
        recorders.report(0, entry(4, "scheduled", group="tensor")),
        recorders.report(1, entry(4, "started", group="tensor"), entry(9, "scheduled", group="data")),
        recorders.report(2, entry(9, "started", group="data")),
    ]
    assert hang.judge(reports, 3).late == (0,)


def test_hang_without_timing_queued_collectives_count_as_begun(
    recorders: Recorders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(flight_recorder.TIMING, "0")
    assert recorders.report(0, entry(7, "scheduled")).reached == {"default_pg (0)": 7}


def test_straggler_slow_gpu_is_named_although_all_processes_queue_alike(recorders: Recorders) -> None:
    """Each step of 10 ms holds one collective. Three GPUs wait 4 ms in it for the fourth, for which it takes 0.1 ms."""
    traces = []
    for rank in range(4):
        recorders.entries[NCCL] = [entry(step, "completed", lasted=0.1 if rank == 3 else 4.1) for step in range(1, 12)]
        traces.append(Trace(rank, 0, f"node-{rank}", tuple(flight_recorder.read())))
    (found,) = stragglers(traces, 1.3)
    assert (found.rank, found.host) == (3, "node-3")
    assert found.share == pytest.approx(0.44)


def test_straggler_equal_gpus_have_none(recorders: Recorders) -> None:
    recorders.entries[NCCL] = [entry(step, "completed", lasted=4.0) for step in range(1, 12)]
    flights = tuple(flight_recorder.read())
    assert not stragglers([Trace(rank, 0, "", flights) for rank in range(4)], 1.1)


def test_straggler_slow_gpu_is_found_by_its_own_time_for_a_product() -> None:
    """Where all ranks wait for each other in every layer, collectives tell little; without NCCL's timing, nothing."""
    times = (2.0e-3, 2.1e-3, 3.4e-3, 2.0e-3)
    (found,) = stragglers([Trace(rank, 0, f"node-{rank}", (), time) for rank, time in enumerate(times)], 1.3)
    assert (found.rank, found.host, round(found.ratio, 2)) == (2, "node-2", 1.7)
    assert not stragglers([Trace(rank, 0, "", (), time) for rank, time in enumerate(times)], 1.8)
    assert not stragglers([Trace(0, 0, "", (), 0.0), Trace(1, 0, "", (), 3e-3)], 1.3)  # one is not known


def test_enable_on_a_gpu_measures_and_keeps_a_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (flight_recorder.SIZE, flight_recorder.TIMING):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(flight_recorder, "_since", 0)
    flight_recorder.enable(gpu=True)
    assert (os.environ["TORCH_FR_BUFFER_SIZE"], os.environ["TORCH_NCCL_ENABLE_TIMING"]) == ("20000", "1")
