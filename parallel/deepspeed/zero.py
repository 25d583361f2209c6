"""The partition that ZeRO gives a rank, in terms of parameters: what of each it holds, and that part's gradient.

ZeRO (Rajbhandari et al., 2020) keeps fp32 weights and moments in flat buffers. Stages 1 and 2 lay the parameters of a
group one after the other and cut the whole into equal parts, one for each data-parallel rank; stage 3 cuts every
parameter by itself. Everything here is read from attributes of DeepSpeed's optimizers: they have no interface for it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from keepwarm.parallel.optimizer.clip import Gradient
from keepwarm.parallel.parameter import TensorSlice
from keepwarm.parallel.shard import Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpartitionedParameter:
    """One parameter of this rank before ZeRO cuts it."""

    name: str
    """Canonical name."""
    parameter: nn.Parameter
    global_shape: tuple[int, ...]
    box: TensorSlice
    """What the tensor axis leaves of it."""
    replicas: tuple[int, ...]
    """Ranks of the same data coordinate that hold the same box, ascending."""
    tied: bool
    """Whether the other end of the pipeline has it too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """The elements `start` to `stop` of a parameter's box; they lie at `at` in flat buffer number `buffer`."""

    placed: UnpartitionedParameter
    buffer: int
    index: int
    """Among the parameters of the buffer."""
    at: int
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return self.stop - self.start

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """These elements of a tensor that has the shape of the buffer."""
        return flat.detach().narrow(0, self.at, self.elements)

    def shard(self, prefix: str, flat: torch.Tensor) -> Shard:
        """The same as a shard: a plain box where nothing was cut off."""
        placed, local = self.placed, self.of(flat)
        whole = self.elements == math.prod(placed.box.shape)
        return Shard(
            name=f"{prefix}.{placed.name}",
            global_shape=placed.global_shape,
            offsets=placed.box.offsets,
            shape=placed.box.shape,
            local=local.view(placed.box.shape) if whole else local,
            replicas=placed.replicas,
            flat=None if whole else (self.start, self.stop),
        )


class Partition:
    """What ZeRO 1 or 2 leaves on this rank. The buffers live as long as the optimizer."""

    def __init__(self, zero: Any, placed: Iterable[UnpartitionedParameter]) -> None:
        """`zero` is DeepSpeed's optimizer over exactly the `placed` parameters."""
        self._zero = zero
        self.buffers: Sequence[torch.Tensor] = self._buffers()
        """fp32 weights, one flat tensor for each group of the optimizer; what is stepped."""
        self.fragments = list(self._fragments({one.parameter: one for one in placed}))
        """Every element of this rank once, in the order of the buffers."""

    def gradients(self) -> list[Gradient]:
        """The gradient of every fragment after the last backward of a step."""
        return [Gradient(self._gradient(one), one.placed.replicas) for one in self.fragments]

    def _gradient(self, fragment: Fragment) -> torch.Tensor:
        if self._offloads():
            whole = self.buffers[fragment.buffer].grad
            assert whole is not None
            return fragment.of(whole)
        gradient: torch.Tensor = self._zero.averaged_gradients[fragment.buffer][fragment.index]
        return gradient if gradient.numel() == fragment.elements else gradient[: fragment.elements]

    def discard(self) -> None:
        """Let the coming step of DeepSpeed discard the gradient: that is what it does when its norm is not finite."""
        if self._offloads():
            norms: dict[int, torch.Tensor] = self._zero.norm_for_param_grads
            norms.update(dict.fromkeys(norms, torch.tensor(math.nan)))
        for gradient in self.gradients():
            gradient.tensor.fill_(math.nan)

    def refresh(self) -> None:
        """Give the model the weights that are in the buffers. Collective over the data axis."""
        self._zero.update_lp_params()

    def _buffers(self) -> Sequence[torch.Tensor]:
        buffers: Sequence[torch.Tensor] = self._zero.single_partition_of_fp32_groups
        return buffers

    def _offloads(self) -> bool:
        return bool(self._zero.cpu_offload)

    def _fragments(self, placed: Mapping[nn.Parameter, UnpartitionedParameter]) -> Iterator[Fragment]:
        for buffer, parameters in enumerate(self._zero.params_in_partition):
            for index, parameter in enumerate(parameters):
                cut, flat = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
                yield Fragment(
                    placed=placed[parameter],
                    buffer=buffer,
                    index=index,
                    at=flat.start,
                    start=cut.start,
                    stop=cut.start + cut.numel,
                )


class PartitionByParameter(Partition):
    """What ZeRO 3 leaves on this rank: a part of each parameter, the last one padded."""

    def refresh(self) -> None:
        """See `Partition.refresh`."""
        for flat, buffer in zip(self._zero.fp16_partitioned_groups_flat, self.buffers, strict=True):
            flat.data.copy_(buffer.data)
        # Small parameters stay whole on every rank between steps.
        kept = self._zero.persistent_parameters
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def _buffers(self) -> Sequence[torch.Tensor]:
        buffers: Sequence[torch.Tensor] = self._zero.fp32_partitioned_groups_flat
        return buffers

    def _offloads(self) -> bool:
        return bool(self._zero.offload_optimizer)

    def _fragments(self, placed: Mapping[nn.Parameter, UnpartitionedParameter]) -> Iterator[Fragment]:
        for buffer, parameters in enumerate(self._zero.fp16_groups):
            at = 0
            for index, parameter in enumerate(parameters):
                size, one = parameter.partition_numel(), placed[parameter]
                elements = math.prod(one.box.shape)
                start = min(dist.get_rank(parameter.ds_process_group) * size, elements)
                stop = min(start + size, elements)
                yield Fragment(placed=one, buffer=buffer, index=index, at=at, start=start, stop=stop)
                at += size


def groups_of(placed: Sequence[UnpartitionedParameter], decay: Mapping[str, float]) -> list[dict[str, Any]]:
    """Groups of parameters for the optimizer: by weight decay, and what is tied across stages by itself.

    Where the cuts of a group fall depends on all that is in it; tied embeddings are replicas of each other only if they
    are cut alike on both stages.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for one in placed:
        groups.setdefault((one.tied, decay[one.name]), []).append(one.parameter)
    return [{"params": parameters, "weight_decay": rate} for (_, rate), parameters in groups.items()]
