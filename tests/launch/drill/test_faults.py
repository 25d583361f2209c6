"""Faults of a drill: how they are written, what is refused, how campaigns are drawn."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.launch.drill.faults import KEEP_MEMORY, TARGETS, UNNUMBERED, Action, Fault, Stage, check, draw, parse
from keepwarm.launch.errors import DrillError

STAGE = Stage(steps=24, ranks=8, nodes=4, spares=3, durable=True, supervised=True)
ALONE = Stage(steps=24, ranks=8, nodes=1, spares=0, durable=False, supervised=False)


@pytest.mark.parametrize(
    ("action", "text", "numbers", "step", "after"),
    [
        ("kill", "worker:1@20", (1,), 20, 0.0),
        ("kill", "node:2@35", (2,), 35, 0.0),
        ("kill", "nodes:0,3@50", (0, 3), 50, 0.0),
        ("kill", "supervisor:1@5+1.5", (1,), 5, 1.5),
        ("freeze", "node:1@55", (1,), 55, 0.0),
        ("corrupt", "chunk:1@60", (1,), 60, 0.0),
        ("kill", "store@65", (), 65, 0.0),
        ("stop", "disk@70", (), 70, 0.0),
    ],
)
def test_fault_option_is_parsed_and_printed_back(
    action: Action, text: str, numbers: tuple[int, ...], step: int, after: float
) -> None:
    fault = parse(action, text)
    assert (fault.numbers, fault.step, fault.after) == (numbers, step, after)
    assert fault.option == f"--{action} {text}"


@pytest.mark.parametrize(
    ("action", "text", "words"),
    [
        ("kill", "worker1@20", "--kill worker1@20: expected TARGET@STEP, as --kill node:2@35"),
        ("kill", "worker:1", "expected TARGET@STEP"),
        ("kill", "worker:1@", "expected TARGET@STEP"),
        ("kill", "worker:-1@3", "expected TARGET@STEP"),
        ("kill", "worker:1@20+soon", "expected TARGET@STEP"),
        ("kill", "chunk:1@3", "cannot kill a 'chunk'; it can be worker or node or agent or keeper or supervisor"),
        ("freeze", "worker:1@3", "cannot freeze a 'worker'; it can be node"),
        ("kill", "node@3", "says not which node, write node:0@3"),
        ("kill", "store:1@3", "a store has no number, write store@3"),
        ("kill", "node:1,2@3", "node takes one number, for several write nodes:1,2"),
        ("kill", "nodes:1,1@3", "names the same node twice"),
        ("corrupt", "chunks:1,2@3", "one chunk at a time"),
    ],
)
def test_fault_bad_syntax_is_one_line(action: Action, text: str, words: str) -> None:
    with pytest.raises(DrillError) as caught:
        parse(action, text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "stage", "words"),
    [
        ("worker:1@24", STAGE, "--kill worker:1@24: that step never comes"),
        ("worker:1@0", STAGE, "choose one from 1 to 23"),
        ("node:4@5", STAGE, "--kill node:4@5: there is no node 4, the job has nodes 0 to 3"),
        ("nodes:1,7@5", STAGE, "there is no node 7"),
        ("worker:8@5", STAGE, "there is no rank 8, the job has ranks 0 to 7"),
        ("agent:1@5", ALONE, "there is no node 1, the job has node 0 alone"),
        ("node:0@5", ALONE, "cannot be lost here; set cluster.ranks_per_node"),
    ],
)
def test_fault_impossible_is_refused(text: str, stage: Stage, words: str) -> None:
    with pytest.raises(DrillError, match=r"^--kill") as caught:
        check([parse("kill", text)], stage)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "spares", "words"),
    [
        (["node:1@5"], 0, "the faults need 1 spare, and there are none: .*; give --spares 1,"),
        (["nodes:0,3@5", "supervisor:1@7"], 2, "the faults need 3 spares, and there are 2: "),
        (["nodes:0,3@5", "worker:1@7", "store@8"], 2, None),
    ],
)
def test_fault_lost_node_without_a_spare_is_refused(texts: list[str], spares: int, words: str | None) -> None:
    wanted, stage = [parse("kill", text) for text in texts], replace(STAGE, spares=spares)
    if words is None:
        check(wanted, stage)
    else:
        with pytest.raises(DrillError, match=words):
            check(wanted, stage)


def test_fault_frozen_node_counts_as_spare_after_it_resumes() -> None:
    frozen = [parse("freeze", f"node:{slot}@{step}") for slot, step in ((1, 5), (2, 9))]
    check(frozen, replace(STAGE, spares=1))
    with pytest.raises(DrillError, match="need 2 spares"):
        check([parse("kill", "node:0@3"), *frozen], replace(STAGE, spares=1))


@pytest.mark.parametrize(("texts", "slots"), [(["nodes:0,3@5"], "0, 3"), (["node:0@5", "nodes:1,2@5+1"], "0, 1, 2")])
def test_fault_frozen_majority_is_refused(texts: list[str], slots: str) -> None:
    with pytest.raises(DrillError, match=f"nodes {slots} of 4 would be frozen at once"):
        check([parse("freeze", text) for text in texts], STAGE)
    check([parse("freeze", "nodes:1,2@5"), parse("freeze", "node:0@9")], STAGE)


def test_fault_disk_without_durable_snapshots_is_refused() -> None:
    check([parse("stop", "disk@5")], STAGE)
    with pytest.raises(DrillError, match=r"set snapshot\.durable"):
        check([parse("stop", "disk@5")], ALONE)


@st.composite
def faults(draw_: st.DrawFn) -> Fault:
    action = draw_(st.sampled_from(sorted(TARGETS)))
    target = draw_(st.sampled_from(TARGETS[action]))
    most = 0 if target in UNNUMBERED else 1 if target == "chunk" else 4
    numbers = draw_(st.lists(st.integers(0, 99), min_size=min(1, most), max_size=most, unique=True))
    after = draw_(st.sampled_from([0.0, 0.25, 3.0]))
    return Fault(action=action, target=target, numbers=tuple(numbers), step=draw_(st.integers(0, 999)), after=after)


@settings(deadline=None)
@given(faults())
def test_fault_text_round_trips(fault: Fault) -> None:
    assert parse(fault.action, str(fault).removeprefix(f"{fault.action} ")) == fault


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000), st.sampled_from([STAGE, ALONE]), st.integers(0, 3))
def test_draw_campaign_is_possible_and_repeatable(count: int, seed: int, stage: Stage, parity: int) -> None:
    drawn = draw(count, seed, stage, parity)
    assert drawn == draw(count, seed, stage, parity)
    assert len(drawn) == count
    check(drawn, stage)
    assert sum(len(fault.numbers) for fault in drawn if fault.target in ("node", "supervisor")) <= stage.spares
    at_once: list[int] = []
    last = None
    for fault in drawn:
        if last is None or (fault.step != last.step and last.after == 0):
            at_once.append(0)
        at_once[-1] += 0 if fault.target in KEEP_MEMORY else len(fault.numbers)
        last = fault
    assert max(at_once) <= max(parity, 1)
    frozen = [sum(each.action == "freeze" for each in drawn if each.step == fault.step) for fault in drawn]
    assert 2 * max(frozen) < stage.nodes or not any(frozen)


def test_draw_has_every_kind_and_strikes_recoveries() -> None:
    drawn = [fault for seed in range(40) for fault in draw(4, seed, replace(STAGE, steps=12), 2)]
    assert {(fault.action, fault.target) for fault in drawn} == {
        (action, target) for action, targets in TARGETS.items() for target in targets
    }
    assert {fault.after for fault in drawn} > {0.0, 0.5, 2.0}


def test_draw_stops_the_disk_once_at_a_time() -> None:
    for seed in range(200):
        drawn = draw(6, seed, replace(STAGE, steps=6), 2)
        assert sum(fault.target == "disk" for fault in drawn) <= 1, drawn


def test_draw_seeds_give_different_campaigns() -> None:
    assert len({str(draw(3, seed, STAGE, 2)) for seed in range(20)}) > 15


def test_draw_job_of_few_steps_is_refused() -> None:
    short = Stage(steps=3, ranks=1, nodes=1, spares=0, durable=False, supervised=False)
    with pytest.raises(DrillError, match="only 3 steps"):
        draw(1, 0, short, 0)
