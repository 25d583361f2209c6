"""A7 on the toy test bed, with the product's sampler, ledger, schedules, optimizer and loop."""

from pathlib import Path

import pytest

from tests.support import toy

pytestmark = [pytest.mark.science, pytest.mark.timeout(1800)]

SEEDS = [2, pytest.param(1, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_infinite_schedule_has_no_spike_at_a_switch(seed: int, tmp_path: Path) -> None:
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
