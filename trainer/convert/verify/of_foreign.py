"""Logits of checkpoints of DCP, torchtitan, Megatron Core and DeepSpeed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from keepwarm.trainer.convert.dcp.folder import DcpFolder
from keepwarm.trainer.convert.deepspeed.folder import DeepSpeedFolder
from keepwarm.trainer.convert.huggingface.config import config_for
from keepwarm.trainer.convert.huggingface.folder import NOTE, strict_json_file
from keepwarm.trainer.convert.importer import ImportOptions, model_type_of, spec_of
from keepwarm.trainer.convert.verify.of_huggingface import HuggingFaceModel, of_tensors
from keepwarm.trainer.convert.verify.of_megatron import megatron_logits
from keepwarm.trainer.convert.verify.of_native import canonical_logits
from keepwarm.trainer.convert.verify.of_torchtitan import torchtitan_logits
from keepwarm.trainer.convert.verify.opened import TORCH, Rounding
from keepwarm.trainer.convert.whole import Folder
from keepwarm.trainer.errors import CheckpointError
from keepwarm.trainer.model.spec import ModelSpec

_LAYERS = "decoder.layers."
_MODEL = "model."


class DcpModel:
    """A checkpoint of DCP, torchtitan or Megatron Core; see `keepwarm.trainer.convert.verify.opened.Opened`."""

    def __init__(self, path: Path, kind: str, options: ImportOptions) -> None:
        note = strict_json_file(path / NOTE) if (path / NOTE).is_file() else {}
        self._spec, self._kind = spec_of(options, note, path), kind
        self._folder = DcpFolder(path, trust_pickle=options.trust_pickle)
        self.vocabulary, self.context = self._spec.vocabulary_size, self._spec.max_sequence_length
        self.dtypes = _dtypes(self._folder, self._is_weight)
        self._stacked = f"{_LAYERS}self_attention.linear_qkv.weight" in self._folder.tensors
        for name in self._folder.tensors:
            if self._stacked and name.startswith(_LAYERS):
                self._folder.stack(name)

    def logits(self, tokens: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        names = self._folder.tensors.keys()
        with torch.no_grad():
            if self._kind == "dcp":
                return canonical_logits(
                    self._spec, lambda name: self._read(_MODEL + name), tokens, rounding, str(self._folder.path)
                )
            if self._kind == "torchtitan":
                return torchtitan_logits(self._spec, names, lambda name: rounding.of(self._read(name)), tokens)
            prefix = _LAYERS if self._stacked else f"{_LAYERS}0."
            inside = {name.removeprefix(prefix) for name in names}
            return megatron_logits(
                self._spec, inside, lambda name, layer: rounding.of(self._of_layer(name, layer)), tokens
            )

    def _of_layer(self, name: str, layer: int | None) -> torch.Tensor:
        if layer is None:
            return self._read(name)
        return self._read(_LAYERS + name, layer) if self._stacked else self._read(f"{_LAYERS}{layer}.{name}")

    def _read(self, name: str, index: int = 0) -> torch.Tensor:
        return _tensor(self._folder, name, index, is_stacked=self._stacked and name.startswith(_LAYERS))

    def _is_weight(self, name: str) -> bool:
        if self._kind == "dcp":
            return name.startswith(_MODEL)
        return not name.startswith("optimizer.") and name.endswith((".weight", ".bias", "_weight", "_bias"))


@dataclass(frozen=True)
class DeepSpeedTensors:
    """The weights of a universal checkpoint; see `keepwarm.trainer.convert.verify.of_huggingface.Tensors`."""

    folder: DeepSpeedFolder

    @property
    def path(self) -> Path:
        return self.folder.path

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(name for name in self.folder.tensors if not name.startswith("optimizer."))

    @cached_property
    def dtypes(self) -> frozenset[str]:
        return _dtypes(self.folder, self.names.__contains__)

    def tensor(self, name: str) -> torch.Tensor:
        return _tensor(self.folder, name)


def of_deepspeed(path: Path, options: ImportOptions) -> HuggingFaceModel:
    """Open a universal checkpoint, whose parameters have the names of a Hugging Face model."""
    note = strict_json_file(path / NOTE) if (path / NOTE).is_file() else {}
    return of_tensors(
        DeepSpeedTensors(DeepSpeedFolder(path, trust_pickle=options.trust_pickle)), _config(options, note, path)
    )


def _config(options: ImportOptions, note: dict[str, Any], path: Path) -> dict[str, Any]:
    if options.config is not None and options.config.suffix == ".json":
        fields = strict_json_file(options.config)
        if "model_type" in fields:
            return fields
    spec: ModelSpec = spec_of(options, note, path)
    return config_for(spec, model_type_of(options.config, note, spec))


def _dtypes(folder: Folder, is_weight: Callable[[str], bool]) -> frozenset[str]:
    return frozenset(folder.dtype(name) for name in folder.tensors if is_weight(name))


def _tensor(folder: Folder, name: str, index: int = 0, *, is_stacked: bool = False) -> torch.Tensor:
    if name not in folder.tensors:
        raise CheckpointError(f"{folder.path}: {name} is missing")
    dtype, shape = folder.dtype(name), folder.shape(name)
    if dtype not in TORCH:
        raise CheckpointError(f"{folder.path}: {name} is of dtype {dtype}, only {', '.join(TORCH)} can be")
    if is_stacked:
        shape = shape[1:]
    return torch.from_numpy(folder.unit(name, index)).view(TORCH[dtype]).reshape(shape)
