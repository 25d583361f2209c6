"""Emulated nodes of a server have GPUs of their own, and are refused where there are too few."""

from pathlib import Path

import pytest

from keepwarm.launch.errors import PreflightError
from keepwarm.launch.local.emulated_nodes import own_gpus
from keepwarm.launch.local.nodes import check_gpus
from keepwarm.launch.run import node_check
from keepwarm.trainer.job.files import load_job

TINY = Path("configs/ci/tiny.yaml")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of eight GPUs."""
    monkeypatch.setattr(node_check, "_of_nvidia", lambda: list(range(8)))


@pytest.mark.usefixtures("server")
def test_own_gpus_of_nodes_do_not_overlap() -> None:
    assert [own_gpus(number, 2, {}) for number in range(4)] == ["0,1", "2,3", "4,5", "6,7"]
    chosen = {"CUDA_VISIBLE_DEVICES": "7, GPU-5a ,2,0"}
    assert [own_gpus(number, 2, chosen) for number in range(2)] == ["7,GPU-5a", "2,0"]


def test_own_gpus_without_gpus_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_check, "_of_nvidia", list)
    assert own_gpus(0, 2, {}) is None
    assert own_gpus(0, 2, {"CUDA_VISIBLE_DEVICES": "0,1"}) is None


@pytest.mark.usefixtures("server")
def test_emulated_nodes_need_as_many_gpus_as_ranks_spares_included() -> None:
    shape = ["parallel.data=6", "batch.global_batch_size=6", "cluster.ranks_per_node=2"]
    job = load_job(TINY, shape)
    check_gpus(job, 4, {})
    with pytest.raises(PreflightError, match=r"5 emulated nodes, spares included, of 2 ranks need 10 GPUs, and 8 are"):
        check_gpus(job, 5, {})
    check_gpus(load_job(TINY, [*shape, "cluster.device=cpu"]), 5, {})
    check_gpus(job, 5, {"CUDA_VISIBLE_DEVICES": ""})  # on CPUs
