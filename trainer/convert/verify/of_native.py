"""Logits of keepwarm's own checkpoints, by the model that trains on them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from keepwarm.trainer.convert.huggingface.exporter import any_model_spec_of, check_tensors
from keepwarm.trainer.convert.native import PREFIX, NativeCheckpoint
from keepwarm.trainer.convert.verify.opened import TORCH, Rounding, fitting
from keepwarm.trainer.convert.verify.streamed import streamed
from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.make import make_model

Read = Callable[[str], torch.Tensor]
"""Return a parameter by its canonical name."""


class NativeModel:
    """See `keepwarm.trainer.convert.verify.opened.Opened`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with NativeCheckpoint(path) as native:
            self._spec = any_model_spec_of(native)
            check_tensors(native, self._spec)
            weights = {tensor.dtype for name, tensor in native.tensors.items() if name.startswith(PREFIX)}
        self.vocabulary, self.context = self._spec.vocabulary_size, self._spec.max_sequence_length
        self.dtypes = frozenset(weights)

    def logits(self, tokens: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        with NativeCheckpoint(self._path) as native:

            def read(name: str) -> torch.Tensor:
                tensor = native.tensors[PREFIX + name]
                out = np.empty(tensor.bytes, np.uint8)
                native.read(PREFIX + name, 0, out)
                return torch.from_numpy(out).view(TORCH[tensor.dtype]).reshape(tensor.shape)

            return canonical_logits(self._spec, read, tokens, rounding, str(native.path))


def canonical_logits(
    spec: AnyModelSpec, read: Read, tokens: torch.Tensor, rounding: Rounding, where: str
) -> torch.Tensor:
    """Return the logits of a model whose parameters have canonical names."""
    parts = make_model(spec, 0)
    with torch.device("meta"):
        stage = parts.build_stage(range(spec.layers), embed=True, head=True).eval()

    def load(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        name = parts.canonical(name)
        return rounding.of(fitting(read(name), shape, f"{where}: {name}"))

    with torch.no_grad(), streamed(stage, load):
        result: torch.Tensor = stage(tokens[None])[0].to(torch.float32)
    return result
