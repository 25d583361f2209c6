"""Models of keepwarm's own layers and of transformers': stopped, killed, shrunk, handed to Megatron Core."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.drills.test_drill import TWO_NODES, assert_survived, carriers
from tests.support.runs import warm
from tests.support.runs.drill_campaign import drill
from tests.support.runs.node_run import DEADLINE, Run, assert_nothing_left, command, runs
from tests.support.runs.run_contents import steps_of, tensors_of
from tests.trainer.loop.test_run import TINY
from tests.trainer.loop.test_shrink import TWO, assert_close

pytestmark = [pytest.mark.dist, pytest.mark.timeout(1800)]

GEMMA = f"model={{transformers: {TINY.parents[1] / 'transformers' / 'gemma-3-tiny'}}}"
APERTUS = f"model={{transformers: {TINY.parents[1] / 'transformers' / 'apertus-tiny'}}}"
"""With buffers in its layers."""
LLAMA = (
    "model={layers: 4, hidden_size: 48, heads: 4, kv_heads: 2, ffn_size: 96, vocabulary_size: 264, "
    "max_sequence_length: 256, tied_embeddings: true, rope_theta: 500000.0, "
    "rope_scaling: {type: llama3, factor: 32, original_max_sequence_length: 8192}}"
)
STEADY = ("stages.0.lr={schedule: constant, max: 1e-3, warmup: 0}", "batch.micro_batch_size=2", "log.tensorboard=false")
"""A rate that does not depend on where the run is going to end; micro-batches of a size that every layout can run."""


def either(quick: str, models: dict[str, str]) -> list[object]:
    """Parameters: one model in the ordinary tests, the others in the long ones."""
    return [
        pytest.param(model, id=name, marks=() if name == quick else pytest.mark.long) for name, model in models.items()
    ]


MODELS = {"llama-3.2": LLAMA, "gemma-3": GEMMA, "apertus": APERTUS}


def until(step: int) -> str:
    return f"stages.0.tokens={step * 8 * 64}"


def train(*arguments: str, code: int = 0) -> str:
    done = warm.run(["train", *arguments], timeout=DEADLINE)
    assert done.returncode == code, done.stdout
    return str(done.stdout)


@pytest.mark.parametrize("model", either("llama-3.2", MODELS))
def test_model_that_stops_and_goes_on_ends_with_the_same_bits(tmp_path: Path, model: str) -> None:
    layout = ("parallel.pipeline=2", *STEADY)
    train(str(TINY), model, f"output={tmp_path / 'whole'}", until(8), *layout)
    train(str(TINY), model, f"output={tmp_path / 'parts'}", until(4), *layout)
    train(str(tmp_path / "parts"), "--resume", until(8))
    whole, parts = (tensors_of(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []


@pytest.mark.parametrize("model", either("gemma-3", MODELS))
def test_model_that_loses_a_worker_and_a_node_ends_with_the_same_bits(tmp_path: Path, model: str) -> None:
    kills = ("--kill", "worker:1@5", "--kill", "node:1@12")
    assert_survived(drill(tmp_path / "drill", "ci/tiny", model, *TWO_NODES, *kills), ["local", "decoded"])
    assert carriers() == []


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    with runs(tmp_path) as begin:
        yield begin


@pytest.mark.long
@pytest.mark.parametrize("model", either("", MODELS))
def test_model_that_loses_one_of_two_replicas_goes_on_with_the_other(
    tmp_path: Path, start: Callable[..., Run], model: str
) -> None:
    options = (model, *TWO, until(60))
    done = warm.run(command(tmp_path / "whole", *options, "--nodes", "2"), timeout=DEADLINE)
    assert done.returncode == 0, done.stdout
    run = start(*options, "--nodes", "2")
    run.after(15)
    run.lose_node(0)
    smaller = run.recovered(1)
    assert (smaller["level"], smaller["source"]) == ("resized", "memory")
    run.done()
    assert [event["ranks"] for event in run.events("training_started")] == [2, 1]
    assert_close(run.folder, tmp_path / "whole")
    assert_nothing_left(run)


LEGS = (("torch", 1, 1, 2), ("megatron", 2, 2, 1), ("torch", 2, 1, 1))
"""Engine, and ranks on the tensor, pipeline and data axis."""


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_llama_3_2_goes_from_engine_to_engine(tmp_path: Path) -> None:
    alone, relay = tmp_path / "alone", tmp_path / "relay"
    train(str(TINY), LLAMA, f"output={alone}", until(5 * len(LEGS)), *STEADY)
    for number, (engine, tensor, pipeline, data) in enumerate(LEGS):
        began = (str(relay), "--resume") if number else (str(TINY), LLAMA, f"output={relay}", *STEADY)
        layout = f"parallel={{engine: {engine}, tensor: {tensor}, pipeline: {pipeline}, data: {data}}}"
        train(*began, layout, until(5 * (number + 1)))
    expected, found = ({line["step"]: line for line in steps_of(one) if "loss" in line} for one in (alone, relay))
    assert list(found) == list(expected) == list(range(1, 5 * len(LEGS) + 1))
    for step, line in expected.items():
        assert found[step]["loss"] == pytest.approx(line["loss"], rel=1e-6), step
        assert found[step]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5), step


def test_gemma_3_is_refused_by_megatron_core_before_anything_starts(tmp_path: Path) -> None:
    said = train(str(TINY), GEMMA, f"output={tmp_path / 'run'}", "parallel.engine=megatron", code=2)
    assert "parallel.engine" in said
    assert not (tmp_path / "run").exists()
