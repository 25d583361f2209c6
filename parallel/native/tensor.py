"""Tensor parallelism: parameters are DTensors on the tensor axis, and modules compute on their local parts.

Matrices are split as in Megatron (Shoeybi et al., 2019), sequences as in Korthikanti et al. (2022): with sequence
parallelism, everything between the matrices holds only this rank's part of the sequence, and the all-reduce at
either end of a split region becomes an all-gather and a reduce-scatter.
"""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from keepwarm.parallel.mesh.collective import SEQUENCE_DIM, copy_to, gather_sequence, reduce_from, scatter_sequence
from keepwarm.parallel.parameter import Split, TensorSlice
from keepwarm.parallel.style import SPLIT_DIM, TensorStyle, copies_of

Forward = Callable[..., Any]


class TensorParallel:
    """Splits the modules of pipeline stages over the ranks of one tensor group."""

    def __init__(self, plan: Mapping[str, TensorStyle], mesh: DeviceMesh, *, kv_heads: int, sequence: bool) -> None:
        """`mesh` has only the tensor axis; `sequence` splits activations between the matrices along dim 1."""
        self._kv_heads = kv_heads
        self._plan = plan
        self._mesh = mesh
        self._group: dist.ProcessGroup = mesh.get_group()
        self._sequence = sequence

    def apply(self, part: nn.Module) -> dict[str, Split]:
        """Turn the parameters of `part`, on any device, into DTensors, and make its forwards compute locally.

        Returns:
            How each split parameter is split, by name; all other parameters are whole on every rank.
        """
        styles = {name: style for name, _ in part.named_modules() if (style := self._style(name)) is not None}
        regions = {name.rpartition(".")[0] for name, style in styles.items() if style in ("column", "key_value")}
        split: dict[str, Split] = {}
        made: dict[nn.Parameter, nn.Parameter] = {}
        for name, module in list(part.named_modules()):
            style = styles.get(name)
            dim = SPLIT_DIM.get(style) if style else None
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                cut = None
                if dim is not None and dim < parameter.ndim:
                    split[f"{name}.{key}"] = cut = Split(dim, copies_of(style, self._kv_heads, self._group.size()))
                if parameter not in made:
                    made[parameter] = self._distribute(parameter, cut)
                module._parameters[key] = made[parameter]
            if module._parameters:
                self._adapt(module, style)
            if name in regions:
                self._enter(module)
        part.sequence_shards = self._group.size() if self._sequence else 1  # type: ignore[assignment]
        return split

    def _style(self, name: str) -> TensorStyle | None:
        return next((style for pattern, style in self._plan.items() if fnmatch.fnmatchcase(name, pattern)), None)

    def _distribute(self, parameter: nn.Parameter, split: Split | None) -> nn.Parameter:
        """Return the parameter as a DTensor; one with copies is a longer tensor in which each part is repeated."""
        whole = local = parameter.data
        placement: Placement = Replicate()
        if split is not None:
            placement, dim = Shard(split.dim), split.dim
            if split.copies > 1:
                whole = torch.empty_like(torch.cat([whole] * split.copies, dim), device="meta")
            box = split.cut(TensorSlice.whole(local.shape), self._group.size(), self._group.rank())
            local = local.narrow(dim, box.offsets[dim], box.shape[dim]).contiguous()
        made = DTensor.from_local(
            local, self._mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        return nn.Parameter(made)

    def _adapt(self, module: nn.Module, style: TensorStyle | None) -> None:
        """Make a module that owns parameters compute on local parts, and set the placement of its gradients."""
        match style:
            case "row":
                module.forward = self._row(module)
            case "vocabulary":
                module.forward = self._vocabulary(module)
            case "head":
                module.vocabulary_group = self._group  # type: ignore[assignment]
                module.vocabulary_start = self._group.rank() * self._tokens(module)  # type: ignore[assignment]
            case "column_norm" | "key_value_norm":
                module.reduce_group = self._group  # type: ignore[assignment]
                module.copies = copies_of(style, self._kv_heads, self._group.size())  # type: ignore[assignment]
            case "positions" if self._sequence:
                module.forward = self._own_part(module.forward)
        # Whole parameters of whose gradient each rank computes a part; for `row` it is the bias, added after the sum.
        partial = style == "per_head" or (self._sequence and style in ("sequence", "positions", "row"))
        _localize(module, Partial() if partial else None)
        if style == "head":
            self._enter(module)

    def _enter(self, module: nn.Module) -> None:
        """Collect the first argument at the entrance of a split region, where every rank needs all of it.

        It may be passed by name, as transformers' layers do.
        """
        inner, group = module.forward, self._group
        collect = gather_sequence if self._sequence else copy_to

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                return inner(collect(args[0], group), *args[1:], **kwargs)
            first, x = next(iter(kwargs.items()))
            return inner(**{**kwargs, first: collect(x, group)})

        module.forward = forward

    def _row(self, module: nn.Module) -> Forward:
        group, leave = self._group, scatter_sequence if self._sequence else reduce_from

        def forward(x: torch.Tensor) -> torch.Tensor:
            total = leave(F.linear(x, module.weight), group)  # type: ignore[arg-type]
            return total if module.bias is None else total + module.bias  # type: ignore[operator]

        return forward

    def _tokens(self, module: nn.Module) -> int:
        """Return the tokens of every rank but the last ones, which may have fewer."""
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        return -(-weight.shape[0] // self._group.size())

    def _vocabulary(self, module: nn.Module) -> Forward:
        group, leave = self._group, scatter_sequence if self._sequence else reduce_from
        start = group.rank() * self._tokens(module)

        def forward(tokens: torch.Tensor) -> torch.Tensor:
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            index = tokens - start
            elsewhere = (index < 0) | (index >= weight.shape[0])
            found = F.embedding(index.masked_fill(elsewhere, 0), weight)
            return leave(found.masked_fill(elsewhere[..., None], 0), group)

        return forward

    def _own_part(self, inner: Forward) -> Forward:
        group = self._group

        def forward(where: torch.Tensor) -> torch.Tensor:
            part: torch.Tensor = inner(where).chunk(group.size(), SEQUENCE_DIM)[group.rank()]
            return part

        return forward


def _localize(module: nn.Module, gradient: Placement | None) -> None:
    """Run the forward on local tensors; `gradient` is the placement of whole parameters' gradients."""
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        parameters = module._parameters
        module.__dict__["_parameters"] = {key: _local(value, gradient) for key, value in parameters.items()}
        try:
            return inner(*args, **kwargs)
        finally:
            module.__dict__["_parameters"] = parameters

    module.forward = forward


def _local(parameter: nn.Parameter | None, gradient: Placement | None) -> torch.Tensor | None:
    if not isinstance(parameter, DTensor):
        return parameter
    if gradient is None or parameter.placements[-1].is_shard():
        return parameter.to_local()
    return parameter.to_local(grad_placements=[gradient])
