"""A plan as data and as text."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from keepwarm.ft.format.contents import META_BYTES
from keepwarm.ft.memory.buffers import READ_CACHE, READ_WINDOW
from keepwarm.launch.plan.plan import Plan, sampled_steps
from keepwarm.launch.plan.plot import draw_plan
from keepwarm.launch.plan.room import Room
from keepwarm.launch.plan.text import chart, count, print_plan, route, route_to_larger, size
from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.learning_rate import LinearSpec


def plan(*overrides: str, job: str = "ci/tiny") -> Plan:
    return Plan(load_job(Path(job), overrides))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble"])
@pytest.mark.parametrize("data", [1, 2, 4])
def test_plan_layers_and_ranks_are_each_placed_once(schedule: str, data: int) -> None:
    made = plan(f"parallel.schedule={schedule}", f"parallel.data={data}", "parallel.pipeline=2", "parallel.tensor=2")
    layers = [layer for pipeline in range(2) for one in made.layers_at(pipeline) for layer in one]
    assert sorted(layers) == list(range(4))
    ranks = [rank for at in range(data) for pipeline in range(2) for rank in made.ranks_at(at, pipeline)]
    assert ranks == list(range(4 * data))


def test_plan_micro_batches_follow_the_ramp() -> None:
    made = plan(job="mt-nlg-530b")
    assert made.micro_batches(made.stages[0]) == (60, 240)


@pytest.mark.parametrize(("steps", "expected"), [(0, []), (1, [0]), (3, [0, 1, 2]), (1000, [0, 333, 666, 999])])
def test_plan_sampled_steps_include_both_ends(steps: int, expected: list[int]) -> None:
    assert sampled_steps(steps, 4) == expected


def test_plan_chart_falls_with_the_curve() -> None:
    curve = LinearSpec(max=1.0, warmup=0.0).curve(1000)
    lines = chart(curve.at, 1000, {0: "first", 10: "hidden", 500: "second"})
    filled = [sum(cell == "█" for cell in line) for line in lines[:6]]
    assert filled == sorted(filled)
    assert filled[0] < 15 < 45 < filled[-1]
    assert lines[6].count("┴") == 2
    assert "step 999" in lines[7]
    assert lines[8].split() == ["first", "second"]
    assert lines[8].index("second") == lines[6].rindex("┴")


JOB = """stages=[
  {name: english, tokens: 10_240, mixture: {en: 1}, lr: {max: 3e-3}},
  {name: german, tokens: 20_480, mixture: {de: 1}, lr: {max: 1e-3},
   replay: [{from: [english], fraction: 0.25}, {fraction: 0.1, distribution: power, exponent: 0.5}],
   mixture_steps: [{at: 0.5, mixture: {de: 3, en: 1}}]}]"""


def test_plan_text_holds_replay_mixtures_and_curve(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(JOB)
    print_plan(made)
    text = capsys.readouterr().out
    assert "25.0% of english, uniform, 10.0% of all seen, power 0.5" in text
    assert "from sample 160: de 75.0%, en 25.0%" in text
    (axis,) = [line for line in text.splitlines() if "└" in line]
    (names,) = [line for line in text.splitlines() if line.split() == ["english", "german"]]
    assert axis.index("┴") == names.index("german")
    assert [made.rate_at(step) for step in (0, 20)] == [3e-3, 1e-3]
    assert made.data()["stages"][1]["mixtures"][1] == {"sample": 160, "weights": {"de": 3, "en": 1}}


def test_plan_text_lists_layouts_to_shrink_to(capsys: pytest.CaptureFixture[str]) -> None:
    whole, elastic = plan(job="ci/snapshot"), plan("cluster.elastic=shrink", job="ci/snapshot")
    assert whole.data()["smaller"] == []
    assert [(one["nodes"], one["data"]) for one in elastic.data()["smaller"]] == [(2, 2), (1, 1)]
    print_plan(elastic, spec=True)
    text = capsys.readouterr().out
    assert "while nodes are missing (cluster.elastic: shrink):" in text
    way = r"through memory: both layouts need \d+\.\d [MG]iB of \d+\.\d [GT]iB"
    assert len(re.findall(rf"{way} +{way}\n", text)) == 2  # there and back
    assert text.index("stages") < text.index("# snapshot: the resolved spec") < text.index("elastic: shrink\n")
    print_plan(whole)
    text = capsys.readouterr().out
    assert "while nodes are missing" not in text
    assert "resolved spec" not in text


def test_plan_route_of_a_shrink_follows_from_the_memory_of_both_layouts() -> None:
    room = Room(before=2 << 30, after=1 << 30, total=3 << 30)
    assert route(room) == "through memory: both layouts need 3.0 GiB of 3.0 GiB"
    assert route(replace(room, after=3 << 30)) == "through the disk: both layouts need 5.0 GiB of 3.0 GiB"
    whole = plan("cluster.elastic=shrink", job="ci/snapshot")
    found = whole.room_beside(whole.smaller[0], lost=2)
    before, after = whole.host_memory, whole.smaller[0].host_memory
    assert found is not None
    assert before is not None
    assert after is not None
    bucket = 8 << 20
    assert (found.before, found.after) == (3 * before.total, after.total + READ_CACHE * bucket)
    grown = whole.smaller[0].room_beside(whole, lost=0)
    assert grown is not None
    # Two nodes are there and two join: each agent that there is passes two buckets on to a rank that has none.
    reading = (READ_CACHE + READ_WINDOW) * bucket
    assert (grown.before, grown.after) == (after.total, before.total + reading)
    alone = whole.smaller[1].room_beside(whole, lost=0)
    assert alone is not None
    assert alone.after == before.total + READ_CACHE * bucket  # it sends its own memory
    assert route_to_larger(grown, whole.job) == (True, route(grown))
    crowded = replace(grown, total=0)
    assert route_to_larger(crowded, whole.job) == (False, route(crowded))
    assert route_to_larger(grown, whole.job, "no agent is running") == (False, "through the disk: no agent is running")
    loose = plan("cluster.elastic=shrink", "snapshot.durable=null", "checkpoint.every=5", job="ci/snapshot")
    assert route_to_larger(grown, loose.job)[0] is False
    assert "snapshot.durable" in route_to_larger(grown, loose.job)[1]
    fixed = plan("cluster.elastic=shrink", "snapshot.port=7000", job="ci/snapshot")
    assert route_to_larger(None, fixed.job) == (
        False,
        "through the disk: the agents of both layouts cannot have one port",
    )
    assert fixed.room_beside(fixed.smaller[0]) is None  # two agents cannot have one port


def test_plan_curve_is_drawn_as_an_image(tmp_path: Path) -> None:
    draw_plan(plan(JOB), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(OutputError, match="nowhere"):
        draw_plan(plan(JOB), tmp_path / "nowhere" / "plan.png")


@pytest.mark.parametrize(("number", "text"), [(7, "7"), (1234, "1.23 k"), (1_774_720, "1.77 M"), (5.296e11, "530 B")])
def test_count_formats_thousands(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(("number", "text"), [(12, "12 B"), (2048, "2.0 KiB"), (35.9 * 2**30, "35.9 GiB")])
def test_size_formats_bytes(number: float, text: str) -> None:
    assert size(number) == text


def test_plan_host_memory_covers_snapshots_of_the_largest_node() -> None:
    """2 S (1 + m/k), + S with the durable tier; S is weights and two moments in fp32 once, and room beside them."""
    bucket = 1 << 16
    snapshot = f"{{every: 1, bucket: {bucket}, code: {{data: 2, parity: 2}}, durable: {{every: 1}}}}"
    made = plan("parallel.data=4", "cluster.ranks_per_node=1", f"snapshot={snapshot}")
    host = made.host_memory
    assert host is not None
    state = made.parameters * 12 / 4 + META_BYTES
    assert state <= host.durable - bucket < state + 3 * bucket
    assert (host.data, host.parity) == (2 * (host.durable - bucket), 2 * (host.durable - bucket))
    assert (host.receiving, host.decoding) == (3 * bucket, 4 * bucket)
    assert plan().host_memory is None
