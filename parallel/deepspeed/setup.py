"""Set up DeepSpeed: configuration, process groups, and environment variables that turn off its autodetection."""

import contextlib
import io
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from keepwarm.parallel.deepspeed.info import DeepSpeedOptions
from keepwarm.parallel.mesh.mesh import Mesh

BUCKET = 500_000_000
"""Maximum number of gradient elements in one reduction; DeepSpeed's default."""

WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # DeepSpeed imports an unused optimizer decorated with torch.compile, which loads all of inductor.
    ("`torch.jit.script(_method)?` is deprecated", DeprecationWarning),
    # Renamed in torch after this version of DeepSpeed.
    ("`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated", FutureWarning),
)
"""Torch warnings caused by DeepSpeed, as regular expressions. Users cannot act on them: silenced for the process."""


def configuration(options: DeepSpeedOptions, parameters: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return DeepSpeed's own configuration.

    Clipping stays off: the engine clips by its own norm, which counts replicated and tied parameters once. DeepSpeed
    still computes its own norm, by which all ranks together discard a non-finite gradient.

    Args:
        parameters: of this rank, before ZeRO shards them. No bucket is larger than their total size. ZeRO 3 keeps
            norms and biases whole and shards matrices.
    """
    bucket = min(BUCKET, sum(one.numel() for one in parameters))
    zero: dict[str, Any] = {
        "stage": options.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": 2 * bucket,
        "overlap_comm": False,
    }
    if options.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
        zero["stage3_param_persistence_threshold"] = max(
            (one.numel() for one in parameters if one.ndim == 1), default=0
        )
    if options.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "communication_data_type": "fp32",
    }


class Groups:
    """The process groups of a mesh under the names that DeepSpeed expects (Megatron's `mpu`), without a pipeline."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._mesh.group("data")

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.layout.data

    def get_data_parallel_rank(self) -> int:
        return self._mesh.at.data

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._mesh.group("tensor")

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.layout.tensor

    def get_model_parallel_rank(self) -> int:
        return self._mesh.at.tensor


@contextlib.contextmanager
def prepared(mesh: Mesh, device: torch.device) -> Iterator[None]:
    """Import DeepSpeed, silence it, and prevent it from compiling operators; drop its output while an engine is built.

    On a CPU, DeepSpeed's collectives compile a shared-memory operator, which takes minutes, unless the table of
    buildable operators excludes it. DeepSpeed reads that table once, when it creates its first engine.
    """
    # If unset, DeepSpeed probes for an accelerator and logs at length that there is none.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # Every launcher sets this; for a rank started by hand it follows from the layout.
    os.environ.setdefault("LOCAL_RANK", str(mesh.rank % mesh.layout.ranks_per_node))
    for message, category in WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    import deepspeed

    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        if not deepspeed.comm.is_initialized():
            # Adopts torch's process group; by default DeepSpeed would look for a launcher or MPI.
            deepspeed.comm.init_distributed(auto_mpi_discovery=False)
        yield


def initialized(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any], groups: Groups | None
) -> Any:
    """Return DeepSpeed's engine over a module; call it within `prepared`. A `PipelineModule` brings its own groups."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=dict(config), mpu=groups, dist_init_required=False
    )
    return engine
