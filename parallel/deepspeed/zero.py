"""This rank's ZeRO partition by parameter: which elements of each parameter it holds, and their gradients.

ZeRO (Rajbhandari et al., 2020) keeps fp32 weights and moments in flat buffers. Stages 1 and 2 concatenate the
parameters of a group and cut the result into equal parts, one per data-parallel rank; stage 3 cuts every parameter
separately. DeepSpeed's optimizers have no public interface for this, so everything here reads their attributes.
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
    """One parameter of this rank before ZeRO partitions it."""

    name: str
    """Canonical name."""
    parameter: nn.Parameter
    global_shape: tuple[int, ...]
    box: TensorSlice
    """The part of the parameter that tensor parallelism leaves to this rank."""
    replicas: tuple[int, ...]
    """Ranks with the same data coordinate that hold the same box, ascending."""
    tied: bool
    """Whether the other end of the pipeline also holds it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """Elements `start` to `stop` of a parameter's box, stored at offset `at` in flat buffer number `buffer`."""

    placed: UnpartitionedParameter
    buffer: int
    index: int
    """Index of the parameter among those of the buffer."""
    at: int
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return self.stop - self.start

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return these elements of a tensor that has the shape of the buffer."""
        return flat.detach().narrow(0, self.at, self.elements)

    def shard(self, prefix: str, flat: torch.Tensor) -> Shard:
        """Return these elements as a shard; it is a plain box if nothing was cut off."""
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
    """The part that ZeRO 1 or 2 leaves on this rank. The buffers live as long as the optimizer."""

    def __init__(self, zero: Any, placed: Iterable[UnpartitionedParameter]) -> None:
        """`zero` is DeepSpeed's optimizer over exactly the `placed` parameters."""
        self._zero = zero
        self.buffers: Sequence[torch.Tensor] = self._buffers()
        """fp32 weights that the optimizer updates: one flat tensor per parameter group."""
        self.fragments = list(self._fragments({one.parameter: one for one in placed}))
        """Every element of this rank exactly once, in the order of the buffers."""

    def gradients(self) -> list[Gradient]:
        """Return the gradient of every fragment after the last backward of a step."""
        return [Gradient(self._gradient(one), one.placed.replicas) for one in self.fragments]

    def _gradient(self, fragment: Fragment) -> torch.Tensor:
        if self._offloads():
            whole = self.buffers[fragment.buffer].grad
            assert whole is not None
            return fragment.of(whole)
        gradient: torch.Tensor = self._zero.averaged_gradients[fragment.buffer][fragment.index]
        return gradient if gradient.numel() == fragment.elements else gradient[: fragment.elements]

    def discard(self) -> None:
        """Make DeepSpeed discard the gradient in its next step by making the norm non-finite."""
        if self._offloads():
            norms: dict[int, torch.Tensor] = self._zero.norm_for_param_grads
            norms.update(dict.fromkeys(norms, torch.tensor(math.nan)))
        for gradient in self.gradients():
            gradient.tensor.fill_(math.nan)

    def refresh(self) -> None:
        """Copy the weights from the buffers into the model. Collective over the data axis."""
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
    """The part that ZeRO 3 leaves on this rank: a piece of each parameter, the last piece padded."""

    def refresh(self) -> None:
        """See `Partition.refresh`."""
        for flat, buffer in zip(self._zero.fp16_partitioned_groups_flat, self.buffers, strict=True):
            flat.data.copy_(buffer.data)
        # ZeRO 3 keeps small parameters whole on every rank between steps.
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
    """Return the optimizer's parameter groups: one per weight decay, with parameters tied across stages kept separate.

    ZeRO's cut positions depend on all parameters in a group. Tied embeddings are replicas of each other only if both
    stages cut them alike.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for one in placed:
        groups.setdefault((one.tied, decay[one.name]), []).append(one.parameter)
    return [{"params": parameters, "weight_decay": rate} for (_, rate), parameters in groups.items()]
