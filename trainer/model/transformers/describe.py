"""Describe a config's model without its weights: `python -m` this module reads a config.json and writes JSON.

It runs in a process of its own, so that those that read jobs and supervise ranks import neither torch nor transformers.
"""

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from keepwarm.parallel.style import TensorStyle
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.transformers.buffers import check_buffers, saved_buffers
from keepwarm.trainer.model.transformers.classes import build
from keepwarm.trainer.model.transformers.facts import facts_of
from keepwarm.trainer.model.transformers.heads import ATTENTION, LATENT, check_own, head_size, heads_of
from keepwarm.trainer.model.transformers.initial import recorded
from keepwarm.trainer.model.transformers.names import LayerNames, canonical_modules
from keepwarm.trainer.model.transformers.usual import Outline, attention_of, settled

_STYLES: Mapping[str, TensorStyle] = {
    "colwise": "column",
    "colwise_gather_output": "column",
    "rowwise": "row",
    "rowwise_split_input": "row",
    "replicated_with_grad_allreduce": "per_head",
}
"""Styles of transformers' plans. Outputs that they gather stay split here: what follows works on whole heads."""
_LEFT_WHOLE = {
    **dict.fromkeys(("attention.query", "attention.key", "attention.value", "attention.key_value"), "colwise"),
    "attention.output": "rowwise",
}
"""Projections that some plans leave whole (Youtu, DeepSeek-V3), and that are divided by head here."""
_KEY_VALUE = ("attention.key", "attention.value")
_HEAD_NORMS = ("attention.query_norm", "attention.key_norm")


