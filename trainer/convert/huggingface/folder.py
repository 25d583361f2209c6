"""A Hugging Face model folder: config, tensors in one or several safetensors files, and what lies beside them."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from keepwarm.ft.arrays import Bytes
from keepwarm.trainer.convert.huggingface.quantised import dequantised, read_dequantised
from keepwarm.trainer.convert.safetensors_file import Stored, read_exactly, read_tensors, strict_json
from keepwarm.trainer.errors import CheckpointError
from keepwarm.trainer.model import quantisation

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NOTE = "keepwarm.json"
"""What an export says about its parent; never carried back."""

_SHARD = re.compile(r"[^/\\\0.][^/\\\0]*\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CARRIED = (".json", ".jinja", ".model", ".txt", ".md", ".tiktoken")
_CARRIED_NAMES = ("LICENSE", "NOTICE")
_JSON_LIMIT = 256 << 20
_NOT_CARRIED = (CONFIG, INDEX, NOTE, "pytorch_model.bin.index.json")


class HuggingFaceFolder:
    """An open folder, as a `Source` of its tensors; a context manager that closes its files.

    Raises:
        CheckpointError: a file is missing, pickled, truncated, outside the folder or contradicts the index or another
            file; names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"{path}: not a folder; give a Hugging Face model folder with {CONFIG}")
        self.config = strict_json_file(path / CONFIG)
        self.tensors = self._find_tensors()
        reason = quantisation.refusal(self.config)
        if reason is not None:
            raise CheckpointError(f"{path / CONFIG}: {reason}")
        self.tensors = dequantised(self.config, self.tensors)
        self.config = quantisation.without(self.config)
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> "HuggingFaceFolder":
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def dtype(self, name: str) -> str:
        return self._stored(name).dtype

    def read(self, name: str, start: int, out: Bytes) -> None:
        """See `keepwarm.trainer.convert.streaming.Source`."""
        read_dequantised(self._stored(name), start, out, self._read)

    def _read(self, stored: Stored, start: int, out: Bytes) -> None:
        if stored.file not in self._descriptors:
            self._descriptors[stored.file] = os.open(stored.file, os.O_RDONLY)
        read_exactly(self._descriptors[stored.file], stored.file, stored.start + start, out)

    def same(self, one: str, two: str) -> bool:
        """Whether two tensors hold the same bytes."""
        a, b = self._stored(one), self._stored(two)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        left, right = (np.empty(min(a.size, 4 << 20), np.uint8) for _ in range(2))
        for start in range(0, a.size, 4 << 20):
            count = min(a.size - start, len(left))
            self.read(one, start, left[:count])
            self.read(two, start, right[:count])
            if not np.array_equal(left[:count], right[:count]):
                return False
        return True

    def beside(self) -> tuple[list[str], list[str]]:
        """Names of the other entries: those to carry along (tokenizer, generation defaults, licence), and the rest."""
        weights = {stored.file.name for stored in self.tensors.values()}
        carried: list[str] = []
        left: list[str] = []
        for path in sorted(self.path.iterdir()):
            if path.name.startswith(".") or path.name in weights or path.name in _NOT_CARRIED:
                continue
            wanted = path.suffix in _CARRIED or path.name in _CARRIED_NAMES
            (carried if wanted and path.is_file() else left).append(path.name)
        return carried, left

    def _stored(self, name: str) -> Stored:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: {name} is missing")
        return self.tensors[name]

    def _find_tensors(self) -> dict[str, Stored]:
        single, index = self.path / SINGLE, self.path / INDEX
        if index.exists():
            tensors = self._indexed(index)
            if single.exists() and SINGLE not in {stored.file.name for stored in tensors.values()}:
                raise CheckpointError(f"{single}: {INDEX} does not name it; delete the one that is out of date")
            return tensors
        if single.exists():
            return read_tensors(single)
        pickled = sorted(path.name for path in self.path.iterdir() if path.suffix in _PICKLED)
        if pickled:
            raise CheckpointError(
                f"{self.path / pickled[0]}: weights in a pickle, which can run any code when it is read, are refused; "
                "save them with transformers' save_pretrained, which writes safetensors"
            )
        raise CheckpointError(f"{self.path}: holds neither {SINGLE} nor {INDEX}")

    def _indexed(self, index: Path) -> dict[str, Stored]:
        places = strict_json_file(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise CheckpointError(f"{index}: weight_map is missing")
        tensors: dict[str, Stored] = {}
        for file in sorted({str(file) for file in places.values()}):
            if not _SHARD.fullmatch(file):
                raise CheckpointError(f"{index}: {file!r} is not the name of a safetensors file in this folder")
            if not (self.path / file).is_file():
                raise CheckpointError(f"{self.path / file}: missing, {INDEX} names it")
            for name, stored in read_tensors(self.path / file).items():
                if name in tensors:
                    raise CheckpointError(f"{self.path / file}: {name} stands in {tensors[name].file.name} too")
                if places.get(name) != file:
                    raise CheckpointError(f"{self.path / file}: holds {name}, {INDEX} says {places.get(name)}")
                tensors[name] = stored
        lost = sorted(set(places) - set(tensors))
        if lost:
            raise CheckpointError(f"{self.path / places[lost[0]]}: {lost[0]} is missing, {INDEX} says it is there")
        return tensors


def strict_json_file(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError` naming it."""
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, more than a JSON file here can have")
        return strict_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def dump_config(config: dict[str, Any]) -> bytes:
    """A config.json as `transformers` formats it."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
