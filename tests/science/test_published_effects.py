"""A2, A4-A6, A8, A10, A16, A17, A21 and A27 on the toy test bed, with the product's sampler, schedules and loop."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepwarm.trainer.continual.forgetting import stability_gap
from keepwarm.trainer.continual.refine import clause, refined
from keepwarm.trainer.data.replay import Pool, Replay
from keepwarm.trainer.job.curve import LrSpec
from tests.support.runs import toy

pytestmark = pytest.mark.science
long = [pytest.mark.long, pytest.mark.timeout(3600)]
BOTH = ("t0", "t1")
BASE, CONTINUED = 3000, 1000
LOW = {"schedule": "constant", "max": toy.FLOOR, "warmup": 0.0}
HELD = {"schedule": "infinite", "max": toy.CONSTANT, "constant": toy.CONSTANT, "min": toy.FLOOR, "warmup": 0.0,
        "cooldown_end": 0.0}  # fmt: skip
INFINITE = {"schedule": "infinite", "max": toy.PEAK, "constant": toy.CONSTANT, "min": toy.FLOOR, "warmup": 0.01}


def replay(fraction: float, *origins: str, **more: Any) -> dict[str, Any]:
    return {"replay": {"from": origins, "fraction": fraction, **more}} if fraction else {}


@pytest.fixture(scope="module", params=[1, 2, 3], ids="seed {}".format)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, toy.Result]:
    """The old domain, learnt."""
    stage = toy.stage("pretrain", BASE, {"t0": 1.0}, toy.COSINE)
    folder = tmp_path_factory.mktemp("base") / "base"
    return request.param, toy.run(folder, [stage], seed=request.param, domains=BOTH)


Continue = Callable[..., toy.Result]


@pytest.fixture(scope="module")
def continued(base: tuple[int, toy.Result], tmp_path_factory: pytest.TempPathFactory) -> Continue:
    """The base trained on a new domain; each way once."""
    seed, parent = base

    @lru_cache
    def run(fraction: float = 0.0, kind: str = "cosine", source: str = "t1", **lr: float) -> toy.Result:
        rate = LOW if kind == "low" else toy.COSINE | lr
        stage = toy.stage("continue", CONTINUED, {source: 1.0}, rate, **replay(fraction, "pretrain"))
        folder = tmp_path_factory.mktemp("continued") / "run"
        return toy.run(folder, [stage], seed=seed, domains=BOTH, parent=parent, every=50)

    return run


class TestContinued:
    pytestmark = long

    def test_a2_forgetting_falls_with_replay(self, base: tuple[int, toy.Result], continued: Continue) -> None:
        """Ibrahim et al. (2024)."""
        before = base[1].last["t0"]
        runs = {fraction: continued(fraction).last for fraction in (0.0, 0.01, 0.05, 0.25, 0.5)}
        forgotten = {fraction: losses["t0"] - before for fraction, losses in runs.items()}
        print(f"A2 seed {base[0]}: {forgotten}, new domain {[losses['t1'] for losses in runs.values()]}")
        assert sorted(forgotten.values(), reverse=True) == list(forgotten.values())
        assert len(set(forgotten.values())) == len(forgotten)
        assert 1 - forgotten[0.25] / forgotten[0.0] >= 0.65
        assert runs[0.25]["t1"] - runs[0.0]["t1"] <= 0.30

    def test_a4_higher_peak_learns_and_forgets_more(self, base: tuple[int, toy.Result], continued: Continue) -> None:
        """Gupta et al. (2023)."""
        low, half, whole = (run.last for run in (continued(0.0, "low"), continued(max=toy.PEAK / 2), continued(0.0)))
        print(f"A4 seed {base[0]}: {low}, {half}, {whole}")
        assert low["t0"] < half["t0"] < whole["t0"]
        assert low["t1"] > half["t1"] > whole["t1"]

    def test_a5_warmup_length_does_not_matter(self, base: tuple[int, toy.Result], continued: Continue) -> None:
        """Gupta et al. (2023)."""
        runs = [continued(0.25, warmup=0.0).last, continued(0.25).last, continued(0.25, warmup=0.02).last]
        print(f"A5 seed {base[0]}: {runs}")
        for domain in BOTH:
            losses = [run[domain] for run in runs]
            assert max(losses) - min(losses) < 0.02

    def test_a6_rewarming_on_the_same_data_costs_temporarily(
        self, base: tuple[int, toy.Result], continued: Continue
    ) -> None:
        """Gupta et al. (2023)."""
        losses = continued(0.0, source="t0").losses("t0")
        print(f"A6 seed {base[0]}: start {losses[0]}, worst {max(losses)}, final {losses[-1]}")
        assert max(losses) - losses[0] >= 0.05
        assert losses[-1] - losses[0] <= 0.03

    def test_a10_stability_gap_is_found(self, base: tuple[int, toy.Result], continued: Continue) -> None:
        """Guo et al. (2024): replay; a subset and a better one for several epochs are reported without a claim."""
        run = continued(0.25)
        gap = stability_gap([step for step, _ in run.evaluations], run.losses("t0"), tolerance=0.01)
        print(f"A10 seed {base[0]}: {gap}")
        assert gap.depth >= 0.1
        assert gap.recovery_step is not None
        assert gap.worst_step < gap.recovery_step
        for other in ("t1/some", "t1/best"):
            run = continued(0.0, source=other)
            gap = stability_gap([step for step, _ in run.evaluations], run.losses("t1"), tolerance=0.01)
            print(f"A10 seed {base[0]}: {other} for several epochs, without replay: t1 {gap}, in the end {run.last}")


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a8_infinite_schedule_has_the_lower_worst_point(seed: int, tmp_path: Path) -> None:
    """Singh et al. (2025): three domains, 25 % replay, against cosine that re-warms each time."""
    steps, every = 1000, 50
    curves = {"cosine": [toy.COSINE] * 3, "infinite": [INFINITE, HELD, HELD | {"anneal": 0.15}]}
    worst, mean = {}, {}
    for name, clauses in curves.items():
        stages = [
            toy.stage(f"task {task}", steps, {f"t{task}": 1.0}, lr, **replay(0.25 if task else 0.0))
            for task, lr in enumerate(clauses)
        ]
        run = toy.run(tmp_path / name, stages, seed=seed, every=every, domains=("t0", "t1", "t2"))
        per = steps // every
        worst[name] = [max(run.losses("t0")[task * per : (task + 1) * per + 1]) for task in (1, 2)]
        mean[name] = sum(run.last.values()) / 3
    print(f"A8 seed {seed}: worst {worst}, mean {mean}")
    assert all(one + 0.03 <= other for one, other in zip(worst["infinite"], worst["cosine"], strict=True))
    assert mean["infinite"] <= mean["cosine"] + 0.03


def test_a16_refined_schedule_equals_its_closed_form() -> None:
    """Defazio et al. (2023)."""
    steps = 1000
    line = 1 - np.arange(1, steps + 1) / steps
    for level in (1e-3, 1.0, 37.0):
        assert np.abs(refined(np.full(steps, level)) - line).max() <= 1e-12
    at = np.linspace(0, 1, steps)
    norms = 1 + 4 * np.exp(-at / 0.05) + 4 * np.exp((at - 1) / 0.05)
    rates = refined(norms)
    peak = int(rates.argmax())
    assert 0.02 * steps < peak < 0.4 * steps
    assert rates[0] < 0.4 * rates[peak]
    assert (np.diff(rates[peak:]) < 0).all()
    assert rates[-50] / line[-50] < 0.7 * rates[peak] / line[peak]
    made = clause(norms.tolist(), 3e-3)
    found = LrSpec.model_validate(made | {"points": tuple(map(tuple, made["points"]))})
    curve = found.curve(steps)
    values = np.array([curve.at(step) for step in range(steps)])
    assert values.max() == pytest.approx(3e-3, rel=0.02)
    assert np.abs(values / 3e-3 - rates / rates.max()).mean() < 0.05


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a16_linear_is_as_good_as_cosine(seed: int, tmp_path: Path) -> None:
    """Defazio et al. (2023)."""
    final = {}
    for schedule in ("linear", "cosine"):
        lr = {"schedule": schedule, "max": toy.PEAK, "min": 0.0, "warmup": 0.01}
        final[schedule] = toy.run(tmp_path / schedule, [toy.stage("one", 1500, {"t0": 1.0}, lr)], seed=seed).last["t0"]
    print(f"A16 seed {seed}: {final}")
    assert final["linear"] <= final["cosine"] + 0.01


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a17_upsampling_at_the_end_lifts_a_domain(seed: int, tmp_path: Path) -> None:
    """Blakeney et al. (2024): a small domain in the last 15 %, and what leaving data out tells of them."""
    usual = {"t0": 0.60, "t1": 0.35, "t2": 0.05}
    heavy = {"t0": 0.47, "t1": 0.28, "t2": 0.25}
    arms: dict[str, dict[str, Any]] = {
        "base": {"mixture": usual},
        "end": {"mixture": usual, "mixture_steps": ({"at": 0.85, "mixture": heavy},)},
        "all": {"mixture": heavy},
        "end without t2": {"mixture": usual, "mixture_steps": ({"at": 0.85, "mixture": {"t0": 0.47, "t1": 0.28}},)},
        "end without t1": {"mixture": usual, "mixture_steps": ({"at": 0.85, "mixture": {"t0": 0.47, "t2": 0.25}},)},
    }
    last = {}
    for name, clauses in arms.items():
        mixture = clauses.pop("mixture")
        stage = toy.stage("one", 2000, mixture, toy.COSINE, **clauses)
        last[name] = toy.run(tmp_path / name, [stage], seed=seed, domains=("t0", "t1", "t2")).last
    print(f"A17 seed {seed}: {last}")
    assert last["end"]["t2"] <= last["base"]["t2"] - 0.05
    assert all(last["end"][name] <= last["base"][name] + 0.10 for name in ("t0", "t1"))
    general = {name: losses["t0"] + losses["t1"] for name, losses in last.items()}
    assert general["all"] > general["end"]
    harm = {name: last[f"end without {name}"]["t2"] - last["end"]["t2"] for name in ("t1", "t2")}
    assert harm["t2"] > harm["t1"]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a21_power_law_replay_weights_stages_by_age(exponent: float) -> None:
    """Catastrophic Interference ... Power-Law Learning Environments (2024): within three standard deviations."""
    pools = tuple(Pool(stage=f"s{age}", age=age, runs=((f"s{age}/8", 0, 50 + age),)) for age in (5, 4, 3, 2, 1, 0))
    made = Replay(stage="now", law="power", exponent=exponent, key="1/6", pools=pools)
    draws = 60_000
    source, _ = made.draw(np.arange(draws))
    weights = np.array([(1 + pool.age) ** -exponent for pool in pools])
    share = weights / weights.sum()
    counts = np.bincount(source, minlength=len(pools))
    assert (np.abs(counts - draws * share) <= 3 * np.sqrt(draws * share * (1 - share))).all()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a21_power_law_replay_forgets_less_than_recency(seed: int, tmp_path: Path) -> None:
    """Four domains one after the other, the same replay budget."""
    domains = ("t0", "t1", "t2", "t3")
    lost = {}
    for law in ("power", "recent"):
        stages = []
        for task, domain in enumerate(domains):
            again = {} if not task else replay(0.25, distribution="power", exponent=0.5) if law == "power" else replay(
                0.25, f"task {task - 1}"
            )  # fmt: skip
            stages.append(toy.stage(f"task {task}", 800, {domain: 1.0}, toy.COSINE, **again))
        run = toy.run(tmp_path / law, stages, seed=seed, domains=domains)
        boundaries = [run.evaluations[task][1] for task in range(1, 5)]
        lost[law] = np.mean([run.last[name] - boundaries[task][name] for task, name in enumerate(domains[:-1])])
    print(f"A21 seed {seed}: mean forgetting {lost}")
    assert lost["power"] <= lost["recent"]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a27_average_of_three_anneals_is_as_good_as_the_best(seed: int, tmp_path: Path) -> None:
    """OLMo 2 (2024): branches of one constant phase that see other data of the same mixture."""
    mixture = {"t0": 1.0, "t1": 1.0}
    base = toy.run(tmp_path / "base", [toy.stage("base", 2000, mixture, INFINITE)], seed=seed, domains=BOTH)
    branches = []
    for order in range(3):
        anneal = toy.stage("anneal", 500, mixture, HELD | {"anneal": 1.0}, skip=order * 500 * toy.BATCH)
        branches.append(toy.run(tmp_path / f"{order}", [anneal], seed=seed, domains=BOTH, parent=base))
    mean = {
        name: sum(branch.state[name] for branch in branches) / 3 for name in base.state if name.startswith("model.")
    }
    soup = toy.Result([], base.state | mean, base.ledger)
    still = toy.stage("still", 1, mixture, {"schedule": "constant", "max": 1e-9, "warmup": 0.0})
    averaged = toy.run(tmp_path / "soup", [still], seed=seed, domains=BOTH, parent=soup).evaluations[0][1]
    losses = [sum(branch.last.values()) / 2 for branch in branches]
    merged = sum(averaged.values()) / 2
    print(f"A27 seed {seed}: {losses}, average of weights {merged}")
    assert len(set(losses)) == 3
    assert merged <= sum(losses) / 3
    assert merged <= min(losses) + 0.01
