"""Tensor parallelism for the DeepSpeed engine: Megatron Core's parallel layers replace the model's own.

Matrices are split as in Shoeybi et al. (2019); the model specifies the style of each module
(`keepwarm.parallel.style`). Importing this module imports Megatron Core.
"""

import fnmatch
import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from keepwarm.parallel.mesh.collective import copy_to
from keepwarm.parallel.parameter import Split
from keepwarm.parallel.style import SPLIT_DIM, TensorStyle

with warnings.catch_warnings():
    for _message in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed",
        "The following imports from `dynamic_context.py` will be removed",
        "`torch.jit.script(_method)?` is deprecated",
    ):
        warnings.filterwarnings("ignore", _message)
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding


class Column(ColumnParallelLinear):  # type: ignore[misc]
    """A linear layer with split outputs. It adds the bias itself and returns only the outputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(x)[0]
        return output


class Row(RowParallelLinear):  # type: ignore[misc]
    """A linear layer with split inputs. It returns the sum over the ranks, with the bias added once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(x)[0]
        return output


def split(
    part: nn.Module, plan: Mapping[str, TensorStyle], group: dist.ProcessGroup, device: torch.device
) -> dict[str, Split]:
    """Replace the modules of `part`, which is on the meta device, by modules that hold this rank's share.

    Returns:
        How each split parameter is split, by name; all other parameters are whole on every rank.
    """
    if device.type == "cpu":
        warnings.filterwarnings("ignore", "When using async grad allreduce it is recommended to set the environment")
    config = ModelParallelConfig(
        tensor_model_parallel_size=group.size(), use_cpu_initialization=True, perform_initialization=False
    )
    found: dict[str, Split] = {}
    for name, module in list(part.named_modules()):
        style = next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if style is None or style in ("sequence", "positions"):
            continue
        if style == "per_head":
            for parameter in module.parameters():
                parameter.register_hook(lambda gradient: _summed(gradient, group))
            continue
        dim = SPLIT_DIM[style]
        found |= {f"{name}.{key}": Split(dim) for key, one in module.named_parameters(recurse=False) if dim < one.ndim}
        _replace(part, name, module, style, config, group)
    return found


def _replace(
    part: nn.Module,
    name: str,
    module: nn.Module,
    style: TensorStyle,
    config: ModelParallelConfig,
    group: dist.ProcessGroup,
) -> None:
    parent, _, child = name.rpartition(".")
    owner = part.get_submodule(parent)

    def nothing(_: torch.Tensor) -> None:
        """Leave the weight uninitialised; initial weights are filled in later."""

    match module:
        case nn.Embedding():
            new: nn.Module = VocabParallelEmbedding(
                module.num_embeddings, module.embedding_dim, init_method=nothing, config=config, tp_group=group
            )
        case nn.Linear() if style in ("column", "key_value"):
            new = Column(
                module.in_features,
                module.out_features,
                config=config,
                init_method=nothing,
                bias=module.bias is not None,
                gather_output=False,
                tp_group=group,
            )
        case nn.Linear():
            new = Row(
                module.in_features,
                module.out_features,
                config=config,
                init_method=nothing,
                bias=module.bias is not None,
                input_is_parallel=True,
                skip_bias_add=False,
                tp_group=group,
            )
        case _:
            _keep(module, style, group)
            return
    setattr(owner, child, new)


def _keep(module: nn.Module, style: TensorStyle, group: dist.ProcessGroup) -> None:
    """Shard the weight of a module that supports it, the head or a norm over split features, and set its group."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    rows = weight.shape[0] // group.size()
    module.weight = nn.Parameter(weight.new_empty(rows, *weight.shape[1:]))
    if style in ("column_norm", "key_value_norm"):
        module.reduce_group = group  # type: ignore[assignment]
        return
    module.vocabulary_group = group  # type: ignore[assignment]
    module.vocabulary_start = group.rank() * rows  # type: ignore[assignment]
    inner = module.forward

    def forward(x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        result: torch.Tensor = inner(copy_to(x, group), targets)
        return result

    module.forward = forward


def _summed(gradient: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the sum over `group` of the gradient of a replicated parameter that each rank applies to its own heads."""
    total = gradient.clone()
    dist.all_reduce(total, group=group)
    return total
