"""What a class of transformers does around its layers, found by running it without them.

The layers, the norm and the head are replaced by identities, so that only the lines of its forwards remain; a small
example then shows whether they are those that a stage can reproduce.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.transformers.attention import Probe, masks_of
from keepwarm.trainer.model.transformers.usual import settled

_INPUT_SCALES = ("embedding_multiplier",)
"""Attributes of base models by which their forward multiplies what it is handed (Granite)."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a stage has to do itself."""

    embedding_scale: float | None
    """Factor that the embedding's own class applies (Gemma)."""
    input_scale: str | None
    """Attribute that a stage without embedding must neutralise."""
    windows: frozenset[int | None]
    """Windows of the masks that the model asks for; None for a whole one."""
    logit_scale: float = 1.0
    logit_cap: float | None = None
    """Soft cap: `cap * tanh(logits / cap)` (Gemma 2)."""
    head_bias: bool = False


class Absent(nn.Module):
    """Stands for a layer of another stage: returns the hidden states that it is handed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Models read such attributes of their layers, as `attention_type`.
        self.__dict__.update({name: value for name, value in vars(layer).items() if not name.startswith("_")})

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


def facts_of(model: Any) -> Facts:
    """Return the facts of a model built on the meta device, which cannot be used afterwards.

    Raises:
        SpecError: a forward does something that a stage cannot reproduce.
    """
    settled(model)
    base, config = model.model, model.config
    scale = _embedding_scale(base.embed_tokens)
    example = torch.linspace(-2.0, 2.0, 2 * 6 * config.hidden_size).view(2, 6, config.hidden_size)
    base.layers = nn.ModuleList([Absent(layer) for layer in base.layers])
    base.norm = nn.Identity()
    rebuild_constants(base)
    name = type(model).__name__
    probe = Probe(6, example.device, None)
    with _plainly(name):
        output = _output(base, example, probe)
    handed = output.last_hidden_state
    input_scale = None
    if not _equal(handed, example):
        input_scale = next((found for found in _INPUT_SCALES if hasattr(base, found)), None)
        if input_scale is None or not _equal(handed, example * getattr(base, input_scale)):
            raise SpecError(f"{name} changes hidden states outside its layers in a way that keepwarm does not know")
    has_bias = model.lm_head.bias is not None
    with _plainly(name):
        logit_scale, cap = _logits(model, example, output)
    if has_bias and logit_scale != 1.0:
        raise SpecError(f"{name} multiplies logits that have a bias, which keepwarm does not know")
    return Facts(
        embedding_scale=scale,
        input_scale=input_scale,
        windows=frozenset(probe.made),
        logit_scale=logit_scale,
        logit_cap=cap,
        head_bias=has_bias,
    )


@contextmanager
def _plainly(name: str) -> Iterator[None]:
    """Turn what the code of a class raises into a sentence about the class."""
    try:
        yield
    except SpecError as error:
        raise SpecError(f"{name} {error}") from error
    except Exception as error:
        raise SpecError(f"{name} needs more of its layers than hidden states, which is all that a stage has") from error


def run(base: Any, hidden: torch.Tensor, sequences: Any, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Run the forward of a base model on hidden states, with masks and positions of `sequences`."""
    result: torch.Tensor = _output(base, hidden, sequences, positions).last_hidden_state
    return result


def _output(base: Any, hidden: torch.Tensor, sequences: Any, positions: torch.Tensor | None = None) -> Any:
    if positions is None:
        positions = torch.arange(sequences.length, device=hidden.device)[None]
    with masks_of(sequences):
        return base(inputs_embeds=hidden, position_ids=positions, use_cache=False)


def rebuild_constants(base: nn.Module, device: torch.device | None = None) -> None:
    """Make the modules without parameters that compute rotary tables again, on a real device."""
    _rebuild_constants(base, base.config, device or torch.device("cpu"))


def _rebuild_constants(owner: nn.Module, config: Any, device: torch.device) -> None:
    """Rebuild those of `owner` and of lists of them (Granite has one table for each base of its layers)."""
    for name, module in list(owner.named_children()):
        if next(module.parameters(), None) is not None or next(module.buffers(), None) is None:
            continue
        if isinstance(module, nn.ModuleList):
            _rebuild_constants(module, config, device)
        else:
            with device:
                setattr(owner, name, type(module)(config=getattr(module, "config", config)))


def _embedding_scale(embedding: nn.Module) -> float | None:
    if type(embedding) is nn.Embedding:
        return None
    scale = getattr(embedding, "scalar_embed_scale", None)
    if not isinstance(embedding, nn.Embedding) or not isinstance(scale, int | float):
        raise SpecError(f"its embedding is a {type(embedding).__name__}, which keepwarm does not know")
    return float(scale)


def _logits(model: Any, hidden: torch.Tensor, output: Any) -> tuple[float, float | None]:
    """Return by what the logits are multiplied, and their soft cap; `output` is one of the base model."""
    output.last_hidden_state = hidden
    model.model, model.lm_head = _Given(output), nn.Identity()
    logits = model(inputs_embeds=hidden).logits
    for scale, cap in _candidates(model.config):
        if _equal(logits, capped(hidden * scale, cap)):
            return scale, cap
    raise SpecError("changes its logits in a way that keepwarm does not know")


def _candidates(config: Any) -> Iterator[tuple[float, float | None]]:
    scales = [1.0]
    if getattr(config, "logits_scaling", None):
        scales.append(1 / config.logits_scaling)
    scales += [getattr(config, name) for name in ("logit_scale", "lm_head_multiplier") if getattr(config, name, None)]
    for cap in (None, getattr(config, "final_logit_softcapping", None)):
        yield from ((float(scale), cap) for scale in scales)


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-6, atol=1e-6)


class _Given(nn.Module):
    """Stands for a base model whose result is known."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output
