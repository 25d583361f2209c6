"""The search for the fastest layout, and the model of a step's time behind it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from keepwarm.launch.cli.main import app
from keepwarm.launch.errors import SearchError
from keepwarm.launch.plan.plan import Plan
from keepwarm.launch.plan.search import EFFICIENCIES, choices, find, laid_out, most_memory
from keepwarm.launch.plan.step_time import Choice, Sizes, StepModel
from keepwarm.parallel.cards import CARDS
from keepwarm.parallel.errors import LayoutError
from keepwarm.trainer.job.estimate import usable_memory
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.spec import JobSpec
from tests.launch.plan.published_runs import EXPECTED, NAMES, RUNS, efficiency, fit

H100 = CARDS["H100"]
BF16 = "numerics.precision=bf16"


def job(name: str = "llama-3-8b", *overrides: str) -> JobSpec:
    return load_job(Path(name), overrides)


def test_published_runs_are_predicted_within_a_fifth_by_all_others() -> None:
    shares = fit(RUNS)
    for run in RUNS:
        others = fit([other for other in RUNS if other is not run], shares)
        assert abs(run.predicted(others) / run.tokens_per_s - 1) < 0.2, run.name


def test_shares_of_the_planner_are_those_fitted_to_the_published_runs() -> None:
    shares = fit(RUNS)
    hopper, older = efficiency(H100, shares), efficiency(CARDS["A100"], shares)
    for field in ("matrices", "attention", "elementwise", "eager", "link", "network", "jitter"):
        assert getattr(EFFICIENCIES["H100"], field) == pytest.approx(getattr(hopper, field), rel=0.05)
        if field != "attention":
            assert getattr(EFFICIENCIES["A100"], field) == pytest.approx(getattr(older, field), rel=0.05)


def test_fit_finds_the_shares_that_made_the_speeds() -> None:
    true = EXPECTED + np.linspace(-0.2, 0.2, len(NAMES)) * 0.3
    for run in RUNS:
        assert math.isfinite(run.predicted(true))
    made = [run.with_speed(run.predicted(true)) for run in RUNS]
    fitted = fit(made)
    assert max(abs(run.predicted(fitted) / run.tokens_per_s - 1) for run in made) < 0.02


@pytest.mark.parametrize(
    ("name", "card", "gpus"), [("llama-3-8b", "H100", 4), ("pythia-410m", "A100", 8), ("mt-nlg-530b", "H200", 512)]
)
def test_layouts_found_are_the_fastest_of_all_that_fit_and_are_accepted(name: str, card: str, gpus: int) -> None:
    given, kind = job(name, BF16), CARDS[card]
    model, fitting = StepModel(Sizes(given), kind, EFFICIENCIES[card]), []
    for choice in choices(given, kind, gpus):
        try:
            laid = laid_out(given, choice, kind, gpus)
        except (ValueError, LayoutError):
            continue
        if most_memory(laid).total <= usable_memory(laid):
            fitting.append(model.time(choice).total)
    found = find(given, kind, gpus)
    assert [one.time.total for one in found] == sorted(fitting)[: len(found)]
    for one in found:
        assert Plan(one.job).fits
        assert one.job.layout.world_size == gpus
        assert one.job.batch.global_batch_size == given.batch.global_batch_size
        JobSpec.model_validate_json(one.job.model_dump_json())


def test_search_covers_every_axis() -> None:
    found = [one for gpus in (16, 2240) for one in choices(job("mt-nlg-530b"), H100, gpus)]
    for values in (
        {one.parallel.tensor for one in found},
        {one.parallel.pipeline for one in found},
        {one.parallel.schedule for one in found},
        {one.parallel.data_mode for one in found},
        {one.micro_batch_size for one in found},
        {one.recompute for one in found},
    ):
        assert len(values) >= 3


def test_parts_of_a_step_follow_from_what_causes_them() -> None:
    given = job("llama-3-8b", "numerics.recompute=none")
    model = StepModel(Sizes(given), H100, EFFICIENCIES["H100"])

    def time(recompute: str = "none", **parallel: object) -> dict[str, float]:
        spec = given.parallel.model_copy(update={"tensor": 1, "pipeline": 1, "data": 64, **parallel})
        made = model.time(Choice(parallel=spec, micro_batch_size=1, recompute=recompute))  # type: ignore[arg-type]
        return {name: getattr(made, name) for name in made.__slots__}

    plain = time()
    assert plain["tensor"] == plain["bubble"] == plain["stages"] == plain["recompute"] == 0
    assert time("full")["recompute"] > time("selective")["recompute"] > 0
    assert time(tensor=8, data=8)["tensor"] > time(tensor=2, data=32)["tensor"] > 0
    one, two = (
        time(pipeline=4, data=16, schedule=schedule, stages_per_rank=each)
        for schedule, each in (("1f1b", 1), ("interleaved", 2))
    )
    assert two["bubble"] == pytest.approx(one["bubble"] / 2)
    assert two["stages"] == pytest.approx(2 * one["stages"])


def test_nothing_fits_says_what_the_least_is() -> None:
    with pytest.raises(
        SearchError, match=r"does not fit on 64 H100: even with tensor .* a rank needs [\d.]+ GiB; use more"
    ):
        find(job("mt-nlg-530b"), H100, 64)


def test_batch_that_divides_by_no_layout_is_named() -> None:
    with pytest.raises(SearchError, match=r"no layout of 1021 GPUs is possible|do not fill whole nodes of 8"):
        find(job(), H100, 1021)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--find", "--gpus", "8"], "--find needs the kind of GPU; choose from A100, H100, H200, B200"),
        (["--find", "--gpus", "8", "--gpu", "V100"], "--gpu V100: not known"),
        (["--find", "--gpu", "h100"], "--find needs the number of GPUs"),
        (["--find", "--gpus", "8", "--gpu", "h100", "numerics.precision=fp32"], "numerics.precision = fp32"),
    ],
)
def test_incomplete_request_is_one_sentence(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["plan", "llama-3-8b", *arguments])
    assert isinstance(result.exception, SearchError)
    assert said in str(result.exception)


@pytest.mark.parametrize("name", ["llama-3-8b", "pythia-410m"])
def test_written_job_is_the_one_found(tmp_path: Path, name: str) -> None:
    path = tmp_path / "found.yaml"
    arguments = ["plan", name, BF16, "--find", "--gpus", "16", "--gpu", "h100", "--gpus-per-node", "4", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--write", str(path)])
    assert result.exit_code == 0, result.output
    best = json.loads(result.stdout.splitlines()[0])["layouts"][0]
    written = load_job(path)
    found = job(name, BF16, *best["overrides"])
    assert written.model_dump(exclude={"cluster": {"sources"}}) == found.model_dump(exclude={"cluster": {"sources"}})
    again = CliRunner().invoke(app, [*arguments, "--write", str(path)])
    assert "exists already" in str(again.exception)
