"""How many process groups and connections a mesh costs, up to a thousand ranks and with NCCL."""

import stat
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.mesh.mesh import Mesh
from keepwarm.parallel.spec import ParallelSpec
from tests.support.ranks import run_ranks

RANKS = 1024
TIMEOUT = timedelta(seconds=60)
CPU = torch.device("cpu")


class Created:
    """The ranks and the backend of every group that is created."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.groups: list[tuple[list[int], Any]] = []
        create = dist.new_group

        def new_group(ranks: list[int], backend: str | None = None, **options: Any) -> Any:
            self.groups.append((ranks, backend))
            return create(ranks, **options)

        patch.setattr(dist, "new_group", new_group)


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> Iterator[Created]:
    """This process stands for one rank of a thousand."""
    dist.init_process_group("fake", store=FakeStore(), rank=9, world_size=RANKS)
    yield Created(monkeypatch)
    dist.destroy_process_group()


def mesh_of(device: torch.device = CPU, *, data: int = 1, pipeline: int = 1, tensor: int = 1) -> Mesh:
    return Mesh(Layout.of(ParallelSpec(data=data, pipeline=pipeline, tensor=tensor)), device, TIMEOUT)


def test_mesh_of_a_thousand_data_ranks_creates_one_group(created: Created) -> None:
    mesh = mesh_of(data=RANKS)
    assert created.groups == [([9], None)]
    assert mesh.group("data") is mesh.world is dist.group.WORLD
    assert mesh.group("tensor") is mesh.group("pipeline") is mesh.alone
    assert mesh.device_mesh("data").size() == RANKS


def test_mesh_of_pipeline_ranks_alone_has_a_group_of_its_two_ends(created: Created) -> None:
    mesh = mesh_of(pipeline=RANKS)
    assert [ranks for ranks, _ in created.groups] == [[9], list(range(RANKS)), [0, RANKS - 1]]
    assert mesh.ends is None
    assert mesh.group("pipeline") is not mesh.world


def test_mesh_closing_leaves_the_group_of_all_ranks_to_its_owner(created: Created) -> None:
    mesh_of(data=RANKS).close()
    assert dist.is_initialized()
    mesh_of(data=RANKS).close()


def test_mesh_on_gpus_has_no_group_of_gloo(created: Created, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepwarm.parallel.mesh.mesh.DeviceMesh.from_group", lambda *_, **__: None)
    mesh_of(torch.device("cuda", 1), data=8, pipeline=16, tensor=8)
    assert {backend for _, backend in created.groups} == {"nccl"}
    sizes = [len(ranks) for ranks, _ in created.groups]
    assert sizes == [1, *[8] * 128, *[16] * 64, *[8] * 128, *[2] * 64]


def test_mesh_of_pipeline_stages_alone_counts_messages_apart(created: Created) -> None:
    mesh = mesh_of(pipeline=RANKS)
    assert mesh.group("pipeline") is not mesh.world
    assert mesh.group("data") is mesh.alone


@pytest.mark.timeout(600)
def test_groups_of_megatron_core_are_those_of_the_mesh(created: Created) -> None:
    from keepwarm.parallel.megatron.groups import Groups

    groups = Groups(Layout.of(ParallelSpec(data=RANKS)), CPU, TIMEOUT)
    assert created.groups == [([9], None)]
    assert groups.collection.dp is dist.group.WORLD
    groups.close()


def sockets() -> int:
    """Return how many sockets this process has open."""
    modes = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            modes.append(path.stat().st_mode)
        except FileNotFoundError:  # the folder itself
            continue
    return sum(map(stat.S_ISSOCK, modes))


def more_sockets(data: int) -> int:
    """Return how many sockets a mesh of data ranks adds."""
    before = sockets()
    mesh = mesh_of(data=data)
    dist.all_reduce(torch.ones(2), group=mesh.world)
    added = sockets() - before
    mesh.close()
    return added


@pytest.mark.dist
def test_mesh_of_data_ranks_adds_the_same_few_sockets_whatever_their_number() -> None:
    two, four = (run_ranks(size, more_sockets, size) for size in (2, 4))
    assert set(two) == set(four)
    assert max(four) <= 3
