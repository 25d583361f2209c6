"""The named losses of a step: summed for reporting, and combined into the weighted objective for backward."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

MAIN = "main"
"""Name of the cross-entropy of the targets, which is reported as the loss."""
Z_LOSS = "z_loss"
"""Name of the squared log-partition over the vocabulary."""

StageOutput = torch.Tensor | dict[str, torch.Tensor] | tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Hidden states, the losses of the last stage, or the hidden states of an earlier stage that adds losses."""


class Losses:
    """Collects the named losses of one rank over the micro-batches of a step or an evaluation.

    Every loss is a sum over a micro-batch, equal on all ranks of the tensor axis. The objective is the weighted sum of
    all losses over the global batch, divided by its number of unmasked targets: a loss that is a mean over a
    micro-batch must be multiplied by the unmasked targets of that micro-batch. Losses of weight 0 are left out.
    """

    def __init__(self, weights: Mapping[str, float], device: torch.device) -> None:
        """`weights` are those of `ModelParts.loss_weights`, equal on every rank regardless of its stages."""
        self._weights = weights
        self.names = tuple(name for name, weight in weights.items() if weight)
        """Names of the losses that are optimised and reported, in the order of `totals`."""
        self.totals = torch.zeros(len(self.names), device=device, dtype=torch.float64)
        """Unweighted sums over the micro-batches that this rank has processed."""
        self.count = torch.ones((), device=device)
        """Number of unmasked targets in the global batch."""
        self.scale = 1
        """Divisor that the engine applies to gradients after backward."""

    @property
    def columns(self) -> int:
        """Number of columns in the table that the last stage returns: all losses, in the order of the weights."""
        return len(self._weights)

    def start(self, count: torch.Tensor) -> None:
        """Start a step or an evaluation over `count` unmasked targets."""
        self.count = count
        self.totals.zero_()

    def add(self, losses: Mapping[str, torch.Tensor], micro_batches: int = 1) -> torch.Tensor:
        """Record the losses of a micro-batch, summing tensors of any shape; return their share of the objective.

        `micro_batches` is a further divisor that the engine applies; both are multiplied before the loss, for the bits.
        """
        objective: torch.Tensor | None = None
        for index, name in enumerate(self.names):
            if name not in losses:
                continue
            total = losses[name].sum()
            self.totals[index] += total.detach()
            weighted = total if self._weights[name] == 1 else self._weights[name] * total
            objective = weighted if objective is None else objective + weighted
        if objective is None:
            return torch.zeros((), device=self.totals.device)
        objective = objective / self.count
        divisor = self.scale * micro_batches
        return objective if divisor == 1 else objective * divisor

    def add_table(self, table: torch.Tensor, micro_batches: int = 1) -> torch.Tensor:
        """Record the losses that the last stage returns as a table `[samples, columns]`; otherwise like `add`."""
        return self.add(dict(zip(self._weights, table.unbind(1), strict=True)), micro_batches)

    def collected(self, forward: Callable[..., StageOutput]) -> Callable[..., torch.Tensor]:
        """Wrap the forward of a stage module to return one tensor, as pipelines and module wrappers require.

        The last stage returns its losses as a table `[micro, columns]`, for `add_table`. Losses of an earlier stage are
        recorded immediately; their gradient is added in the backward of its hidden states.

        Raises:
            ValueError: a stage returns a loss for which the model gives no weight.
        """

        def forward_of_stage(*args: Any, **kwargs: Any) -> torch.Tensor:
            output = forward(*args, **kwargs)
            if isinstance(output, torch.Tensor):
                return output
            if isinstance(output, tuple):
                hidden, losses = output
                self._check(losses)
                return _attached(hidden, self.add(losses))
            self._check(output)
            nothing = torch.zeros_like(output[MAIN])
            return torch.stack([output.get(name, nothing) for name in self._weights], dim=1)

        return forward_of_stage

    def _check(self, losses: Mapping[str, torch.Tensor]) -> None:
        if unknown := losses.keys() - self._weights.keys():
            raise ValueError(f"a stage returns {sorted(unknown)}; loss_weights has {sorted(self._weights)}")


def _attached(hidden: torch.Tensor, objective: torch.Tensor) -> torch.Tensor:
    """Return `hidden` unchanged; backward also starts the backward of `objective`, with gradient 1."""
    return _Attached.apply(hidden, objective)  # type: ignore[no-any-return, no-untyped-call]


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, objective: torch.Tensor) -> torch.Tensor:
        ctx.gradient = torch.ones_like(objective)
        return hidden.clone()  # FSDP hooks the outputs of a stage, which must not be views.

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], ctx.gradient
