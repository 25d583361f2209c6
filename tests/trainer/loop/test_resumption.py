"""Runs stopped and continued with another batch, sequence length, budget, rate or mixture.

What must hold is counted from what the engine saw: tokens by stage, windows by source, the rate at every step.
"""

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.errors import DataError, SpecError
from keepwarm.trainer.job.position import position_at, stage_records
from keepwarm.trainer.job.spec import JobSpec
from tests.support.runs.counted import TOKENS, Counted, Step, job_values, recording_engine


@pytest.fixture(autouse=True)
def engine() -> Iterator[None]:
    with recording_engine():
        yield


LENGTHS = (16, 32)


def drawn_stage(rng: random.Random, index: int) -> dict[str, Any]:
    peak = rng.choice([1e-3, 3e-4])
    lr: dict[str, Any] = {"schedule": rng.choice(["linear", "cosine", "wsd"]), "max": peak, "min": peak / 10}
    lr |= {"warmup": rng.choice([0.0, 0.1])} | ({"anneal": 0.5} if lr["schedule"] == "wsd" else {})
    stage: dict[str, Any] = {
        "name": f"s{index}",
        "tokens": rng.randrange(600, 6000),
        "mixture": rng.choice([{"a": 1}, {"b": 1}, {"a": 3, "b": 1}, {"a": 1, "b": 1, "c": 2}]),
        "lr": lr,
    }
    kind = rng.randrange(4)
    if kind == 0:
        stage["mixture_steps"] = [{"at": 0.5, "mixture": {"c": 1}}]
    if kind == 1:
        stage["mixture_ramp"] = {"to": {"c": 1}, "stairs": 4}
    if kind == 2 and index:
        stage["replay"] = {"fraction": 0.25}
    if rng.random() < 0.3:
        stage["sequence_length"] = rng.choice(LENGTHS)
    return stage


def drawn_job(rng: random.Random, folder: Path) -> dict[str, Any]:
    batch: dict[str, Any] = {"global_batch_size": rng.choice([4, 8, 16])}
    if rng.random() < 0.3:
        batch["ramp"] = {"start": 2, "increment": 2, "samples": rng.randrange(8, 200)}
    stages = [drawn_stage(rng, index) for index in range(rng.randrange(1, 4))]
    if any("replay" in stage for stage in stages):
        for stage in stages:
            stage.pop("sequence_length", None)
    values = job_values(folder, stages, batch=batch, length=rng.choice(LENGTHS))
    return values | {"seed": rng.randrange(100)}


def change(rng: random.Random, values: dict[str, Any], begun: int, consumed: int) -> set[str]:
    """Change a job in legal ways, for a run that has begun so many stages; returns what was changed."""
    done = set()
    last = values["stages"][max(begun - 1, 0)]
    if rng.random() < 0.5:
        values["batch"]["global_batch_size"] = rng.choice([2, 4, 8, 12, 16, 32])
        values["batch"].pop("ramp", None)
        done.add("batch")
    if rng.random() < 0.3:
        values["batch"]["micro_batch_size"] = rng.choice([1, 2])
        if ramp := values["batch"].get("ramp"):
            ramp |= {"start": 2, "increment": 2}
    if rng.random() < 0.3:
        values["data"]["sequence_length"] = rng.choice(LENGTHS)
        last["sequence_length"] = rng.choice(LENGTHS)
        done.add("length")
    if rng.random() < 0.4:
        last["tokens"] = max(consumed, 1) + rng.randrange(0, 3000)
        done.add("budget")
    if rng.random() < 0.3:
        last["lr"] |= {"max": 2e-3, "min": 1e-4}
        done.add("rate")
    if rng.random() < 0.2:
        values["stages"].append(drawn_stage(rng, len(values["stages"])))
    return done


def rate(lr: dict[str, Any], progress: float) -> float:
    """The rate at a fraction of a stage's budget, by the formulas of the three shapes."""
    warm, peak, floor = lr.get("warmup", 0.01), lr["max"], lr["min"]
    if progress < warm:
        return float(peak * progress / warm)
    x = min(1.0, (progress - warm) / (1 - warm))
    if lr["schedule"] == "cosine":
        return float(floor + (peak - floor) * (1 + math.cos(math.pi * x)) / 2)
    if lr["schedule"] == "wsd":
        x = max(0.0, (progress - 1 + lr["anneal"]) / lr["anneal"])
    return float(peak + (floor - peak) * min(1.0, x))


