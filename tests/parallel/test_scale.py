"""A layout of thousands of ranks, validated on one machine: torch's fake process group and the meta device."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from keepwarm.parallel.engine import EngineConfig
from keepwarm.parallel.mesh.axes import Coordinates
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.mesh.mesh import Mesh
from keepwarm.parallel.native.data import shard_size_of
from keepwarm.parallel.native.stage import Stage
from keepwarm.trainer.job.estimate import estimate_rank
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.model.make import make_model
from tests.support.ranks import ROOT

PIPELINE = 35
DATA = 8


@pytest.fixture(params=[0, 1, 2239], ids=lambda rank: f"rank {rank}")
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """This process stands for one rank of a world that does not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=8 * PIPELINE * DATA)
    yield request.param
    dist.destroy_process_group()


def job_of(data_mode: str) -> JobSpec:
    job = load_job(ROOT / "configs/jobs/mt-nlg-530b.yaml")
    return job.model_copy(update={"parallel": job.parallel.model_copy(update={"data_mode": data_mode})})


@pytest.mark.parametrize("data_mode", ["fsdp", "ddp"])
def test_scale_megatron_turing_stage_holds_planned_shards(rank: int, data_mode: str) -> None:
    job = job_of(data_mode)
    layout = Layout.of(job.parallel, ranks_per_node=8)
    config = EngineConfig(
        model=make_model(job.model, job.seed),
        parallel=job.parallel,
        optimizer=job.optimizer,
        numerics=job.numerics,
        layout=layout,
        device=torch.device("meta"),
        timeout=timedelta(seconds=10),
    )
    mesh = Mesh(layout, torch.device("cpu"), config.timeout, shard_size=shard_size_of(job.parallel))
    at = layout.coordinates(rank)
    stage = Stage.build(at.pipeline, config, mesh)
    # The first data-parallel rank holds the most; sizes here divide, so that all hold the same.
    assert sum(held.local.numel() for held in stage.parameters) == estimate_rank(job, at.pipeline).parameters
    assert {int(name.split(".")[1]) for name, _ in stage.module.named_parameters() if name.startswith("layers")} == set(
        range(3 * at.pipeline, 3 * at.pipeline + 3)
    )
    for held in stage.parameters:
        assert isinstance(held.parameter, DTensor)
        assert rank in held.replicas
        assert tuple(held.parameter.shape) == held.global_shape
    tied = [held for held in stage.parameters if held.name == "embedding.weight"]
    assert len(tied) == (at.pipeline in (0, PIPELINE - 1))
    for held in tied:
        data = range(DATA) if data_mode == "ddp" else [at.data]
        ends = [layout.rank_at(Coordinates(d, p, at.tensor)) for d in data for p in (0, PIPELINE - 1)]
        assert held.replicas == tuple(sorted(ends))
    mesh.close()
