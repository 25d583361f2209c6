"""Logits of torchtitan's Llama 3 and Qwen 3 from one of its checkpoints, computed as its models compute them.

Llama 3 turns neighbouring features as complex numbers, Qwen 3 features half a head apart.
"""

from collections.abc import Callable, Collection

import torch
from torch.nn import functional as F

from keepwarm.trainer.convert.verify.plain import angles_of, attended, normalised, turned_halves
from keepwarm.trainer.model.spec import ModelSpec

Read = Callable[[str], torch.Tensor]


def torchtitan_logits(spec: ModelSpec, names: Collection[str], read: Read, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits `[sequence, vocabulary]`; `read` gives fp32 tensors of those `names`."""
    projections = "attention.qkv_linear" if "layers.0.attention.qkv_linear.wq.weight" in names else "attention"
    head = "lm_head.weight" if "lm_head.weight" in names else "output.weight"
    angles = angles_of(spec, len(tokens))
    x = read("tok_embeddings.weight")[tokens]
    for index in range(spec.layers):
        layer = f"layers.{index}."

        def heads(y: torch.Tensor, name: str, layer: str = layer) -> torch.Tensor:
            return (y @ read(f"{layer}{projections}.{name}.weight").T).view(len(y), -1, spec.size_per_head)

        y = _norm(spec, x, read(f"{layer}attention_norm.weight"))
        query, key, value = heads(y, "wq"), heads(y, "wk"), heads(y, "wv")
        if spec.qk_norm == "head":
            query = turned_halves(_norm(spec, query, read(f"{layer}attention.q_norm.weight")), angles)
            key = turned_halves(_norm(spec, key, read(f"{layer}attention.k_norm.weight")), angles)
        else:
            query, key = _turned_pairs(query, angles), _turned_pairs(key, angles)
        x = x + attended(query, key, value) @ read(f"{layer}attention.wo.weight").T
        y = _norm(spec, x, read(f"{layer}ffn_norm.weight"))
        gate = F.silu(y @ read(f"{layer}feed_forward.w1.weight").T)
        x = x + (gate * (y @ read(f"{layer}feed_forward.w3.weight").T)) @ read(f"{layer}feed_forward.w2.weight").T
    return _norm(spec, x, read("norm.weight")) @ read(head).T


def _norm(spec: ModelSpec, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return normalised(x, weight, kind="rms", eps=spec.norm_eps)


def _turned_pairs(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(-2)
