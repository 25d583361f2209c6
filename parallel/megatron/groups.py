"""The process groups of a mesh under the names that Megatron Core gives them."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from keepwarm.parallel.megatron.core import GlobalMemoryBuffer, ProcessGroupCollection, parallel_state, quiet
from keepwarm.parallel.megatron.cpu import without_cuda
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.mesh.mesh import Mesh


class Groups:
    """A mesh and its groups in Megatron Core's collection; axes that keepwarm lacks have the group of one rank."""

    def __init__(self, layout: Layout, device: torch.device, timeout: timedelta) -> None:
        """Create the groups; collective. Raise LayoutError if the layout and the world differ in size."""
        self.mesh = Mesh(layout, device, timeout, alone=True)
        self._buffer = GlobalMemoryBuffer()
        self._device = device
        tensor, pipeline, data = (self.mesh.group(axis) for axis in ("tensor", "pipeline", "data"))
        self.collection = ProcessGroupCollection(
            tp=tensor,
            pp=pipeline,
            dp=data,
            dp_cp=data,
            intra_dp_cp=data,
            cp=self.mesh.alone,
            ep=self.mesh.alone,
            expt_tp=self.mesh.alone,
            expt_dp=self.mesh.alone,
            intra_expt_dp=self.mesh.alone,
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
            with quiet(), without_cuda(self._device):
                yield
        finally:
            parallel_state._GLOBAL_MEMORY_BUFFER = before

    def close(self) -> None:
        """Destroy the groups."""
        self.mesh.close()
