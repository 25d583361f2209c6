"""Data parallelism: FSDP2, hybrid sharding and replication, with gradients summed instead of averaged."""

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from keepwarm.parallel.errors import LayoutError
from keepwarm.parallel.native.memory import shard_size
from keepwarm.parallel.parameter import layers_of, materialise, wrapped
from keepwarm.parallel.spec import NumericsSpec, ParallelSpec


def shard_size_of(spec: ParallelSpec) -> int:
    """Return the number of data-axis ranks over which one copy of the parameters is sharded.

    Raises:
        LayoutError: `shard_size` does not fit the mode or the number of data-parallel ranks.
    """
    if spec.data_mode != "hsdp":
        if spec.shard_size is not None:
            raise LayoutError(f"parallel.shard_size belongs to data_mode hsdp, not to {spec.data_mode}")
    elif spec.shard_size is None or spec.data % spec.shard_size:
        raise LayoutError(
            f"parallel.data_mode = hsdp needs parallel.shard_size, a divisor of parallel.data = {spec.data}, "
            f"got {spec.shard_size}"
        )
    return shard_size(spec)


def is_wrapped(spec: ParallelSpec, numerics: NumericsSpec) -> bool:
    """Return whether stages run under FSDP, to reduce over the data axis or to compute in bf16 from fp32 weights."""
    return spec.data > 1 or numerics.precision == "bf16"


def wrap(part: nn.Module, mesh: DeviceMesh, spec: ParallelSpec, numerics: NumericsSpec, device: torch.device) -> None:
    """Put one pipeline stage and each of its layers under FSDP; `mesh` has the data axis (two dims for hsdp).

    Parameters on the meta device are allocated on `device` layer by layer, so at most one layer is ever whole. The
    gradient is the sum over the ranks: each rank's loss is already divided by the global count of targets.
    """
    policy = MixedPrecisionPolicy()
    if numerics.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = list(layers_of(part))
    for module in [*layers, part]:
        materialise(module, device)
        if spec.data > 1 and shard_size_of(spec) == 1:
            replicate(module, mesh=mesh, mp_policy=policy)
        else:
            # Parameters outside the layers are needed again as soon as backward begins.
            reshard = reshards(spec) and module is not part
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    for managed in wrapped(part):
        managed.set_gradient_divide_factor(1.0)
        managed.set_force_sum_reduction_for_comms(True)


def reshards(spec: ParallelSpec) -> bool:
    """Return whether the weights of a layer are freed after its forward and backward.

    Zero-bubble schedules walk the module to find the weights whose gradient they have deferred: these must be whole.
    """
    return spec.reshard_after_forward is not False and spec.schedule != "zero_bubble"


def prepare_backward(part: nn.Module, spec: ParallelSpec, *, last: bool) -> None:
    """Prepare the backward of one micro-batch: whether gradients are reduced, and gathered weights freed, after it."""
    if not isinstance(part, FSDPModule):
        return
    sharded = spec.accumulate == "sharded"
    part.set_is_last_backward(last or sharded)
    part.set_requires_gradient_sync(last or sharded)
    part.set_reshard_after_backward(last or reshards(spec))
    if spec.data_mode == "hsdp":
        part.set_requires_all_reduce(last)  # copies of a shard agree once per step


def reshard(part: nn.Module) -> None:
    """Free gathered weights; the next forward gathers them from the shards."""
    for module in wrapped(part):
        module.reshard()
