"""Logits of Megatron Core's GPTModel from one of its checkpoints, computed as that model computes them."""

from collections.abc import Callable, Collection

import torch
from torch.nn import functional as F

from keepwarm.trainer.convert.verify.plain import angles_of, attended, normalised, turned_halves
from keepwarm.trainer.model.spec import ModelSpec

Read = Callable[[str, int | None], torch.Tensor]
"""Return an fp32 tensor: of one layer, by its name without the prefix, or outside the layers."""


def megatron_logits(spec: ModelSpec, names: Collection[str], read: Read, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits `[sequence, vocabulary]`; `names` are those outside the layers and those inside the first."""
    embedding = read("embedding.word_embeddings.weight", None)[: spec.vocabulary_size]
    x = embedding[tokens]
    if spec.position == "learned":
        x = x + read("embedding.position_embeddings.weight", None)[: len(tokens)]
    if not spec.tied_embeddings:
        del embedding
    for index in range(spec.layers):
        x = _Layer(spec, names, lambda name, index=index: read(name, index))(x)  # type: ignore[misc]
    x = _norm(spec, x, lambda name: read(name, None), names, "decoder.final_layernorm.")
    head = embedding if spec.tied_embeddings else read("output_layer.weight", None)[: spec.vocabulary_size]
    return x @ head.T


class _Layer:
    def __init__(self, spec: ModelSpec, names: Collection[str], read: Callable[[str], torch.Tensor]) -> None:
        self._spec, self._names, self._read = spec, names, read

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = _norm(self._spec, x, self._read, self._names, "self_attention.linear_qkv.layer_norm_")
        x = x + self._linear("self_attention.linear_proj", self._attention(y))
        y = _norm(self._spec, x, self._read, self._names, "mlp.linear_fc1.layer_norm_")
        y = self._linear("mlp.linear_fc1", y)
        if self._spec.activation == "swiglu":
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        else:
            y = F.gelu(y, approximate="tanh" if self._spec.activation == "gelu_tanh" else "none")
        return x + self._linear("mlp.linear_fc2", y)

    def _attention(self, y: torch.Tensor) -> torch.Tensor:
        """Rows of the fused projection are, group by group: its queries, its key, its value."""
        spec, size, groups = self._spec, self._spec.size_per_head, self._spec.key_value_heads
        fused = self._linear("self_attention.linear_qkv", y).view(len(y), groups, -1, size)
        query, key, value = fused[:, :, :-2].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]
        if spec.qk_norm == "head":
            query = _norm(spec, query, self._read, self._names, "self_attention.q_layernorm.")
            key = _norm(spec, key, self._read, self._names, "self_attention.k_layernorm.")
        if spec.position == "rotary":
            angles = angles_of(spec, len(y))
            query, key = (turned_halves(one, angles, spec.attention_factor) for one in (query, key))
        return attended(query, key, value)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        bias = self._read(f"{name}.bias") if f"{name}.bias" in self._names else None
        return F.linear(x, self._read(f"{name}.weight"), bias)


def _norm(
    spec: ModelSpec, x: torch.Tensor, read: Callable[[str], torch.Tensor], names: Collection[str], prefix: str
) -> torch.Tensor:
    bias = read(f"{prefix}bias") if f"{prefix}bias" in names else None
    return normalised(x, read(f"{prefix}weight"), bias, kind=spec.norm, eps=spec.norm_eps)
