"""The mesh of one run: process groups and their DeviceMesh, created from a `Layout` and owned by an engine."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from keepwarm.parallel.errors import LayoutError
from keepwarm.parallel.mesh.axes import AXES, Axis
from keepwarm.parallel.mesh.layout import Layout


class Mesh:
    """Process groups of one rank, one per axis, plus the pair of pipeline ends that holds tied embeddings.

    Creation is collective: every rank of the world creates the same groups in the same order. A world of one rank needs
    no process groups; every group is then None and `device_mesh` must not be called.

    Connections of a rank grow with the size of the world once: the group of all ranks is the caller's, also for an axis
    that holds them all. Only the pipeline has a group of its own then, as messages are counted apart from collectives.
    Axes of one rank share one group, which the rank creates alone.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        timeout: timedelta,
        *,
        shard_size: int | None = None,
        alone: bool = False,
        copies: int = 1,
    ) -> None:
        """Create the groups.

        Args:
            shard_size: splits the data axis into (replicate, shard), as hybrid sharding needs it.
            alone: create a DeviceMesh for a world of one rank too, and a process group for it if there is none.
            copies: neighbours on the tensor axis that hold copies of key-value heads.

        Raises:
            LayoutError: the size of the layout is not that of the running world.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world != layout.world_size:
            raise LayoutError(
                f"the layout {' x '.join(f'{axis} {size}' for axis, size in zip(AXES, layout.shape, strict=True))} "
                f"has {layout.world_size} ranks, but {world} are running"
            )
        self._own_world = alone and not dist.is_initialized()
        if self._own_world:
            backend, bound = dist.get_default_backend_for_device(device), device if device.type == "cuda" else None
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout, device_id=bound)
        self.layout = layout
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.at = layout.coordinates(self.rank)
        self.shard_size = shard_size or layout.data
        self._copies = copies
        self._timeout = timeout
        self._device = device
        self._owned: list[dist.ProcessGroup] = []
        self._groups: dict[str, dist.ProcessGroup | None] = {}
        self._root: DeviceMesh | None = None
        if world > 1 or alone:
            self._make_groups()

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        """Return this rank's group along `axis`; None in a world of one."""
        return self._groups.get(axis)

    @property
    def world(self) -> dist.ProcessGroup | None:
        """All ranks; None in a world of one."""
        return self._groups.get("world")

    @property
    def alone(self) -> dist.ProcessGroup | None:
        """This rank alone; None in a world of one without process groups."""
        return self._groups.get("alone")

    @property
    def ends(self) -> dist.ProcessGroup | None:
        """First and last pipeline stage of this rank's data and tensor coordinates; None on others."""
        return self._groups.get("ends")

    @property
    def copies(self) -> dist.ProcessGroup | None:
        """Neighbours on the tensor axis that hold copies of key-value heads; None if there are none."""
        return self._groups.get("copies")

    def plane(self) -> dist.ProcessGroup | None:
        """Create and return the group of all ranks of this pipeline coordinate; None in a world of one. Collective."""
        if not self._groups:
            return None
        if 1 in (self.layout.data, self.layout.tensor):
            return self._groups["tensor" if self.layout.data == 1 else "data"]
        ranks = torch.arange(self.layout.world_size).view(self.layout.shape)
        return self._new("plane", ranks.movedim(1, 0).reshape(self.layout.pipeline, -1).tolist())

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """Return the DeviceMesh along the named axes; under hybrid sharding `data` is `replicate` and `shard`."""
        if self._root is None:
            raise LayoutError("a DeviceMesh needs an initialised process group")
        names: list[str] = []
        for axis in axes:
            names += ["replicate", "shard"] if axis == "data" and self._hybrid else [axis]
        return self._root[tuple(names)]

    def close(self) -> None:
        """Destroy the groups created here; the caller's default group stays."""
        # DTensor caches sharding decisions by meshes that compare equal whatever their groups; another engine in this
        # process would be given the groups destroyed here.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
        self._root = None
        self._groups.clear()
        if not dist.is_initialized():  # all groups were aborted, after a failure
            self._owned.clear()
            return
        while self._owned:
            dist.destroy_process_group(self._owned.pop())
        if self._own_world:
            dist.destroy_process_group()
            self._own_world = False

    @property
    def _backend(self) -> str | None:
        """Tensors of an engine are on its device: with NCCL its groups need no connections of gloo."""
        return None if self._device.type == "cpu" else dist.get_default_backend_for_device(self._device)

    @property
    def _hybrid(self) -> bool:
        return 1 < self.shard_size < self.layout.data

    def _make_groups(self) -> None:
        self._groups["world"] = dist.group.WORLD
        self._groups["alone"] = self._new_alone()
        whole = torch.arange(self.layout.world_size).view(self.layout.shape)
        ranks, names = whole, tuple[str, ...](AXES)
        if self._hybrid:
            ranks = whole.view(-1, self.shard_size, *self.layout.shape[1:])
            names = ("replicate", "shard", "pipeline", "tensor")
            self._groups["data"] = self._new("data", _lines(whole, 0))
        for dim, name in enumerate(names):
            self._groups[name] = self._new(name, _lines(ranks, dim))
        if self.layout.pipeline > 1:
            self._groups["ends"] = self._new("ends", _lines(whole[:, [0, -1]], 1))
        if self._copies == self.layout.tensor > 1:
            self._groups["copies"] = self._groups["tensor"]
        elif self._copies > 1:
            self._groups["copies"] = self._new("copies", whole.view(-1, self._copies).tolist())
        self._root = DeviceMesh.from_group(
            [group for name in names if (group := self._groups[name]) is not None],
            self._device.type,
            mesh=ranks,
            mesh_dim_names=names,
        )

    def _new(self, name: str, lines: list[list[int]]) -> dist.ProcessGroup | None:
        """Return the group of the line that contains this rank; create one per line, as torch's own meshes do.

        Every rank takes part in creating every group, so that group names are counted globally and never reused. Groups
        created by their members alone reuse names, and with them leftovers of a closed engine in the store.
        """
        if len(lines[0]) == 1:
            return self.alone
        if len(lines[0]) == self.layout.world_size and name != "pipeline":
            return self.world
        mine: dist.ProcessGroup | None = None
        for line in lines:
            group = dist.new_group(line, timeout=self._timeout, backend=self._backend, group_desc=name)
            if self.rank in line:
                mine = group
                self._owned.append(group)
        return mine

    def _new_alone(self) -> dist.ProcessGroup | None:
        if self.layout.world_size == 1:
            return self.world
        # No other rank takes part: names that are used again find nothing of others in the store.
        group: dist.ProcessGroup = dist.new_group(
            [self.rank],
            timeout=self._timeout,
            backend=self._backend,
            use_local_synchronization=True,
            group_desc="alone",
        )
        self._owned.append(group)
        return group


def _lines(ranks: torch.Tensor, dim: int) -> list[list[int]]:
    """Return the lines of ranks along `dim`, one for each position in the other dims."""
    lines: list[list[int]] = ranks.movedim(dim, -1).reshape(-1, ranks.shape[dim]).tolist()
    return lines
