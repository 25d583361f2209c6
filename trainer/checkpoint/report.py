"""Contents of a checkpoint, and differences between two. Torch-free; memory is bounded by the largest tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import ITEM_SIZE
from keepwarm.ft.format.manifest import MANIFEST
from keepwarm.trainer.convert.dtypes import as_float32
from keepwarm.trainer.convert.huggingface.importer import FILES, file_sum
from keepwarm.trainer.convert.native import NativeCheckpoint, find_checkpoint, with_older
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.errors import CheckpointError

Progress = Callable[[int, int], object]
"""Called with the bytes read so far and the size of the whole checkpoint."""

_ELEMENTS = 4 << 20
_NUMPY = {
    "F64": "f8", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U64": "u8", "U32": "u4", "U16": "u2",
}  # fmt: skip


def verify(path: Path, progress: Progress) -> dict[str, Any]:
    """Read every byte of the checkpoint that `path` refers to and compare it with the manifest.

    Raises:
        CheckpointError: something is missing or damaged; names the file and the tensor.
    """
    found = find_checkpoint(path)
    try:
        manifest = publication.verify(found, progress)
    except FtError as error:
        raise CheckpointError(with_older(error, found)) from error
    carried = (manifest.meta.get(FILES) or {}).get("files", {})
    for name, expected in carried.items():
        if Path(name).name != name or file_sum(found / FILES / name) != expected:
            raise CheckpointError(f"{found / FILES / name}: does not match its checksum in {MANIFEST}")
    return {
        "path": str(found),
        "step": manifest.step,
        "files": len(manifest.parts) + len(carried),
        "pieces": sum(len(part.entries) for part in manifest.parts),
        "bytes": sum(part.data_bytes for part in manifest.parts),
    }


def show(path: Path) -> dict[str, Any]:
    """Return identity, tensors with their global shapes, parts, and a summary of the ledger, without reading
    the data."""
    with NativeCheckpoint(path) as native:
        manifest = native.manifest
        tensors = [
            {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "bytes": tensor.bytes,
                "pieces": len(tensor.pieces),
            }
            for name, tensor in sorted(native.tensors.items())
        ]
        groups: dict[str, dict[str, int]] = {}
        for name, tensor in native.tensors.items():
            group = groups.setdefault(name.split(".")[0], {"tensors": 0, "bytes": 0})
            group["tensors"] += 1
            group["bytes"] += tensor.bytes
        return {
            "path": str(native.path),
            "run": manifest.run,
            "epoch": manifest.epoch,
            "step": manifest.step,
            "layout": manifest.layout,
            "parts": [
                {"file": part.file, "pieces": len(part.entries), "bytes": part.data_bytes} for part in manifest.parts
            ],
            "groups": groups,
            "tensors": tensors,
            "parent": manifest.meta.get("parent"),
            "ledger": _ledger(manifest.meta.get("ledger")),
        }


def diff(one: Path, two: Path) -> dict[str, Any]:
    """Compare names, shapes, dtypes and values of two checkpoints, tensor by tensor, independent of their layouts."""
    with NativeCheckpoint(one) as a, NativeCheckpoint(two) as b:
        shared = sorted(a.tensors.keys() & b.tensors.keys())
        tensors = [_difference(a, b, name) for name in shared]
        only = [sorted(x.tensors.keys() - y.tensors.keys()) for x, y in ((a, b), (b, a))]
        return {
            "one": str(a.path),
            "two": str(b.path),
            "equal": not only[0] and not only[1] and all(tensor["equal"] for tensor in tensors),
            "only_in_one": only[0],
            "only_in_two": only[1],
            "tensors": tensors,
        }


def _difference(a: NativeCheckpoint, b: NativeCheckpoint, name: str) -> dict[str, Any]:
    left, right = a.tensors[name], b.tensors[name]
    found: dict[str, Any] = {
        "name": name,
        "equal": False,
        "shapes": [list(left.shape), list(right.shape)],
        "dtypes": [left.dtype, right.dtype],
        "max_abs_diff": None,
    }
    if left.shape != right.shape:
        return found
    equal, worst = left.dtype == right.dtype, 0.0
    blocks = (side.blocks(name, _ELEMENTS * ITEM_SIZE[side.dtype(name)]) for side in (a, b))
    for x, y in zip(*blocks, strict=True):
        if left.dtype == right.dtype and np.array_equal(x, y):
            continue
        equal = False
        with np.errstate(invalid="ignore"):
            far = np.abs(_values(x, left.dtype) - _values(y, right.dtype))
        # Infinities of the same sign, and NaNs on both sides, subtract to NaN; their difference counts as zero.
        worst = max(worst, float(np.nanmax(far, initial=0.0)))
    return found | {"equal": equal, "max_abs_diff": worst}


def _values(block: Bytes, dtype: str) -> npt.NDArray[np.float64]:
    if dtype in ("F32", "BF16", "F16"):
        return as_float32(block, dtype).astype(np.float64)
    return block.view(_NUMPY.get(dtype, "u1")).astype(np.float64)


def _ledger(saved: Any) -> dict[str, Any] | None:
    """Return the number of samples that each source has given, by its name in the job."""
    if saved is None:
        return None
    ledger = Ledger.load(saved)
    labels = ledger.labels()
    return {
        "seed": ledger.seed,
        "position": ledger.position,
        "segments": len(ledger.segments),
        "given": {labels[identity]: given.consumed for identity, given in ledger.given().items()},
    }
