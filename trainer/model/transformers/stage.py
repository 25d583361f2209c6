"""One pipeline stage made of the layers of a class of transformers."""

from typing import Any, cast

import torch
from torch import nn

from keepwarm.trainer.model.head import Head
from keepwarm.trainer.model.rotary import positions_in
from keepwarm.trainer.model.transformers.attention import Sequences
from keepwarm.trainer.model.transformers.buffers import compute_like_inputs
from keepwarm.trainer.model.transformers.facts import Absent, Facts, rebuild_constants, run
from keepwarm.trainer.model.transformers.heads import count_heads


class TransformersStage(nn.Module):
    """Consecutive layers, preceded by the embedding and followed by the head if the stage has them.

    The forward is that of the class's base model, in which identities stand for modules of other stages. The base model
    is not registered, so that its modules have the names that they have here.
    """

    def __init__(self, model: Any, facts: Facts, layers: range, *, embed: bool, head: bool) -> None:
        """`model` is a causal model on the meta device whose layers have canonical names; the stage takes it over."""
        super().__init__()
        base, config = model.model, model.config
        self.sequence_shards = 1
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size) if embed else None
        self.layers = nn.ModuleDict({str(index): base.layers[index] for index in layers})
        self.final_norm = base.norm if head else None
        self.head = (
            Head(config.hidden_size, config.vocab_size, cap=facts.logit_cap, bias=facts.head_bias) if head else None
        )
        self._facts = facts
        self._tied = bool(config.tie_word_embeddings)
        base.layers = nn.ModuleList(
            layer if index in layers else Absent(layer) for index, layer in enumerate(base.layers)
        )
        base.embed_tokens = nn.Identity()
        if not head:
            base.norm = nn.Identity()
        if facts.input_scale is not None and not embed:
            setattr(base, facts.input_scale, 1.0)
        self.__dict__["_base"] = base
        self._ready: torch.device | None = None
        for layer in self.layers.values():
            # When a layer runs, FSDP has gathered its weights.
            cast(nn.Module, layer.attention).register_forward_pre_hook(count_heads)
        compute_like_inputs(self.layers)
        self.tie()

    def tie(self) -> None:
        """Share the embedding's parameter with the head if they are tied and the stage has both."""
        if self._tied and self.embedding is not None and self.head is not None:
            self.head.weight = cast(nn.Parameter, self.embedding.weight)

    def forward(
        self, x: torch.Tensor, documents: torch.Tensor | None = None, targets: torch.Tensor | None = None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """See `keepwarm.parallel.model.ModelParts.build_stage`."""
        length = x.shape[1] * (1 if self.embedding is not None else self.sequence_shards)
        if self.embedding is not None:
            x = self.embedding(x)
            if self._facts.embedding_scale is not None:
                x = x * torch.tensor(self._facts.embedding_scale, dtype=x.dtype, device=x.device)
        self._settle(x.device)
        positions = None if documents is None else positions_in(documents)
        x = run(self.__dict__["_base"], x, Sequences(length, x.device, documents), positions)
        if self.head is None:
            return x
        if self._facts.logit_scale != 1.0:
            x = x * self._facts.logit_scale
        result: torch.Tensor | dict[str, torch.Tensor] = self.head(x, targets)
        return result

    def _settle(self, device: torch.device) -> None:
        """Make the rotary tables, once the parameters are where they stay."""
        if self._ready == device:
            return
        self._ready = device
        with torch.inference_mode(False):
            rebuild_constants(self.__dict__["_base"], device)
