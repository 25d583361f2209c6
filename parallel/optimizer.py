"""The update rule over the local parts of all parameters of a rank, whatever stages and axes they come from."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from parallel.errors import EngineUnavailable
from parallel.model import ModelParts
from parallel.parameter import Held
from parallel.shard import Shard
from parallel.spec import OptimizerSpec

COUNTER = "optimizer.step"


class Updater:
    """One optimizer for all stages of a rank; its moments exist from construction on."""

    def __init__(
        self, spec: OptimizerSpec, model: ModelParts, parameters: Sequence[Held], device: torch.device
    ) -> None:
        """Raises EngineUnavailable when the spec asks for Apex and it is not installed."""
        self._spec = spec
        self._parameters = parameters
        self.counter = torch.zeros((), dtype=torch.int64)
        """Updates done; part of the state."""
        self._optimizer = _make(spec, _groups(spec, model, parameters), device)
        self._materialise(device)

    def step(self, lr: float) -> None:
        """One update from the gradients of the local parameters."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.counter += 1

    def clear(self) -> None:
        """Drop the gradients of the local parameters."""
        self._optimizer.zero_grad(set_to_none=True)

    def restored(self) -> None:
        """Let everything that counts steps follow `counter`."""
        step = int(self.counter)
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(step)
        for group in self._optimizer.param_groups:
            if "step" in group:
                group["step"] = step

    def shards(self, ranks: Iterable[int]) -> Iterator[Shard]:
        """Moments and counter; `ranks` are all ranks of the world, which share the counter."""
        for held in self._parameters:
            for key in _moments(self._spec):
                tensor = self._optimizer.state[held.local][_STORED_AS[key]]
                yield held.shard(f"optimizer.{key}", tensor)
        yield Shard(
            name=COUNTER, global_shape=(), offsets=(), shape=(), local=self.counter, replicas=tuple(sorted(ranks))
        )

    def _materialise(self, device: torch.device) -> None:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state[parameter]
                if self._spec.name == "adamw" and self._spec.implementation == "torch":
                    state["step"] = torch.zeros((), device=device if group["fused"] else "cpu")
                for key in _moments(self._spec):
                    state[_STORED_AS[key]] = torch.zeros_like(parameter)


_STORED_AS = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum": "momentum_buffer"}


def _moments(spec: OptimizerSpec) -> tuple[str, ...]:
    if spec.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum",) if spec.momentum else ()


def _groups(spec: OptimizerSpec, model: ModelParts, parameters: Sequence[Held]) -> list[dict[str, Any]]:
    """Parameters that decay and those that do not; empty groups are left out."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for held in parameters:
        decays = model.decays(held.name) and (spec.decay_embeddings or not model.is_embedding(held.name))
        (decayed if decays else plain).append(held.local)
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _make(spec: OptimizerSpec, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    # The learning rate comes with every step.
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=spec.momentum, foreach=True)
    if spec.implementation == "apex":
        fused: torch.optim.Optimizer = _apex()(groups, lr=0.0, betas=spec.betas, eps=spec.eps, adam_w_mode=True)
        return fused
    return torch.optim.AdamW(groups, lr=0.0, betas=spec.betas, eps=spec.eps, fused=device.type in ("cpu", "cuda"))


def _apex() -> Any:
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise EngineUnavailable(
            "optimizer.implementation = apex needs NVIDIA's Apex, which is built from source "
            "(https://github.com/NVIDIA/apex; the package `apex` on PyPI is another project); "
            "or set optimizer.implementation = torch"
        ) from error
    return FusedAdam
