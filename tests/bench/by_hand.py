"""A Llama in three dimensions written by hand, as torch's own tutorials write it: the peer of `train_step`.

Nothing of `parallel` or `trainer` runs here: `parallelize_module` with sequence parallel and loss-parallel
cross-entropy, `Schedule1F1B`, `fully_shard`, fused AdamW, and the norm over all axes.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

from keepwarm.trainer.model.spec import ModelSpec


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.size = spec.size_per_head
        kv = spec.key_value_heads * self.size
        self.wq = nn.Linear(spec.hidden_size, spec.heads * self.size, bias=False)
        self.wk = nn.Linear(spec.hidden_size, kv, bias=False)
        self.wv = nn.Linear(spec.hidden_size, kv, bias=False)
        self.wo = nn.Linear(spec.heads * self.size, spec.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.wo(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)


class FeedForward(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.w1 = nn.Linear(spec.hidden_size, spec.ffn_size, bias=False)
        self.w3 = nn.Linear(spec.hidden_size, spec.ffn_size, bias=False)
        self.w2 = nn.Linear(spec.ffn_size, spec.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)
        self.attention = Attention(spec)
        self.ffn_norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)
        self.feed_forward = FeedForward(spec)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cosine, sine)
        return x + self.feed_forward(self.ffn_norm(x))  # type: ignore[no-any-return]


class StageModel(nn.Module):
    """Layers of one pipeline stage, with the embedding on the first and the output on the last."""

    def __init__(self, spec: ModelSpec, layers: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.vocabulary_size, spec.hidden_size) if first else None
        self.blocks = nn.ModuleDict({str(i): Block(spec) for i in layers})
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps) if last else None
        self.output = nn.Linear(spec.hidden_size, spec.vocabulary_size, bias=False) if last else None
        half = torch.arange(0, spec.size_per_head, 2) / spec.size_per_head
        angles = torch.outer(torch.arange(spec.max_sequence_length), spec.rope_theta**-half)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=spec.init.std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks.values():
            x = block(x, self.cosine, self.sine)
        return x if self.norm is None or self.output is None else self.output(self.norm(x))


def tensor_plan(stage: StageModel) -> dict[str, ParallelStyle]:
    """Megatron's split with sequence parallel in torch's styles."""
    plan: dict[str, ParallelStyle] = {}
    for i in stage.blocks:
        one = f"blocks.{i}."
        plan |= {
            one + "attention_norm": SequenceParallel(use_local_output=True),
            one + "ffn_norm": SequenceParallel(use_local_output=True),
            one + "attention": PrepareModuleInput(
                input_layouts=(Shard(1), None, None),
                desired_input_layouts=(Replicate(), None, None),
                use_local_output=True,
            ),
            one + "attention.wq": ColwiseParallel(),
            one + "attention.wk": ColwiseParallel(),
            one + "attention.wv": ColwiseParallel(),
            one + "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
            one + "feed_forward": PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True
            ),
            one + "feed_forward.w1": ColwiseParallel(),
            one + "feed_forward.w3": ColwiseParallel(),
            one + "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        }
    if stage.embedding is not None:
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    if stage.output is not None:
        plan["norm"] = SequenceParallel(use_local_output=True)
        plan["output"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False)
    return plan


class HandWritten:
    """One rank of the run."""

    def __init__(
        self, spec: ModelSpec, *, tensor: int, pipeline: int, data: int, micro_batches: int, lr: float
    ) -> None:
        self.mesh: DeviceMesh = init_device_mesh(
            "cpu", (data, pipeline, tensor), mesh_dim_names=("data", "pipeline", "tensor")
        )
        self.stage_index = self.mesh["pipeline"].get_local_rank()
        self.is_first, self.is_last = self.stage_index == 0, self.stage_index == pipeline - 1
        per_stage = spec.layers // pipeline
        layers = range(self.stage_index * per_stage, (self.stage_index + 1) * per_stage)
        self.model = StageModel(spec, layers, first=self.is_first, last=self.is_last)
        parallelize_module(self.model, self.mesh["tensor"], tensor_plan(self.model))
        for block in self.model.blocks.values():
            fully_shard(block, mesh=self.mesh["data"])
        fully_shard(self.model, mesh=self.mesh["data"], reshard_after_forward=False)
        stage = PipelineStage(
            self.model, self.stage_index, pipeline, torch.device("cpu"), group=self.mesh["pipeline"].get_group()
        )
        self.losses: list[torch.Tensor] = []
        self.schedule = Schedule1F1B(stage, micro_batches, self._loss)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> float:
        """One optimizer step on this data rank's samples; the mean loss over all ranks."""
        losses: list[torch.Tensor] = []
        with loss_parallel():
            if self.is_first:
                self.schedule.step(tokens)
            elif self.is_last:
                self.schedule.step(target=targets, losses=losses)
            else:
                self.schedule.step()
        self._clip(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        total = torch.stack([_whole(loss) for loss in losses]).mean() if losses else torch.zeros(())
        dist.all_reduce(total, group=self.mesh["data"].get_group())
        dist.all_reduce(total, group=self.mesh["pipeline"].get_group())
        return total.item() / self.mesh["data"].size()

    def _clip(self, limit: float) -> None:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        squared = _whole(norm).square()
        dist.all_reduce(squared, group=self.mesh["pipeline"].get_group())
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, squared.sqrt(), foreach=True)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
