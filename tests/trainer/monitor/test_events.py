"""The log of a run's events: written by many processes, read by other versions, described in the documentation."""

import math
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.monitor import events

ROOT = Path(__file__).parents[3]


def test_events_missing_file_is_an_empty_log(tmp_path: Path) -> None:
    assert events.read(tmp_path) == events.EventLog(())


def test_events_appended_by_many_processes_keep_lines_whole(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from keepwarm.trainer.monitor import events
        for step in range(200):
            events.append(Path(sys.argv[1]), events.SnapshotFailed(step=step, reason=sys.argv[2] * 500))
    """
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)], cwd=ROOT) for n in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    with RunFolder(tmp_path).events_file.open("a") as file:
        file.write('{"event": "torn')
    log = events.read(tmp_path)
    assert (len(log.events), log.unknown) == (600, 0)
    for node in "012":
        mine = [event for event in log.of(events.SnapshotFailed) if event.reason == node * 500]
        assert [event.step for event in mine] == list(range(200))
    assert all(event.time > 1e9 for event in log.events)


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "of a later version", "time": 1.0}',
        '{"event": "interrupted", "time": 1.0}',
        '{"event": "interrupted", "time": 1.0, "step": "three"}',
        '{"time": 1.0}',
        "3",
    ],
)
def test_events_of_another_version_are_counted_and_skipped(tmp_path: Path, line: str) -> None:
    events.append(tmp_path, events.Interrupted(step=1))
    with RunFolder(tmp_path).events_file.open("a") as file:
        file.write(line + "\n")
    events.append(tmp_path, events.Interrupted(step=2))
    log = events.read(tmp_path)
    assert ([event.step for event in log.of(events.Interrupted)], log.unknown) == ([1, 2], 1)


def test_events_unknown_field_is_ignored(tmp_path: Path) -> None:
    RunFolder(tmp_path).events_file.write_text('{"event": "interrupted", "time": 1.0, "step": 3, "by": "x"}\n')
    assert events.read(tmp_path) == events.EventLog((events.Interrupted(time=1.0, step=3),))


NAMES = """
training_started began finished interrupted parent lr_changed data_changed gate skipped empty spike stopped straggler
hang snapshots snapshot_failed redundancy_lost snapshot_unlocked checkpoint_failed sink_failed output_lost recovery
supervisor_started supervisor_ended failure whole node_drained node_excluded memory_kept memory_not_kept memory_saved
memory_not_saved resized batch_started batch_ended requeue requeue_refused
"""


def test_events_names_are_those_that_scripts_know() -> None:
    assert list(events.KINDS) == NAMES.split()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_events_number_that_is_not_finite_stays_readable(tmp_path: Path, value: float) -> None:
    gate = events.Gate(step=1, stage="a", domain="en", action="stop", before=1.0, now=value)
    slow = events.Straggler(step=1, rank=0, host="h", share=value, ratio=value)
    for event in (gate, slow, events.Finished(step=1, tokens_per_s=value)):
        events.append(tmp_path, event)
    log = events.read(tmp_path)
    assert log.unknown == 0
    assert [(event.before, event.now) for event in log.of(events.Gate)] == [(1.0, None)]
    assert [(event.share, event.ratio) for event in log.of(events.Straggler)] == [(None, None)]
    assert [event.tokens_per_s for event in log.of(events.Finished)] == [None]


def test_events_read_from_a_position_are_those_added_since(tmp_path: Path) -> None:
    assert events.size(tmp_path) == 0
    events.append(tmp_path, events.Interrupted(step=1))
    seen = events.size(tmp_path)
    events.append(tmp_path, events.Interrupted(step=2))
    assert [event.step for event in events.read(tmp_path, start=seen).of(events.Interrupted)] == [2]


def test_events_decode_inverts_encode() -> None:
    event = events.Failure(time=1.5, node="a", kind="agent", cause="it died", slots=(None, 3))
    assert events.decode(msgspec.json.encode(event)) == event
