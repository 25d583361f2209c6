"""Megatron Core's own reader and builder of token files, which ours are compared with."""

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def megatron_indexed() -> Any:
    """Return the module `megatron.core.datasets.indexed_dataset`, imported without the warnings it is known to give."""
    pytest.importorskip("megatron.core.package_info", reason="megatron-core: pip install 'keepwarm[megatron]'")
    with warnings.catch_warnings():
        for message in (
            "Transformer Engine and Apex are not installed",
            "Apex is not installed",
            "The following imports from `dynamic_context.py` will be removed",
            "`torch.jit.script(_method)?` is deprecated",
        ):
            warnings.filterwarnings("ignore", message=message)
        return importlib.import_module("megatron.core.datasets.indexed_dataset")


def build(prefix: Path, documents: Sequence[tuple[Sequence[int], Sequence[int]]], dtype: type) -> Path:
    """Write documents, each as tokens and lengths of its sequences, with Megatron Core's builder."""
    builder = megatron_indexed().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for tokens, lengths in documents:
        builder.add_document(np.array(tokens), list(lengths))
    builder.finalize(f"{prefix}.idx")
    return prefix
