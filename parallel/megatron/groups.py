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
    """A mesh, its groups in Megatron Core's collection, and a single-rank group for axes that keepwarm lacks."""

    def __init__(self, layout: Layout, device: torch.device, timeout: timedelta) -> None:
        """Create the groups; collective. Raise LayoutError if the layout and the world differ in size."""
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
        """Prepare the process for calls into Megatron Core, all of which must run inside this context.

        It suppresses known warnings, redirects CUDA to the CPU where there is none, and installs this engine's global
        memory buffer: sequence parallelism gathers into that buffer and looks it up only in `parallel_state`.
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
    """Return the group that contains only `rank`; every rank takes part in creating every group, as in `Mesh`."""
    mine: dist.ProcessGroup | None = None
    for one in range(world_size):
        group = dist.new_group([one], timeout=timeout)
        if one == rank:
            mine = group
    if mine is None:
        raise AssertionError(f"rank {rank} is not in a world of {world_size}")
    return mine
