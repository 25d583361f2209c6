"""Tensors of folders with fewer bits, described and read as the bfloat16 tensors that they stand for."""

from collections.abc import Mapping
from typing import Any

from keepwarm.ft.arrays import Bytes
from keepwarm.trainer.convert.huggingface import fp8, mxfp4
from keepwarm.trainer.convert.safetensors_file import ReadBytes, Stored
from keepwarm.trainer.model import quantisation


def dequantised(config: Mapping[str, Any], tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Return the tensors that a folder with this config stands for; `quantisation.refusal` has let the config pass.

    Raises:
        CheckpointError: a tensor is not stored as its config says.
    """
    match quantisation.method_of(config):
        case "fp8":
            return fp8.dequantised(config, tensors)
        case "mxfp4":
            return mxfp4.dequantised(tensors)
        case _:
            return tensors


def read_dequantised(stored: Stored, start: int, out: Bytes, read: ReadBytes) -> None:
    """Fill `out` with the bytes of a tensor that `dequantised` has returned; `read` reads those of the files."""
    match stored:
        case fp8.Scaled():
            fp8.read_scaled(stored, start, out, read)
        case mxfp4.Packed():
            mxfp4.read_packed(stored, start, out, read)
        case _:
            read(stored, start, out)
