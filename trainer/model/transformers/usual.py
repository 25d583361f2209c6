"""The parts of a causal model under the names that most classes of transformers give them.

A class may call its base model `transformer` and its layers `h`. They are registered as `model`, `embed_tokens`,
`layers` and `norm`; the class's own code goes on using its names, which become properties.
"""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from keepwarm.trainer.errors import SpecError

_HEAD = "lm_head"
_ATTENTIONS = ("self_attn", "attn", "attention")
_LAYERS = (["hidden_states", "attention_mask"], ["hidden_states"])
_NORM = (["hidden_states"], ["hidden_states"])
_KEY = "_keepwarm_outline"


class Outline(NamedTuple):
    """Names of the class itself."""

    base: str
    embedding: str
    layers: str
    norm: str

    @property
    def top(self) -> dict[str, str]:
        """Modules outside the layers by canonical name."""
        return {
            "embedding": f"{self.base}.{self.embedding}",
            "final_norm": f"{self.base}.{self.norm}",
            "head": _HEAD,
        }

    @property
    def layer(self) -> str:
        """Prefix of a layer; `{}` stands for its index."""
        return f"{self.base}.{self.layers}.{{}}."


def settled(model: Any) -> Outline:
    """Give the parts of a model their usual names, unless they have them; return those of its class.

    Raises:
        SpecError: it has no pipeline plan, or has other parts.
    """
    found = vars(model).get(_KEY)
    if found is None:
        found = _outline(model)
        _rename(model, {found.base: "model"})
        _rename(model.model, {found.embedding: "embed_tokens", found.layers: "layers", found.norm: "norm"})
        model.__dict__[_KEY] = found
    outline: Outline = found
    return outline


def attention_of(layer: nn.Module) -> str | None:
    """Return the name of a layer's attention, or None."""
    return next((name for name in _ATTENTIONS if isinstance(getattr(layer, name, None), nn.Module)), None)


def _outline(model: Any) -> Outline:
    """Find the parts in the pipeline plan; what the model drops out between them is nothing."""
    name, plan = type(model).__name__, getattr(model.config, "base_model_pp_plan", None)
    if not plan:
        raise SpecError(f"transformers has no tensor-parallel and pipeline plan for {name}")
    base = getattr(model, model.base_model_prefix, None)
    found: dict[str, str] = {}
    for part, (given, returned) in plan.items():
        module = getattr(base, part, None)
        what = _what(module, (list(given), list(returned)))
        if what is None or what in found:
            raise SpecError(f"the pipeline plan of {name} has other parts than an embedding, layers and a norm: {part}")
        if what:
            found[what] = part
    missing = [what for what in ("embedding", "layers", "norm") if what not in found]
    if missing:
        raise SpecError(f"the pipeline plan of {name} has no {missing[0]}")
    return Outline(base=model.base_model_prefix, **found)


def _what(module: nn.Module | None, passed: tuple[list[str], list[str]]) -> str | None:
    """Return which part a module is, "" for dropout, None for none that is known."""
    match module:
        case nn.Dropout():
            return ""
        case nn.Embedding():
            return "embedding" if passed[0] == ["input_ids"] else None
        case nn.ModuleList():
            return "layers" if passed == _LAYERS else None
        case nn.Module():
            return "norm" if passed == _NORM else None
    return None


def _rename(owner: nn.Module, names: Mapping[str, str]) -> None:
    changed = {old: new for old, new in names.items() if old != new}
    if not changed:
        return
    owner._modules = {changed.get(name, name): module for name, module in owner._modules.items()}
    cls = type(owner)
    made = type(cls.__name__, (cls,), {old: property(attrgetter(new)) for old, new in changed.items()})
    object.__setattr__(owner, "__class__", made)
