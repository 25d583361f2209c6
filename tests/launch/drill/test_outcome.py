"""What a drill concludes from marks and events, and how it shows it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import Piece
from keepwarm.ft.format.writer import write_part
from keepwarm.launch.drill.campaign import Result
from keepwarm.launch.drill.compare import differences
from keepwarm.launch.drill.faults import parse
from keepwarm.launch.drill.outcome import Outcome, Struck, outcomes
from keepwarm.launch.drill.report import phases_of, print_result, write_html
from keepwarm.launch.errors import DrillError
from keepwarm.launch.simulation.drill import apply_drill
from keepwarm.launch.simulation.scheme import Restart, Times
from keepwarm.trainer.monitor.events import Began, EventLog, Failure, Recovery
from keepwarm.trainer.monitor.goodput import Mark, goodput


def mark(session: int, time: float, kind: Any, step: int = 0) -> Mark:
    return Mark(session=session, time=time, mark=kind, step=step, restart=session > 1)


def steps(session: int, start: float, first: int, last: int) -> list[Mark]:
    """One step a second."""
    return [mark(session, start + step - first, "step", step) for step in range(first, last + 1)]


FIRST = [mark(1, 90, "start"), mark(1, 100, "restored"), *steps(1, 101, 1, 6)]
SECOND = [mark(2, 109, "start"), mark(2, 112, "restored", 5), *steps(2, 113, 6, 10)]
BEGAN = Began(time=112.0, source="memory", step=5, reason="committed snapshot")
WORKER = parse("kill", "worker:1@6")


def test_outcome_without_supervisors_has_observable_phases() -> None:
    (found,) = outcomes([Struck(fault=WORKER, time=106.5)], [*FIRST, *SECOND], EventLog((BEGAN,)))
    assert (found.level, found.why, found.steps_lost) == ("local", "committed snapshot", 1)
    assert found.seconds == {"detect": 2.5, "start": 3.0, "resume": 1.0}
    assert found.total == 6.5 == sum(found.seconds.values())


def test_outcome_with_supervisors_has_their_phases() -> None:
    phases = {"detect": 1.0, "rendezvous": 0.5, "decode": 0.25}
    failure = Failure(time=107.5, node="a", kind="lost", cause="node lost", slots=(2,))
    recovery = Recovery(
        time=113.0, level="decoded", why="node lost", slots=(2,), source="memory", step=5, bytes_decoded=1,
        phases=phases,
    )  # fmt: skip
    node = parse("kill", "node:2@6")
    (found,) = outcomes([Struck(fault=node, time=106.5)], [*FIRST, *SECOND], EventLog((failure, BEGAN, recovery)))
    assert (found.level, found.why, found.seconds, found.total) == ("decoded", "node lost", phases, 6.5)


def test_outcome_faults_of_one_outage_share_its_recovery() -> None:
    struck = [Struck(fault=WORKER, time=106.5), Struck(fault=parse("kill", "worker:2@6+2"), time=108.5)]
    first, second = outcomes(struck, [*FIRST, *SECOND], EventLog((BEGAN,)))
    assert (first.level, second.level) == ("local", "local")
    assert (first.total, second.total) == (6.5, 4.5)


def test_outcome_fault_without_outage_has_no_level() -> None:
    struck = [Struck(fault=parse("kill", "agent:1@3"), time=103.5), Struck(fault=WORKER, time=106.5)]
    agent, worker = outcomes(struck, [*FIRST, *SECOND], EventLog((BEGAN,)))
    assert (agent.level, agent.total, agent.steps_lost, dict(agent.seconds)) == (None, 0.0, 0, {})
    assert worker.level == "local"


def test_outcome_failed_restart_is_part_of_the_outage() -> None:
    third = [mark(3, 120, "start"), mark(3, 121, "restored", 5), *steps(3, 122, 6, 10)]
    began = Began(time=121.0, source="disk", step=5, reason="two nodes lost")
    (found,) = outcomes([Struck(fault=WORKER, time=106.5)], [*FIRST, *SECOND[:2], *third], EventLog((BEGAN, began)))
    assert (found.level, found.total) == ("disk", 15.5)


def result(**changes: Any) -> Result:
    found = outcomes([Struck(fault=WORKER, time=106.5)], [*FIRST, *SECOND], EventLog((BEGAN,)))
    other = Outcome(fault=parse("kill", "agent:1@3"))
    made = Result(outcomes=[*found, other], differences=(), residue=(), goodput=goodput([*FIRST, *SECOND]))
    return replace(made, **changes)


def test_outcome_json_is_read_by_the_simulator(tmp_path: Path) -> None:
    data = result().data()
    assert data["bitwise_equal"] is True
    assert data["faults"][0] == {
        "fault": "kill worker:1@6",
        "level": "local",
        "steps_lost": 1,
        "seconds": {"detect": 2.5, "start": 3.0, "resume": 1.0},
        "total_s": 6.5,
        "why": "committed snapshot",
    }
    file = tmp_path / "drill.json"
    file.write_text(json.dumps(data))
    restart = Restart(0.0, 0.0)
    times = Times(
        interval=1.0, stall=0.0, commit=0.0, worker=restart, node=restart, durable=restart, rebuild=None,
        durable_every=1.0,
    )  # fmt: skip
    assert apply_drill(times, file).worker == Restart(2.5, 4.0)


def test_outcome_table_and_page_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    print_result(result(), "tiny <job>")
    shown = capsys.readouterr().out
    assert phases_of(result().outcomes) == ["detect", "start", "resume"]
    assert "kill worker:1@6" in shown
    assert "no restart" in shown
    assert "bitwise equal to the uninterrupted run" in shown
    page = tmp_path / "drill.html"
    write_html(result(differences=("step 3: loss 1.0 and 2.0",), residue=("python <agent>",)), "tiny <job>", page)
    text = page.read_text()
    assert "Fire drill of tiny &lt;job&gt;, in seconds" in text
    assert "NOT equal to the uninterrupted run:<br>step 3: loss 1.0 and 2.0" in text
    assert "left behind and killed: python &lt;agent&gt;" in text
    assert "<td>6.50</td>" in text
    assert "http" not in text
    assert "<script" not in text


def checkpoint(folder: Path, value: int) -> None:
    """A run's newest checkpoint, of one tensor in two ranges; the first one has the value."""
    root = folder / "checkpoints"
    tmp, final = publication.staging(root, 1, 2), publication.folder(root, 2)
    tmp.mkdir(parents=True)
    for rank, flat in enumerate([(0, 3), (3, 4)]):
        piece = Piece(name="model.w", global_shape=(4,), offsets=(0,), shape=(4,), dtype="U8", flat=flat)
        write_part(tmp, rank, [(piece, np.full(piece.elements, 0 if rank else value, np.uint8))])
    publication.write_manifest(tmp, publication.Identity(run="r", epoch=1, step=2, layout="l"), ranks=2, meta={})
    publication.publish(tmp, final)


def run_folder(folder: Path, loss: float, value: int) -> Path:
    folder.mkdir()
    lines = [{"step": 1, "loss": 3.0, "step_time_s": loss}, {"step": 2, "loss": loss, "step_time_s": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if value:
        checkpoint(folder, value)
    return folder


def test_differences_compares_runs_bitwise(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "one", 1.0, 7)
    again = run_folder(tmp_path / "again", 1.0, 7)
    (again / "metrics.jsonl").write_text((one / "metrics.jsonl").read_text().replace("0.1}", "0.2}"))
    assert differences(one, again) == []
    assert differences(one, run_folder(tmp_path / "loss", 1.0000001, 7)) == ["step 2: loss 1.0 and 1.0000001"]
    assert differences(one, run_folder(tmp_path / "state", 1.0, 8)) == ["model.w at (0,), elements 0 to 3: other bytes"]
    with pytest.raises(DrillError, match="no complete checkpoint"):
        differences(one, run_folder(tmp_path / "none", 1.0, 0))
