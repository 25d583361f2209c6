"""What the metrics of a run folder say, torn and large ones included."""

import json
from pathlib import Path

import pytest

from keepwarm.trainer.job.run_folder import RunFolder

TORN = b'{"step": 3, "lo'


def write(folder: Path, *records: dict[str, object], end: bytes = b"") -> RunFolder:
    run = RunFolder(folder)
    run.metrics_file.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records) + end)
    return run


def test_metrics_missing_file_is_an_unstarted_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert (run.metrics(), run.evaluations(), run.last_step(), run.has_begun, run.exists) == ([], [], 0, False, False)
    run.drop_metrics_after(0)
    assert list(tmp_path.iterdir()) == []


def test_metrics_torn_last_line_is_ignored(tmp_path: Path) -> None:
    run = write(tmp_path, {"step": 0, "eval": {"en": 3.0}}, {"step": 1, "loss": 2.0}, end=TORN)
    assert run.metrics() == [{"step": 0, "eval": {"en": 3.0}}, {"step": 1, "loss": 2.0}]
    assert run.evaluations() == [{"en": 3.0}]
    assert (run.last_step(), run.has_begun) == (1, True)


@pytest.mark.parametrize("cut", range(len(json.dumps({"step": 3, "loss": 1.5})) + 1))
def test_metrics_cut_anywhere_never_raises(tmp_path: Path, cut: int) -> None:
    line = json.dumps({"step": 3, "loss": 1.5}).encode()
    run = write(tmp_path, {"step": 2, "loss": 2.0}, end=line[:cut])
    assert run.last_step() == (3 if cut == len(line) else 2)


def test_recent_metrics_of_a_large_file_are_its_newest_records(tmp_path: Path) -> None:
    run = write(tmp_path, *({"step": step, "loss": 1.0} for step in range(1, 10_001)), end=TORN)
    recent = [record["step"] for record in run.recent_metrics()]
    assert recent == list(range(recent[0], 10_001))
    assert 1000 < len(recent) < 10_000
    assert run.last_step() == 10_000


def test_last_step_in_record_larger_than_tail_is_found(tmp_path: Path) -> None:
    run = write(tmp_path, {"step": 7, "eval": {f"domain {number}": 1.0 for number in range(10_000)}})
    assert run.recent_metrics() == []
    assert run.last_step() == 7


@pytest.mark.parametrize("step", [0, 1, 4_321, 9_999, 10_000, 20_000])
def test_drop_metrics_after_reads_only_what_it_drops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    records = [{"step": number, "loss": float(number)} for number in range(1, 10_001)]
    run = write(tmp_path, {"step": 0, "eval": {}}, *records, end=TORN)
    parsed: list[bytes] = []
    parse = json.loads
    monkeypatch.setattr(json, "loads", lambda line: (parsed.append(line), parse(line))[1])
    run.drop_metrics_after(step)
    assert len(parsed) == max(0, 10_000 - step) + 2  # the torn line, and the newest one before it
    monkeypatch.undo()
    assert run.metrics() == [{"step": 0, "eval": {}}, *records[:step]]
    assert run.metrics_file.read_bytes().endswith(b"\n")


def test_drop_metrics_after_a_cut_line_that_is_whole_json_keeps_it(tmp_path: Path) -> None:
    run = write(tmp_path, {"step": 1, "loss": 1.0}, end=b'{"step": 2, "loss": 2.0}')
    run.drop_metrics_after(2)
    assert run.last_step() == 2
    assert b"\0" not in run.metrics_file.read_bytes()


@pytest.mark.parametrize("evaluation", [True, False])
def test_drop_metrics_after_a_step_drops_its_evaluation_on_request(tmp_path: Path, evaluation: bool) -> None:
    steps = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    run = write(tmp_path, *steps[:2], {"step": 2, "eval": {}}, steps[2], end=TORN)
    run.drop_metrics_after(2, evaluation=evaluation)
    kept = steps[:2] if evaluation else [*steps[:2], {"step": 2, "eval": {}}]
    assert run.metrics_file.read_bytes() == b"".join(json.dumps(line).encode() + b"\n" for line in kept)
