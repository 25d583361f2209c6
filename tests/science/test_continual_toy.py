"""A1 and A7 on the toy test bed, with the product's sampler, ledger, schedules, optimizer and loop."""

from pathlib import Path

import pytest

from tests.support.runs import toy

pytestmark = [pytest.mark.science, pytest.mark.timeout(1800)]

SEEDS = [2, pytest.param(1, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)]
BOTH = ("t0", "t1")
REPLAY = {"from": ("pretrain",), "fraction": 0.25}


@pytest.mark.parametrize("seed", SEEDS)
def test_a1_rewarming_with_replay_comes_close_to_the_union(seed: int, tmp_path: Path) -> None:
    """A1, after Ibrahim et al. (2024): 80 % of the gap at half of the steps, strong shift, equal budgets."""
    steps = 2000
    base = toy.run(tmp_path / "base", [toy.stage("pretrain", steps, {"t0": 1.0}, toy.COSINE)], seed=seed, domains=BOTH)
    continued = toy.stage("continue", steps, {"t1": 1.0}, toy.COSINE)
    without = toy.run(tmp_path / "without", [continued], seed=seed, domains=BOTH, parent=base)
    replayed = toy.run(tmp_path / "replayed", [continued | {"replay": REPLAY}], seed=seed, domains=BOTH, parent=base)
    mixture = {"t0": 1.0, "t1": 1.0}
    union = toy.run(
        tmp_path / "union", [toy.stage("union", 2 * steps, mixture, toy.COSINE)], seed=seed + 9, domains=BOTH
    )
    nothing, quarter, whole = (sum(result.last.values()) / 2 for result in (without, replayed, union))
    closed = (nothing - quarter) / (nothing - whole)
    print(f"A1 seed {seed}: none {without.last}, 25 % {replayed.last}, union {union.last}, closed {closed:.1%}")
    assert without.ledger.position == replayed.ledger.position
    assert closed >= 0.8
    assert base.last["t0"] < replayed.last["t0"] < without.last["t0"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a7_infinite_schedule_has_no_spike_at_a_switch(seed: int, tmp_path: Path) -> None:
    """A7, after Singh et al. (2025): three tasks of the same data, against cosine that re-warms each time."""
    steps, every = 1000, 50
    flat = {"schedule": "infinite", "max": toy.CONSTANT, "constant": toy.CONSTANT, "min": toy.FLOOR, "warmup": 0.0}
    infinite = [
        {"schedule": "infinite", "max": toy.PEAK, "constant": toy.CONSTANT, "min": toy.FLOOR, "cooldown_end": 0.6},
        flat | {"cooldown_end": 0.1},
        flat | {"cooldown_end": 0.1, "anneal": 0.15},
    ]
    excess, final = {}, {}
    for name, clauses in {"cosine": [toy.COSINE] * 3, "infinite": infinite}.items():
        stages = [toy.stage(f"task {i}", steps, {"t0": 1.0}, lr) for i, lr in enumerate(clauses)]
        losses = toy.run(tmp_path / name, stages, seed=seed, every=every).losses("t0")
        per_task = steps // every
        switches = [losses[task * per_task : (task + 1) * per_task + 1] for task in (1, 2)]
        excess[name] = sum(max(task) - task[0] for task in switches) / 2
        final[name] = losses[-1]
    print(f"A7 seed {seed}: excess {excess}, final {final}")
    assert excess["infinite"] <= 0.03
    assert excess["infinite"] <= excess["cosine"] / 3
    assert final["infinite"] <= final["cosine"] + 0.03
