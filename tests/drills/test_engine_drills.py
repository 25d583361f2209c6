"""A worker and then a whole node are lost under each engine, and its run ends with the bits of its undisturbed one."""

import importlib.util
from pathlib import Path

import pytest

from tests.drills.test_drill import assert_survived, carriers
from tests.support.runs.drill_campaign import drill

pytestmark = [pytest.mark.dist, pytest.mark.long, pytest.mark.timeout(3600)]

NODE_OF_ONE = ("parallel.data=2", "cluster.ranks_per_node=1")
NODE_OF_TWO = ("parallel.data=2", "cluster.ranks_per_node=2", "batch.micro_batch_size=2")
STAGES = ("parallel.pipeline=2", *NODE_OF_TWO)
WITHOUT_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: DS_BUILD_OPS=0 pip install 'keepwarm[deepspeed]'",
)


@pytest.mark.parametrize(
    ("engine", "layout"),
    [
        pytest.param("torch", STAGES, id="torch-pipeline"),
        pytest.param("megatron", NODE_OF_ONE, id="megatron-distributed-optimizer"),
        pytest.param("megatron", ("parallel.tensor=2", *NODE_OF_TWO), id="megatron-tensor"),
        pytest.param("megatron", STAGES, id="megatron-pipeline"),
        pytest.param("deepspeed", STAGES, id="deepspeed-zero-1-pipeline", marks=WITHOUT_DEEPSPEED),
        pytest.param(
            "deepspeed", ("parallel.options.zero_stage=3", *NODE_OF_ONE), id="deepspeed-zero-3", marks=WITHOUT_DEEPSPEED
        ),
    ],
)
def test_drill_engine_worker_and_node_restore_from_memory(tmp_path: Path, engine: str, layout: tuple[str, ...]) -> None:
    snapshot = "snapshot={every: 1, bucket: 65536}"
    kills = ("--kill", "worker:1@5", "--kill", "node:1@12")
    found = drill(tmp_path / "drill", "ci/tiny", f"parallel.engine={engine}", *layout, snapshot, *kills)
    assert_survived(found, ["local", "decoded"])
    assert carriers() == []
