"""The parts of a step shared by all engines: count targets, reduce sums, decide whether to skip, clip."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from keepwarm.parallel.engine import Batch, EngineConfig, Evaluation, StepResult
from keepwarm.parallel.errors import LayoutError
from keepwarm.parallel.loss import Losses
from keepwarm.parallel.mesh.mesh import Mesh
from keepwarm.parallel.optimizer import clip
from keepwarm.parallel.targets import IGNORED


def set_numerics(config: EngineConfig) -> None:
    """Set, for the whole process, which kernels torch chooses and in which precision matrix products are summed."""
    numerics = config.numerics
    # Partial sums of bf16 products stay fp32, as in Megatron-LM.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if config.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = numerics.tf32
        torch.backends.cudnn.allow_tf32 = numerics.tf32
    if numerics.deterministic:
        torch.use_deterministic_algorithms(True)
        # The flag would also fill every new tensor, which no code here reads before writing.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def begin(batch: Batch, config: EngineConfig, mesh: Mesh, losses: Losses) -> Batch:
    """Return the batch on the engine's device, and start a step of `losses` over its global count of unmasked targets.

    Raises:
        LayoutError: the sequence cannot be split over the tensor axis.
    """
    length, tensor = batch.tokens.shape[-1], config.layout.tensor
    if config.parallel.sequence and length % tensor:
        raise LayoutError(
            f"parallel.sequence: a sequence of {length} tokens does not divide by parallel.tensor = {tensor}"
        )
    batch = batch.map(lambda tensor: tensor.to(config.device, non_blocking=True))
    count = (batch.targets != IGNORED).sum()
    if config.layout.data > 1:
        dist.all_reduce(count, group=mesh.group("data"))
    losses.start(count)
    return batch


def finish(
    config: EngineConfig,
    mesh: Mesh,
    losses: Losses,
    gradients: Sequence[clip.Gradient],
    before_update: Callable[[], None] | None,
) -> StepResult:
    """Return the result of a step after its last backward, equal on every rank; clip gradients unless it is skipped.

    A step is skipped if a loss or the gradient norm is not finite, or there is no target: the caller must then update
    nothing.
    """
    squared = clip.squared_norm(gradients, mesh.rank, config.device)
    *totals, squared_norm, count = _agree(mesh, losses, squared)
    means = [total / count if count else math.nan for total in totals]
    norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
    if before_update is not None:
        before_update()
    skipped = not all(map(math.isfinite, [*means, norm]))
    if not skipped and config.optimizer.clip_norm is not None:
        clip.clip(gradients, norm, config.optimizer.clip_norm)
    by_name = dict(zip(losses.names, means, strict=True))
    return StepResult(losses=by_name, tokens=int(count), grad_norm=norm, skipped=skipped)


def evaluated(mesh: Mesh, losses: Losses) -> Evaluation:
    """Return the result of an evaluation, summed over all ranks."""
    *totals, count = _agree(mesh, losses)
    return Evaluation(sums=dict(zip(losses.names, totals, strict=True)), tokens=int(count))


def _agree(mesh: Mesh, losses: Losses, *others: torch.Tensor) -> list[float]:
    """Return sums over the world: of every loss, then of all `others`, then the count, which every rank knows.

    A loss is equal on all ranks of the tensor axis and is counted on the first of them only.
    """
    totals = losses.totals if mesh.at.tensor == 0 else torch.zeros_like(losses.totals)
    numbers = torch.stack([*totals, *others, losses.count.double()])
    if mesh.world is not None:
        dist.all_reduce(numbers[:-1], group=mesh.world)
    result: list[float] = numbers.tolist()
    return result
