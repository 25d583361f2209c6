"""What DeepSpeed must be told before it may run: its configuration, its groups, and what it may not do by itself."""

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
"""Elements of a gradient that are reduced at once, at most; DeepSpeed's own default."""

WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # An optimizer that nobody asked for is imported, decorated with torch.compile: that loads all of inductor.
    ("`torch.jit.script(_method)?` is deprecated", DeprecationWarning),
    # Renamed in torch after this DeepSpeed.
    ("`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated", FutureWarning),
)
"""What DeepSpeed makes torch warn of, by regular expression; not the user's affair, and silent for good."""


def configuration(options: DeepSpeedOptions, parameters: Sequence[torch.Tensor]) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    Clipping stays off: the engine clips by its own norm, which counts replicated and tied parameters once. DeepSpeed
    still computes its norm, by which all ranks together discard a gradient that is not finite.

    Args:
        parameters: of this rank, before ZeRO shards them. No bucket is larger than all of them; under ZeRO 3 norms and
            biases stay whole, matrices do not.
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
    """The process groups of a mesh under the names that DeepSpeed asks for (Megatron's `mpu`), without a pipeline."""

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
    """DeepSpeed imported, quiet, and kept from compiling; what it prints while an engine is built is dropped.

    Its collectives load a shared-memory operator on a CPU, compiling it for minutes, unless the table of operators that
    can be built says no; it looks there once, when its first engine is made.
    """
    # Otherwise it looks for one, and says at length that there is none.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # Set by every launcher; a rank that was started by hand has its place on the node from the layout.
    os.environ.setdefault("LOCAL_RANK", str(mesh.rank % mesh.layout.ranks_per_node))
    for message, category in WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    import deepspeed

    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        if not deepspeed.comm.is_initialized():
            # Adopts torch's process group; by itself it would look for a launcher, or for MPI.
            deepspeed.comm.init_distributed(auto_mpi_discovery=False)
        yield


def initialized(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any], groups: Groups | None
) -> Any:
    """DeepSpeed's engine over a module; a `PipelineModule` brings its own groups. Within `prepared`."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=dict(config), mpu=groups, dist_init_required=False
    )
    return engine