def describe(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Description` for the content of a config.json.

    Raises:
        SpecError: keepwarm cannot train this model; one sentence.
    """
    model: Any = build(content)
    config, name = model.config, type(model).__name__
    outline = _check(model)
    recorded(model)
    whole = {key: tuple(value.shape) for key, value in model.named_parameters()}
    names = renamed(model)
    layers = [{key: tuple(value.shape) for key, value in layer.named_parameters()} for layer in model.model.layers]
    buffers = [{key: tuple(value.shape) for key, value in saved_buffers(layer)} for layer in model.model.layers]
    made = [(tuple(layer.items()), tuple(kept.items())) for layer, kept in zip(layers, buffers, strict=True)]
    kinds = list(dict.fromkeys(made))
    sizes = [head_size(layer.attention, config) for layer in model.model.layers]
    heads = heads_of(config, layers, sizes)
    styles, misfit = _styles(model, names, outline, sizes[0])
    bias = model.lm_head.bias is not None
    asked = facts_of(model).windows
    return {
        "class_name": name,
        "layers": len(layers),
        "hidden_size": config.hidden_size,
        "heads": heads.heads,
        "kv_heads": heads.kv_heads,
        "head_dim": heads.head_dim,
        "ffn_size": layers[0]["mlp.down.weight"][1],
        "vocabulary_size": config.vocab_size,
        "max_sequence_length": config.max_position_embeddings,
        "tied_embeddings": bool(config.tie_word_embeddings),
        "windows": _windows(config, asked, len(layers)),
        "final_norm": {
            key.removeprefix("model.norm."): shape for key, shape in whole.items() if key.startswith("model.norm.")
        },
        "layer_shapes": [dict(kind) for kind, _ in kinds],
        "layer_buffers": [dict(kept) for _, kept in kinds],
        "layer_kinds": [kinds.index(layer) for layer in made],
        "head_bias": bias,
        "styles": styles,
        "no_tensor": misfit,
        "inside": dict(names.inside),
        "fused": {theirs: list(parts) for theirs, parts in names.fused.items()},
        "fused_groups": dict(names.groups),
        "top": outline.top,
        "layer": outline.layer,
    }


def renamed(model: Any) -> LayerNames:
    """Give the modules of all layers their canonical names; return those, equal for every layer."""
    settled(model)
    config = model.config
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    inside: dict[str, str] = {}
    fused: dict[str, tuple[str, ...]] = {}
    groups: dict[str, int] = {}
    for layer in model.model.layers:
        size = head_size(getattr(layer, attention_of(layer) or ""), config)
        rows = config.num_attention_heads * size, keys * size
        names = canonical_modules(layer, config.model_type, rows, config.num_attention_heads)
        inside |= names.inside
        fused |= names.fused
        groups |= names.groups
    return LayerNames(inside=inside, fused=fused, groups=groups)


def _check(model: Any) -> Outline:
    """Return the class's names of the parts of a stack of attention and MLP. Raise SpecError unless it is one."""
    name, config = type(model).__name__, model.config
    if not config.base_model_tp_plan or not config.base_model_pp_plan:
        raise SpecError(f"transformers has no tensor-parallel and pipeline plan for {name}")
    outline = settled(model)
    base = model.model
    if not isinstance(getattr(model, "lm_head", None), nn.Linear):
        raise SpecError(f"{name} has no plain head lm_head")
    known = {"embed_tokens", "layers", "norm"}
    others = [key for key, child in base.named_children() if key not in known and [*child.parameters()]]
    if others:
        raise SpecError(f"{name} has parameters outside its layers, in {others[0]}")
    for index, layer in enumerate(base.layers):
        _check_layer(layer, f"layer {index} of {name}")
    check_buffers(model)
    return outline


def _check_layer(layer: nn.Module, where: str) -> None:
    attention = layer._modules.get(attention_of(layer) or "")
    projections = ("q_proj", "qkv_proj", "query_key_value", "q_b_proj")
    if attention is None or not any(hasattr(attention, part) for part in projections):
        raise SpecError(f"{where} is no attention followed by an MLP; such layers are not supported yet")
    experts = [key for key, value in layer.named_parameters() if value.ndim > 2 or ".experts." in f".{key}."]
    if experts or any(key.rpartition(".")[2] in ("experts", "router") for key, _ in layer.named_modules()):
        raise SpecError(f"{where} is a mixture of experts; these come later")
    check_own(layer, attention, where)


def _windows(config: Any, asked: frozenset[int | None], layers: int) -> list[int | None]:
    """Return the window of each layer; `asked` are those of the masks that the model makes."""
    if len(asked) == 1:
        return [*asked] * layers
    window = next(found for found in asked if found is not None)
    return [window if kind == "sliding_attention" else None for kind in config.layer_types]


def _styles(
    model: Any, names: LayerNames, outline: Outline, head_dim: int
) -> tuple[dict[str, TensorStyle], str | None]:
    """Translate the model's plan; return our styles by pattern, and why the tensor axis cannot divide the model."""
    found: dict[str, TensorStyle] = {"embedding": "vocabulary", "final_norm": "sequence", "head": "head"}
    plan = model.config.base_model_tp_plan
    theirs = dict(names.inside) | {part: fused for fused, parts in names.fused.items() for part in parts}
    layer = model.model.layers[0]
    constant = {name for name, owner in layer.named_modules() if not owner._parameters}
    for ours, module in theirs.items():
        if ours in constant:
            continue
        if ours == ATTENTION:
            found[f"layers.*.{ours}"] = "heads"
            continue
        planned = plan.get(f"{outline.layers}.*.{module}") or _LEFT_WHOLE.get(ours)
        style = _style(planned, ours, layer, head_dim)
        if style is None:
            return found, f"the plan of {type(model).__name__} says nothing that keepwarm can follow for {module}"
        found[f"layers.*.{ours}"] = style
    counted = Counter(found.values())
    if counted["row"] != 2:
        return found, f"the plan of {type(model).__name__} does not divide attention and MLP"
    return found, None


def _style(planned: str | None, ours: str, layer: nn.Module, head_dim: int) -> TensorStyle | None:
    with contextlib.suppress(AttributeError):
        if "." in ours and all(one.numel() == 1 for one in layer.get_submodule(ours).parameters()):
            # Numbers of an activation inside a split region, where each rank has its own features.
            return "per_head" if planned is None else None
        weight: Any = layer.get_submodule(ours).weight
        if ours in LATENT:
            return "per_head"
        if weight.ndim == 1 and "." not in ours:
            return "sequence" if planned is None else None
        if ours in _HEAD_NORMS and weight.ndim == 1:
            whole: TensorStyle = "key_value_norm" if ours == "attention.key_norm" else "column_norm"
            return "per_head" if weight.shape[0] == head_dim else whole
        if weight.ndim == 2 and planned is not None and ours not in _HEAD_NORMS:
            style = _STYLES.get(planned)
            return "key_value" if style == "column" and ours in _KEY_VALUE else style
    return None


def main() -> None:
    """Answer for the config on standard input."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer: dict[str, Any] = {"description": describe(json.load(sys.stdin))}
    except SpecError as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
