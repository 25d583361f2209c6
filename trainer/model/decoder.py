"""The decoder-only transformer, whole or split into pipeline stages."""

import dataclasses
from typing import Literal, NamedTuple, cast

import torch
from torch import nn

from keepwarm.trainer.model.attention import Attention, Context, context
from keepwarm.trainer.model.head import Head
from keepwarm.trainer.model.initial import normal
from keepwarm.trainer.model.mlp import mlp
from keepwarm.trainer.model.norm import norm, use_apex
from keepwarm.trainer.model.parts import DecoderParts
from keepwarm.trainer.model.rotary import Table, positions_in, rotation_of
from keepwarm.trainer.model.spec import ModelSpec


class Layer(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = norm(spec, spec.hidden_size)
        self.attention = Attention(spec)
        self.mlp_norm = norm(spec, spec.hidden_size)
        self.mlp = mlp(spec)
        self.after = spec.norm_position == "post"
        self.parallel_residual = spec.parallel_residual

    def forward(self, x: torch.Tensor, seen: Context) -> torch.Tensor:
        """Apply the layer; input and result are `[micro, sequence, hidden]`."""
        if self.after:
            x = x + self.attention_norm(self.attention(x, seen))
            change: torch.Tensor = self.mlp_norm(self.mlp(x))
        elif self.parallel_residual:
            change = self.attention(self.attention_norm(x), seen) + self.mlp(self.mlp_norm(x))
        else:
            x = x + self.attention(self.attention_norm(x), seen)
            change = self.mlp(self.mlp_norm(x))
        return x + change


class _Kind(NamedTuple):
    """What layers may differ in; those of one kind share a `Context`."""

    window: int | None
    rotary: Literal["none", "plain", "scaled"]


class StageModule(nn.Module):
    """Consecutive layers, preceded by the embedding and followed by the head if the stage has them.

    If hidden states arrive split along the sequence, the engine sets `sequence_shards` to the number of parts.
    """

    def __init__(self, spec: ModelSpec, layers: range, *, embed: bool, head: bool) -> None:
        super().__init__()
        self.spec = spec
        self.sequence_shards = 1
        self.embedding = nn.Embedding(spec.vocabulary_size, spec.hidden_size) if embed else None
        learned = embed and spec.position == "learned"
        self.positions = nn.Embedding(spec.max_sequence_length, spec.hidden_size) if learned else None
        self.layers = nn.ModuleDict({str(index): Layer(spec) for index in layers})
        self._kinds = {str(index): _Kind(spec.window(index), spec.rotary(index)) for index in layers}
        self.final_norm = norm(spec, spec.hidden_size) if head else None
        self.head = Head(spec.hidden_size, spec.vocabulary_size) if head else None
        self._rotations: dict[str, tuple[object, Table]] = {}
        self.tie()

    def tie(self) -> None:
        """Share the embedding's parameter with the head if the spec ties them and the stage has both.

        Call it again after replacing parameters (`to_empty`, `parallelize_module`).
        """
        if self.spec.tied_embeddings and self.embedding is not None and self.head is not None:
            self.head.weight = cast(nn.Parameter, self.embedding.weight)

    def forward(
        self, x: torch.Tensor, documents: torch.Tensor | None = None, targets: torch.Tensor | None = None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """See `keepwarm.parallel.model.ModelParts.build_stage`."""
        sequence = x.shape[1] * (1 if self.embedding is not None else self.sequence_shards)
        positions = None if documents is None else positions_in(documents)
        if self.embedding is not None:
            tokens, x = x, self.embedding(x)
            if self.positions is not None:
                where = torch.arange(sequence, device=tokens.device)[None] if positions is None else positions
                x = x + self.positions(where)
        seen = self._contexts(sequence, positions, documents, x)
        for index, layer in self.layers.items():
            x = layer(x, seen[self._kinds[index]])
        if self.head is None or self.final_norm is None:
            return x
        result: torch.Tensor | dict[str, torch.Tensor] = self.head(self.final_norm(x), targets)
        return result

    def _contexts(
        self, sequence: int, positions: torch.Tensor | None, documents: torch.Tensor | None, x: torch.Tensor
    ) -> dict[_Kind, Context]:
        """Return what layers of the same kind share in this forward; masks are shared by those of one window."""
        kinds = set(self._kinds.values())
        masks = {window: context(None, sequence, x.device, documents, window) for window in {k.window for k in kinds}}
        rotations = {rotary: self._rotation_of(rotary, sequence, positions, x) for rotary in {k.rotary for k in kinds}}
        return {kind: dataclasses.replace(masks[kind.window], rotation=rotations[kind.rotary]) for kind in kinds}

    def _rotation_of(self, rotary: str, sequence: int, positions: torch.Tensor | None, x: torch.Tensor) -> Table | None:
        """Return cosines and sines of the tokens, from a table cached for the last length, device and dtype."""
        if rotary == "none":
            return None
        key = (sequence, x.device, x.dtype)
        if rotary not in self._rotations or self._rotations[rotary][0] != key:
            # A table created in inference mode could not be saved for a later backward.
            with torch.inference_mode(False):
                where = torch.arange(sequence, device=x.device)
                self._rotations[rotary] = key, rotation_of(self.spec, where, x.dtype, scaled=rotary == "scaled")
        cosine, sine = self._rotations[rotary][1]
        if positions is None:
            return cosine[None], sine[None]
        return cosine[positions], sine[positions]


class Decoder(DecoderParts[ModelSpec]):
    """A decoder-only transformer as `keepwarm.parallel.model.ModelParts`, built in stages.

    Initial values depend only on the seed and on a parameter's name and index.
    """

    def __init__(self, spec: ModelSpec, seed: int, *, norms: Literal["torch", "apex"] = "torch") -> None:
        super().__init__(spec, seed)
        self.norms = norms

    def build_stage(self, layers: range, *, embed: bool, head: bool) -> StageModule:
        """See `keepwarm.parallel.model.ModelParts`; weights are not those of `initial` until copied in."""
        stage = StageModule(self.spec, layers, embed=embed, head=head)
        if self.norms == "apex":
            use_apex(stage)
        return stage

    def initial(
        self, name: str, global_shape: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """See `keepwarm.parallel.model.ModelParts`; norms start at one, biases at zero, all else normal."""
        name = self.canonical(name)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if _is_norm(name):
            return torch.ones(shape)
        init = self.spec.init
        writes = name.endswith((".attention.output.weight", ".mlp.down.weight"))
        std = init.output_std if writes and init.output_std is not None else init.std
        return normal(self.seed, name, global_shape, offsets, shape).mul_(std)

    def decays(self, name: str) -> bool:
        """Return whether the parameter is anything but a norm or a bias."""
        return not (name.endswith(".bias") or _is_norm(name))


def _is_norm(name: str) -> bool:
    return name.rsplit(".", 2)[-2].endswith("norm")
