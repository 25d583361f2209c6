"""The process groups of a mesh under the names that Megatron Core gives them."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from keepwarm.parallel.megatron.core import GlobalMemoryBuffer, ProcessGroupCollection, parallel_state, quiet
from keepwarm.parallel.megatron.cpu import without_cuda
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.mesh.mesh import Mesh


class Groups:
    """A mesh, its groups as Megatron Core's collection, and a group of this rank alone for the axes that we lack."""

    def __init__(self, layout: Layout, device: torch.device, timeout: timedelta) -> None:
        """Collective. Raises LayoutError when the layout does not have as many ranks as are running."""
        self.mesh = Mesh(layout, device, timeout, alone=True)
        self._buffer = GlobalMemoryBuffer()
        self._alone = _alone(layout.world_size, self.mesh.rank, timeout)
        tensor, pipeline, data = (self.mesh.group(axis) for axis in ("tensor", "pipeline", "data"))
        self.collection = ProcessGroupCollection(
            tp=tensor,
            pp=pipeline,
            dp=data,
            dp_cp=data,
            intra_dp_cp=data,
            cp=self._alone,
            ep=self._alone,
            expt_tp=self._alone,
            expt_dp=self._alone,
            intra_expt_dp=self._alone,
            intra_dist_opt=None,
            inter_dist_opt=None,
            mp=None,
            tp_ep_pp=None,
            embd=self.mesh.ends,
            pos_embd=None,
        )

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Around everything that Megatron Core does: known warnings ignored, its one global buffer ours, CUDA or not.

        Sequence parallelism gathers into the buffer, and finds it in `parallel_state` alone.
        """
        before = parallel_state._GLOBAL_MEMORY_BUFFER
        parallel_state._GLOBAL_MEMORY_BUFFER = self._buffer
        try:
            with quiet(), without_cuda():
                yield
        finally:
            parallel_state._GLOBAL_MEMORY_BUFFER = before

    def close(self) -> None:
        """Destroy the groups."""
        dist.destroy_process_group(self._alone)
        self.mesh.close()


def _alone(world_size: int, rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """The group of `rank`; every rank takes part in making every group, as `Mesh` does."""
    mine: dist.ProcessGroup | None = None
    for one in range(world_size):
        group = dist.new_group([one], timeout=timeout)
        if one == rank:
            mine = group
    if mine is None:
        raise AssertionError(f"rank {rank} is not in a world of {world_size}")
    return mine
