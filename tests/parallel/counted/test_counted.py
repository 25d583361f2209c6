"""Memory and collectives of a rank's step, counted with fake tensors, against the plan.

Recomputation is full: without it, the CPU keeps more of a norm than the fused kernel that the plan counts.
"""

from pathlib import Path
from typing import Any

import pytest

from keepwarm.launch.plan.plan import Plan
from keepwarm.launch.plan.text import print_plan
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.estimate import decided_parallel, estimate_rank
from keepwarm.trainer.job.files import load_job, load_model, shipped_configs
from keepwarm.trainer.job.spec import JobSpec
from tests.support.fake.world import count_step
from tests.support.ranks import ROOT
from tests.trainer.job.test_estimate import job

GIB = 2**30
SHARDED: dict[str, Any] = {"accumulate": "sharded", "reshard_after_forward": True}


def llama(size: str, micro_batches: int, layers: int | None = None, sequence: int = 8192, **parallel: Any) -> JobSpec:
    """Llama 3 in bf16, whole or with few layers."""
    model = load_model(shipped_configs() / "models" / f"llama-3-{size}.yaml")
    if layers is not None:
        model = model.model_copy(update={"layers": layers})
    numerics = {"precision": "bf16", "recompute": "full"}
    ranks = parallel["data"]
    return job(model, sequence=sequence, batch=ranks * micro_batches, parallel=parallel, numerics=numerics)


@pytest.mark.parametrize(
    ("micro_batches", "parallel", "gathers", "reductions"),
    [
        (1, {"reshard_after_forward": True}, 2 * 2 + 1, 2 + 1),
        (2, SHARDED, 2 * (2 * 2 + 1), 2 * (2 + 1)),
        (2, {"accumulate": "sharded", "reshard_after_forward": False}, 2 + 1, 2 * (2 + 1)),
        (2, {"accumulate": "whole", "reshard_after_forward": False}, 2 + 1, 2 + 1),
        (2, {"accumulate": "whole", "reshard_after_forward": True}, 2 * (2 * 2 + 1), 2 + 1),
    ],
    ids=str,
)
def test_counted_step_of_fsdp_is_as_planned(
    micro_batches: int, parallel: dict[str, Any], gathers: int, reductions: int
) -> None:
    """Two layers, and what is around them: weights are gathered twice in each micro-batch, or once in a step."""
    of_job = llama("8b", micro_batches, layers=2, sequence=2048, data=8, **parallel)
    count = count_step(of_job)
    assert count.collectives["allgather_base"] <= gathers
    assert count.collectives["reduce_scatter_base"] == reductions
    assert count.collectives["allreduce"] == 2  # the count of targets; losses, norm and their count
    assert estimate_rank(of_job, 0).total == pytest.approx(count.peak, rel=0.06)


SIZES = pytest.mark.parametrize(
    ("size", "ranks", "layers", "most"), [("8b", 8, 32, 25 * GIB), ("70b", 64, 80, 45 * GIB)], ids=["8b", "70b"]
)


@SIZES
def test_planned_accumulation_over_shards_fits(size: str, ranks: int, layers: int, most: int) -> None:
    assert estimate_rank(llama(size, 2, data=ranks, **SHARDED), 0).total <= most


@pytest.mark.long
@SIZES
def test_counted_accumulation_over_shards_fits(size: str, ranks: int, layers: int, most: int) -> None:
    """Counted with four and with eight layers: each further one adds the same."""
    four, eight = (count_step(llama(size, 2, layers=few, data=ranks, **SHARDED)).peak for few in (4, 8))
    counted = four + (eight - four) * (layers - 4) // 4
    planned = estimate_rank(llama(size, 2, data=ranks, **SHARDED), 0).total
    assert planned == pytest.approx(counted, rel=0.05)
    assert counted <= most


@pytest.mark.parametrize(
    ("size", "parallel", "gpu_memory", "accumulate", "reshard"),
    [
        ("8b", {"data": 8}, 80.0, "whole", False),
        ("8b", {"data": 8}, 60.0, "sharded", False),
        ("8b", {"data": 8}, 40.0, "sharded", True),
        ("8b", {"data": 8}, 10.0, "sharded", True),  # does not fit at all: what needs the least
        ("8b", {"data": 8, "accumulate": "whole"}, 40.0, "whole", True),
        ("8b", {"data": 8, "data_mode": "ddp"}, 40.0, "whole", True),
        ("8b", {"data": 8, "pipeline": 4}, 80.0, "whole", False),
        ("70b", {"data": 64}, 80.0, "sharded", True),
    ],
    ids=str,
)
def test_decided_parallel_is_the_fastest_that_fits(
    size: str, parallel: dict[str, Any], gpu_memory: float, accumulate: str, reshard: bool
) -> None:
    of_job = llama(size, 4, **parallel)
    cluster = of_job.cluster.model_copy(update={"gpu_memory": gpu_memory})
    found = decided_parallel(of_job.model_copy(update={"cluster": cluster}))
    assert (found.accumulate, found.reshard_after_forward) == (accumulate, reshard)


def test_decided_parallel_of_one_micro_batch_frees_weights() -> None:
    found = decided_parallel(llama("8b", 1, data=8))
    assert (found.accumulate, found.reshard_after_forward) == ("whole", True)


def test_plan_says_what_it_decided_and_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(Plan(llama("70b", 4, data=64)))
    shown = capsys.readouterr().out
    assert "gradients are reduced after each micro-batch (parallel.accumulate: sharded)" in shown
    assert "does not fit" not in shown
    print_plan(Plan(llama("70b", 4, data=8)))
    assert "this does not fit in a GPU of 80 GiB (cluster.gpu_memory)" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "configs/jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_job_fits_its_gpus(path: Path) -> None:
    assert Plan(load_job(path)).fits


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["parallel.data_mode=ddp", "parallel.data=2"], "with data_mode ddp every rank has all gradients"),
        (["parallel.pipeline=2"], "a pipeline reduces gradients once per step"),
        (["parallel.engine=megatron"], "its gradients are reduced once per step"),
        (["parallel.engine=deepspeed"], "parallel.options.zero_stage decides"),
    ],
)
def test_sharded_accumulation_where_there_is_none_is_refused(overrides: list[str], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        load_job(Path("ci/tiny"), ["parallel.accumulate=sharded", *overrides])
