"""The mesh of one run: process groups and the DeviceMesh over them, made from a `Layout` and owned by an engine."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from parallel.errors import LayoutError
from parallel.layout import AXES, Axis, Layout


class Mesh:
    """Process groups of one rank, one per axis, plus the pair of pipeline ends that holds tied embeddings.

    Created collectively: every rank of the world makes the same groups in the same order. A world of one rank needs
    no process group at all; every group is then None and `device_mesh` must not be asked for.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        timeout: timedelta,
        *,
        shard_size: int | None = None,
        alone: bool = False,
    ) -> None:
        """Make the groups.

        Args:
            shard_size: splits the data axis into (replicate, shard), as hybrid sharding needs it.
            alone: a world of one rank needs a DeviceMesh too; a process group is made for it where there is none.

        Raises:
            LayoutError: the layout does not have as many ranks as are running.
        """
        self._own_world = alone and not dist.is_initialized()
        if self._own_world:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        self.layout = layout
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world != layout.world_size:
            raise LayoutError(
                f"the layout {' x '.join(f'{axis} {size}' for axis, size in zip(AXES, layout.shape, strict=True))} "
                f"has {layout.world_size} ranks, but {world} are running"
            )
        self.at = layout.coordinates(self.rank)
        self.shard_size = shard_size or layout.data
        self._timeout = timeout
        self._device = device
        self._owned: list[dist.ProcessGroup] = []
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._root: DeviceMesh | None = None
        if world > 1 or alone:
            self._make_groups()

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        """The group along `axis` that this rank is in; None in a world of one."""
        return self._groups.get(axis)

    @property
    def world(self) -> dist.ProcessGroup | None:
        """All ranks; None in a world of one."""
        return self._groups.get("world")

    @property
    def ends(self) -> dist.ProcessGroup | None:
        """First and last pipeline stage of this rank's data and tensor coordinates; of use on those two only."""
        return self._groups.get("ends")

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """The part of the DeviceMesh along the named axes; `data` is `replicate` and `shard` under hybrid sharding."""
        if self._root is None:
            raise LayoutError("a DeviceMesh needs an initialised process group")
        names: list[str] = []
        for axis in axes:
            names += ["replicate", "shard"] if axis == "data" and self._hybrid else [axis]
        return self._root[tuple(names)]

    def close(self) -> None:
        """Destroy the groups made here; the caller's default group stays."""
        # DTensor remembers how it sharded by meshes that compare equal whatever their groups; another engine in this
        # process would be given the groups that end here.
        _clear_sharding_prop_cache()
        self._root = None
        self._groups.clear()
        while self._owned:
            dist.destroy_process_group(self._owned.pop())
        if self._own_world:
            dist.destroy_process_group()
            self._own_world = False

    @property
    def _hybrid(self) -> bool:
        return 1 < self.shard_size < self.layout.data

    def _make_groups(self) -> None:
        ranks = torch.arange(self.layout.world_size).view(self.layout.shape)
        if self._hybrid:
            ranks = ranks.view(self.layout.data // self.shard_size, self.shard_size, *self.layout.shape[1:])
            names: tuple[str, ...] = ("replicate", "shard", "pipeline", "tensor")
        else:
            names = AXES
        for dim, name in enumerate(names):
            self._groups[name] = self._new(self._line(ranks, dim))
        if self._hybrid:
            self._groups["data"] = self._new(
                self._line(torch.arange(self.layout.world_size).view(self.layout.shape), 0)
            )
        self._groups["ends"] = self._new(self._end_ranks())
        self._groups["world"] = self._new(list(range(self.layout.world_size)))
        self._root = DeviceMesh.from_group(
            [self._groups[name] for name in names], self._device.type, mesh=ranks, mesh_dim_names=names
        )

    def _line(self, ranks: torch.Tensor, dim: int) -> list[int]:
        lines = ranks.movedim(dim, -1).reshape(-1, ranks.shape[dim])
        mine = (lines == self.rank).any(dim=1)
        line: list[int] = lines[mine][0].tolist()
        return line

    def _end_ranks(self) -> list[int]:
        last = self.layout.pipeline - 1
        if self.at.pipeline not in (0, last):
            return [self.rank]
        return sorted({self.layout.rank_at(self.at._replace(pipeline=stage)) for stage in (0, last)})

    def _new(self, ranks: list[int]) -> dist.ProcessGroup:
        group: dist.ProcessGroup = dist.new_group(ranks, timeout=self._timeout, use_local_synchronization=True)
        self._owned.append(group)
        return group