def assert_rates(run: Counted, first: int, stage: dict[str, Any], name: str) -> None:
    """Every step of a stage since the step `first` was trained with the rate of the consumed fraction."""
    before = sum(step.tokens for at, step in zip(run.stages[:first], run.steps, strict=False) if at == name)
    sizes = [step.tokens for at, step in zip(run.stages[first:], run.steps[first:], strict=True) if at == name]
    rates = [step.rate for at, step in zip(run.stages[first:], run.steps[first:], strict=True) if at == name]
    slack = 2.5 * max(sizes, default=0) / max(stage["tokens"], before + sum(sizes))
    for size, found in zip(sizes, rates, strict=True):
        middle, lr = before / stage["tokens"], stage["lr"]
        corners = (0.0, lr["warmup"], 1 - lr.get("anneal", 0.0), 1.0)
        near = [middle + slack * i / 10 for i in range(-10, 11)]
        near += [corner for corner in corners if abs(corner - middle) <= slack]
        around = [rate(stage["lr"], max(0.0, min(1.0, at))) for at in near]
        assert min(around) * 0.999 <= found <= max(around) * 1.001, (name, before, stage, found, around)
        before += size


def assert_windows_not_lost(run: Counted, ledger: Ledger, replayed: list[bool]) -> None:
    """Of every source and length, new samples repeat only after all windows of an epoch were drawn."""
    fresh: dict[tuple[str, int], list[int]] = {}
    rows = [row for step in run.steps for row in step.rows]
    assert len(rows) == ledger.position
    for (name, first, length), again in zip(rows, replayed, strict=True):
        if not again:
            fresh.setdefault((name, length), []).append(first // length)
    for (name, length), windows in fresh.items():
        size = TOKENS[name] // length
        for epoch in range(0, len(windows), size):
            assert len(set(windows[epoch : epoch + size])) == len(windows[epoch : epoch + size])
    given = {identity: given.consumed for identity, given in ledger.given().items()}
    assert given == {f"{name}/{length}": len(windows) for (name, length), windows in fresh.items()}


def last_ledger(run: Counted) -> Ledger:
    newest = publication.latest(run.folder / "checkpoints")
    assert newest is not None
    return Ledger.load(read_manifest(newest).meta["ledger"])


def replayed_rows(ledger: Ledger) -> list[bool]:
    return [bool(flag) for flag in ledger.samples_at(np.arange(ledger.position)).replayed]


def continue_once(run: Counted, rng: random.Random, stop_after: int | None) -> bool:
    """Continue with drawn changes; return whether the run is finished."""
    first, kept = len(run.steps), replayed_rows(last_ledger(run))
    values = copy.deepcopy(run.values)
    change(rng, values, len(set(run.stages)), run.consumed()[run.stages[-1]])
    before = run.digests()
    try:
        finished = run.train(JobSpec.model_validate_json(json.dumps(values)), "resume", stop_after=stop_after)
    except DataError as error:
        # A replay clause draws samples of one length; here a change of length has given its stages two.
        if "write one clause" not in str(error) or run.digests() != before:
            raise
        return run.train(JobSpec.model_validate_json(json.dumps(run.values)), "resume", stop_after=stop_after)
    ledger = last_ledger(run)
    replayed = replayed_rows(ledger)
    assert replayed[: len(kept)] == kept
    assert_windows_not_lost(run, ledger, replayed)
    for stage in values["stages"]:
        # Fractions are of a stage's steps: under a ramp of the batch they are not those of its tokens.
        if stage["name"] in run.stages[first:] and values["batch"].get("ramp") is None:
            assert_rates(run, first, stage, stage["name"])
    return finished


def check(seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    run = Counted(drawn_job(rng, folder))
    job = JobSpec.model_validate_json(json.dumps(run.values))
    run.train(job, "fresh", stop_after=rng.randrange(1, 60))
    finished = False
    while not finished:
        finished = continue_once(run, rng, rng.randrange(1, 40) if rng.random() < 0.6 else None)
    assert_budgets(run, run.values)


def assert_budgets(run: Counted, values: dict[str, Any]) -> None:
    """Every stage has consumed its budget, rounded up to whole steps, and stages follow each other."""
    consumed = run.consumed()
    last_steps: dict[str, Step] = dict(zip(run.stages, run.steps, strict=True))
    assert list(consumed) == [stage["name"] for stage in values["stages"]]
    assert [name for name, before in zip(run.stages, ["", *run.stages], strict=False) if name != before] == list(
        consumed
    )
    for stage in values["stages"]:
        spare = consumed[stage["name"]] - stage["tokens"]
        assert 0 <= spare < last_steps[stage["name"]].tokens, (stage["name"], consumed, stage["tokens"])


@pytest.mark.parametrize("seed", range(40))
def test_resumption_with_legal_changes_trains_every_budget_once(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path / "run")


@pytest.mark.long
def test_resumption_with_legal_changes_holds_for_many_seeds(tmp_path: Path) -> None:
    for seed in range(1000, 1600):
        check(seed, tmp_path / f"run-{seed}")


TWO = [
    {"name": "one", "tokens": 2560, "mixture": {"a": 1}, "lr": {"max": 1e-3, "min": 1e-4, "warmup": 0.1}},
    {"name": "two", "tokens": 2560, "mixture": {"b": 1}, "lr": {"max": 5e-4, "min": 5e-5, "warmup": 0.1}},
]


def two_stages(folder: Path, *, stop_after: int | None) -> Counted:
    """Two stages of 20 steps, stopped in one of them."""
    run = Counted(job_values(folder, copy.deepcopy(TWO), batch={"global_batch_size": 4}, length=32))
    run.train(JobSpec.model_validate_json(json.dumps(run.values)), "fresh", stop_after=stop_after)
    return run


def resumed(run: Counted, **overrides: Any) -> None:
    """Continue to the end with keys changed, given with __ for a dot."""
    values = copy.deepcopy(run.values)
    for key, value in overrides.items():
        *path, last = (int(part) if part.isdigit() else part for part in key.split("__"))
        section: Any = values
        for part in path:
            section = section[part]
        section[last] = value
    run.train(JobSpec.model_validate_json(json.dumps(values)), "resume")


@pytest.mark.parametrize("size", [1, 2, 8, 16])
def test_resumption_other_batch_after_first_stage_trains_the_rest_of_the_second(size: int, tmp_path: Path) -> None:
    run = two_stages(tmp_path / "run", stop_after=30)
    resumed(run, batch__global_batch_size=size)
    assert run.stages == 20 * ["one"] + (10 + -(-40 // size)) * ["two"]
    assert [step.tokens for step in run.steps[30:]] == -(-40 // size) * [32 * size]


def test_resumption_other_length_keeps_the_budget_in_tokens(tmp_path: Path) -> None:
    run = two_stages(tmp_path / "run", stop_after=25)
    resumed(run, data__sequence_length=16)
    assert run.consumed() == {"one": 2560, "two": 2560}
    assert run.stages.count("two") == 5 + 30


def test_resumption_budget_of_consumed_tokens_ends_the_stage_there(tmp_path: Path) -> None:
    run = two_stages(tmp_path / "run", stop_after=10)
    resumed(run, stages__0__tokens=1280)
    assert run.consumed() == {"one": 1280, "two": 2560}


def test_resumption_finished_run_trains_on_with_a_larger_last_budget(tmp_path: Path) -> None:
    run = two_stages(tmp_path / "run", stop_after=None)
    resumed(run, stages__1__tokens=3840)
    assert run.consumed() == {"one": 2560, "two": 3840}
    first = [row for step in run.steps for row in step.rows]
    assert len(set(first)) == len(first)


def test_resumption_at_a_boundary_may_still_extend_the_first_stage(tmp_path: Path) -> None:
    run = two_stages(tmp_path / "run", stop_after=20)
    resumed(run, stages__0__tokens=3840)
    assert run.consumed() == {"one": 3840, "two": 2560}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"stages__0__tokens": 5120}, "stages.one.tokens: 2560 -> 5120: the run has left this stage"),
        ({"stages__0__lr__max": 2e-3}, "stages.one.lr: "),
        ({"stages__0__mixture": {"c": 1}}, "stages.one.mixture: "),
        ({"stages__1__tokens": 600}, "stages.two.tokens: 2560 -> 600: 640 tokens of it are trained already"),
        ({"stages__1__skip": 4}, "stages.two.skip: 0 -> 4: "),
        ({"stages__1__optimizer_state": "reset"}, "stages.two.optimizer_state: keep -> reset: "),
        ({"stages__0__name": "uno"}, "stages.0 is 'uno', but this run has trained 'one' there"),
        ({"stages": TWO[1:]}, "stages.0 is 'two', but this run has trained 'one' there"),
        ({"stages": TWO[:1]}, "stages.1 is missing, but this run has trained 'two' there"),
        ({"seed": 4}, "seed: 1 -> 4: "),
    ],
)
def test_resumption_illegal_change_is_refused_and_changes_no_file(
    overrides: dict[str, Any], named: str, tmp_path: Path
) -> None:
    run = two_stages(tmp_path / "run", stop_after=25)
    before = run.digests()
    with pytest.raises(SpecError) as refused:
        resumed(run, **overrides)
    assert named in str(refused.value)
    assert run.digests() == before


def test_resumption_of_an_earlier_versions_state_finds_the_stages(tmp_path: Path) -> None:
    run = two_stages(tmp_path / "run", stop_after=25)
    meta = read_manifest(publication.folder(run.folder / "checkpoints", 25)).meta
    ledger, state = Ledger.load(meta["ledger"]), dict(meta["run"])
    saved = stage_records(state, ledger)
    del state["stages"]
    found = stage_records(state, ledger)
    assert [(record.name, record.start_step, record.curve_step) for record in found] == [("one", 0, 0), ("two", 20, 20)]
    assert position_at(25, found, ledger) == position_at(25, saved, ledger)
