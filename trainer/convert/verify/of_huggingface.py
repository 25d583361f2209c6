"""Logits of a Hugging Face folder, by the class of transformers that its config names.

Nothing here is shared with the conversion: transformers reads the config and computes, the library safetensors reads
the files, and tensors have the names of the class's own parameters.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import nn

from keepwarm.tested import installed
from keepwarm.trainer.convert.verify.opened import Rounding, fitting
from keepwarm.trainer.convert.verify.streamed import streamed
from keepwarm.trainer.errors import CheckpointError, SpecError


class Tensors(Protocol):
    """Named tensors of a folder."""

    @property
    def path(self) -> Path:
        """The folder."""

    @property
    def names(self) -> frozenset[str]:
        """Of all of them."""

    @property
    def dtypes(self) -> frozenset[str]:
        """As the safetensors format names them."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return one of them."""


class SafetensorsFolder:
    """The safetensors files that transformers would load from a folder, each opened for a moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, Path] = {}
        dtypes = set()
        for file in _files_of(path):
            try:
                with safetensors.safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - it is no mapping
                        self._files[name] = file
                        dtypes.add(str(opened.get_slice(name).get_dtype()))
            except (OSError, safetensors.SafetensorError) as error:
                raise CheckpointError(f"{file}: {error}") from error
        self.names, self.dtypes = frozenset(self._files), frozenset(dtypes)

    def tensor(self, name: str) -> torch.Tensor:
        with safetensors.safe_open(self._files[name], framework="pt") as opened:
            found: torch.Tensor = opened.get_tensor(name)
        return found


def _files_of(path: Path) -> list[Path]:
    """Return those that the index names, or the only one; publishers put copies of other layouts beside them."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    index = path / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [path / SAFE_WEIGHTS_NAME]
    try:
        return sorted({path / Path(name).name for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: no index of weights: {type(error).__name__}: {error}") from error


class HuggingFaceModel:
    """See `keepwarm.trainer.convert.verify.opened.Opened`."""

    def __init__(self, tensors: Tensors, config: Any) -> None:
        self._tensors, self._config = tensors, config
        self.vocabulary = int(config.vocab_size)
        self.context = int(getattr(config, "max_position_embeddings", None) or config.n_positions)
        self.dtypes = tensors.dtypes

    def logits(self, tokens: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        model = _built(self._config)
        names = _Names(model, self._tensors)

        def load(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            theirs = names.of(name)
            found = fitting(self._tensors.tensor(theirs), shape, f"{self._tensors.path}: {theirs}")
            return rounding.of(found)

        _fill_buffers(model, self._tensors, names, load)
        with torch.no_grad(), streamed(model, load):
            result: torch.Tensor = model(tokens[None], use_cache=False).logits[0].to(torch.float32)
        return result


def of_folder(path: Path) -> HuggingFaceModel:
    """Open a folder with a config.json and safetensors."""
    from transformers import AutoConfig

    return HuggingFaceModel(
        SafetensorsFolder(path), _read(lambda: AutoConfig.from_pretrained(path, trust_remote_code=False), path)
    )


def of_tensors(tensors: Tensors, config: Mapping[str, Any]) -> HuggingFaceModel:
    """Open tensors with the names of a class, described by the content of its config.json."""
    from transformers import AutoConfig

    fields = {name: value for name, value in config.items() if name != "model_type"}
    return HuggingFaceModel(tensors, _read(lambda: AutoConfig.for_model(config["model_type"], **fields), tensors.path))


def check_installed() -> None:
    """Raise `SpecError` unless there is a transformers that can compute here."""
    found = installed("transformers")
    if found is None or not found.split(".")[0].isdecimal() or int(found.split(".")[0]) < 5:
        raise SpecError("--verify computes with transformers 5 or newer: pip install -U 'keepwarm[hf]'")


def _read(make: Callable[[], Any], path: Path) -> Any:
    from transformers import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        return make()
    except Exception as error:  # whatever transformers says of a config
        raise CheckpointError(
            f"{path}: transformers refuses its config: {' '.join(str(error).split())[:300]}"
        ) from error


def _built(config: Any) -> Any:
    """Return the class's model with its constants, and with parameters on the meta device."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    auto: Any = AutoModelForCausalLM
    # Memory that is never touched is none.
    with no_init_weights():
        model: Any = auto.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.tie_weights()
    absent: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is not None:
                meta = nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
                module._parameters[key] = absent.setdefault(id(value), meta)
    return model.eval()


class _Names:
    """Where the parameters of a model lie in a folder; tied ones under any of their names."""

    def __init__(self, model: Any, tensors: Tensors) -> None:
        self._base = f"{model.base_model_prefix}."
        self._there = _as_in_the_class(model, tensors.names)
        named = list(model.named_parameters(remove_duplicate=False))
        shared: dict[int, list[str]] = {}
        for name, parameter in named:
            shared.setdefault(id(parameter), []).append(name)
        self._found = {name: self._first([name, *shared[id(parameter)]]) for name, parameter in named}
        lost = sorted(name for name, theirs in self._found.items() if theirs is None)
        if lost:
            raise CheckpointError(f"{tensors.path}: {lost[0]} is missing ({len(lost)} such)")
        self._check_surplus(model, tensors)

    def of(self, name: str) -> str:
        """Return the name in the folder."""
        found = self._found.get(name) or self._first([name])
        assert found is not None
        return found

    def has(self, name: str) -> bool:
        """Return whether the folder has a tensor that is no parameter."""
        return self._first([name]) is not None

    def _first(self, names: Iterable[str]) -> str | None:
        candidates = [one for name in names for one in (name, name.removeprefix(self._base))]
        return next((self._there[name] for name in candidates if name in self._there), None)

    def _check_surplus(self, model: Any, tensors: Tensors) -> None:
        ignored = [re.compile(text) for text in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        known = {*self._found, *(name for name, _ in model.named_buffers())}
        surplus = sorted(
            theirs
            for name, theirs in self._there.items()
            if name not in known and f"{self._base}{name}" not in known
            if not any(pattern.search(name) for pattern in (*ignored, _CONSTANTS))
        )
        if surplus:
            raise CheckpointError(
                f"{tensors.path}: {surplus[0]} has no place in {type(model).__name__} ({len(surplus)} such)"
            )


def _as_in_the_class(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the names of a folder by those that the class has for them, where published ones are others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    found = {}
    for theirs in names:
        name = theirs
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        found[name] = theirs
    return found


_CONSTANTS = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|masked_bias|attention\.bias)$")
"""Constants that older versions of transformers stored beside the weights."""


def _fill_buffers(
    model: Any, tensors: Tensors, names: _Names, load: Callable[[str, tuple[int, ...]], torch.Tensor]
) -> None:
    """Take stored buffers from the folder; the class has made the others."""
    stored = set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, buffer in model.named_buffers():
        if name in stored and names.has(name):
            buffer.copy_(load(name, tuple(buffer.shape)))
