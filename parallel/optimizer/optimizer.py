"""The optimizer over the local parts of all parameters of a rank, across all stages and axes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from keepwarm.parallel.engine import EngineConfig
from keepwarm.parallel.model import ModelParts
from keepwarm.parallel.optimizer import apex
from keepwarm.parallel.optimizer.muon import MOMENTUM, Muon
from keepwarm.parallel.parameter import ShardedParameter
from keepwarm.parallel.shard import Shard
from keepwarm.parallel.spec import OptimizerSpec

COUNTER = "optimizer.step"


class Updater:
    """The optimizer of all stages of a rank; its moments exist from construction on."""

    def __init__(
        self, config: EngineConfig, parameters: Sequence[ShardedParameter], plane: dist.ProcessGroup | None
    ) -> None:
        """Allocate the moments.

        Args:
            parameters: of this rank.
            plane: the ranks of this pipeline coordinate, for Muon; None in a world of one.

        Raises:
            EngineUnavailable: the spec asks for Apex and it is not installed.
        """
        spec, model = config.optimizer, config.model
        self._spec = spec
        self.counter = torch.zeros((), dtype=torch.int64)
        """Number of updates done; part of the state."""
        decays = [(sharded, weight_decay(spec, model, sharded.name)) for sharded in parameters]
        self._muon: Muon | None = None
        if spec.name == "muon":
            matrices = [pair for pair in decays if spec.orthogonalises(pair[0].name, pair[0].global_shape)]
            decays = [pair for pair in decays if not spec.orthogonalises(pair[0].name, pair[0].global_shape)]
            precision = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
            self._muon = Muon(spec, matrices, plane, precision[config.numerics.precision])
        self._parameters = [sharded for sharded, _ in decays]
        self._optimizer = make_optimizer(spec, _groups(spec, decays), config.device) if decays else None
        if self._optimizer is not None:
            materialise(self._optimizer, spec, config.device)

    def step(self, lr: float) -> None:
        """Apply one update from the gradients of the local parameters."""
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        if self._muon is not None:
            self._muon.step(lr)
        self.counter += 1

    def restored(self) -> None:
        """Reset all step counters to the restored `counter`."""
        if self._optimizer is not None:
            set_step(self._optimizer, self._spec, int(self.counter))

    def shards(self, ranks: Iterable[int]) -> Iterator[Shard]:
        """Yield moments and counter; `ranks` are all ranks of the world, which share the counter."""
        for sharded in self._parameters:
            for key, stored in moments(self._spec).items():
                assert self._optimizer is not None
                yield sharded.shard(f"optimizer.{key}", self._optimizer.state[sharded.local][stored])
        for sharded, momentum in () if self._muon is None else self._muon.state():
            yield sharded.shard(f"optimizer.{MOMENTUM}", momentum)
        yield counter_shard(self.counter, ranks)


def counter_shard(counter: torch.Tensor, ranks: Iterable[int]) -> Shard:
    """Return the shard of the update counter, which all `ranks` share."""
    return Shard(name=COUNTER, global_shape=(), offsets=(), shape=(), local=counter, replicas=tuple(sorted(ranks)))


def moments(spec: OptimizerSpec) -> Mapping[str, str]:
    """Map each moment of the update rule to its key in the state of torch's optimizer, which is not Muon's."""
    if spec.name in ("adamw", "muon"):
        return {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    return {"momentum": "momentum_buffer"} if spec.momentum else {}


def materialise(
    optimizer: torch.optim.Optimizer,
    spec: OptimizerSpec,
    device: torch.device,
    tensors: Iterable[torch.Tensor] | None = None,
) -> None:
    """Create the state that the optimizer would create in its first step, for `tensors` or else for its parameters.

    `device` is the device of the optimizer's parameters.
    """
    group = optimizer.param_groups[0]
    for tensor in [one for each in optimizer.param_groups for one in each["params"]] if tensors is None else tensors:
        state = optimizer.state[tensor]
        if spec.name != "sgd" and spec.implementation == "torch":
            state["step"] = torch.zeros((), device=device if group["fused"] else "cpu")
        for stored in moments(spec).values():
            state[stored] = torch.zeros_like(tensor)


def set_step(optimizer: torch.optim.Optimizer, spec: OptimizerSpec, step: int) -> None:
    """Set every step counter in the optimizer, from which it corrects the bias of the moments, to `step`."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)
    if spec.name != "sgd" and spec.implementation == "apex":
        # FusedAdam counts in its groups, from its first step on: in a new process the counter is not there yet.
        for group in optimizer.param_groups:
            group["step"] = step


def weight_decay(spec: OptimizerSpec, model: ModelParts, name: str) -> float:
    """Return the weight decay of the parameter with this canonical name."""
    decays = model.decays(name) and (spec.decay_embeddings or not model.is_embedding(name))
    return spec.weight_decay if decays else 0.0


def _groups(spec: OptimizerSpec, decays: Sequence[tuple[ShardedParameter, float]]) -> list[dict[str, Any]]:
    """Group parameters into those with and without weight decay; empty groups are left out."""
    decayed = [sharded.local for sharded, decay in decays if decay]
    plain = [sharded.local for sharded, decay in decays if not decay]
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(spec: OptimizerSpec, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of the spec over `groups` on `device`.

    Raises:
        EngineUnavailable: the spec asks for Apex and it is not installed.
    """
    # Every step sets the learning rate.
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=spec.momentum, foreach=True)
    if spec.implementation == "apex":
        fused: torch.optim.Optimizer = apex.fused_adam()(
            groups, lr=0.0, betas=spec.betas, eps=spec.eps, adam_w_mode=True
        )
        return fused
    return torch.optim.AdamW(groups, lr=0.0, betas=spec.betas, eps=spec.eps, fused=device.type != "meta")
