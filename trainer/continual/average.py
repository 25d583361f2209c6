"""Average weights: merge branches of one run into one model (a "soup", as in OLMo 2). Without torch.

Memory is bounded by one tensor of each branch; sums are in double precision, rounded once to the stored dtype.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.errors import FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import ITEM_SIZE, Piece
from keepwarm.ft.format.writer import write_part_blocks
from keepwarm.trainer.convert.dtypes import NAMES, as_float32, cast
from keepwarm.trainer.convert.huggingface.exporter import any_model_spec_of
from keepwarm.trainer.convert.native import PREFIX, NativeCheckpoint, Tensor
from keepwarm.trainer.convert.output_folder import new_folder
from keepwarm.trainer.data.ledger import Ledger, PastStage
from keepwarm.trainer.errors import CheckpointError, SpecError

MOVING = "average."
"""Prefix of the names of parameters' moving averages in a checkpoint."""

_ELEMENTS = 4 << 20


def average(
    runs: Sequence[Path], destination: Path, *, weights: Sequence[float] | None = None, moving: bool = False
) -> dict[str, Any]:
    """Write the checkpoint `destination` with the mean of the weights of several runs; return a summary.

    It contains only weights, and the union of the data that the runs saw, so that a job can start from it and replay.
    The same runs in the same order give the same bytes.

    Args:
        runs: checkpoints, or run folders for their newest ones.
        weights: one per run, normalised; default: all equal.
        moving: average the runs' exponential moving averages (`moving_average`) instead of their last weights.

    Raises:
        SpecError: the number of weights differs from that of runs, or one is not above 0.
        CheckpointError: a run has no complete checkpoint, or architectures or tokenizers differ.
        OutputError: `destination` exists or cannot be written; nothing is left there.
    """
    shares = _shares(runs, weights)
    with ExitStack() as stack:
        opened = [stack.enter_context(NativeCheckpoint(run)) for run in runs]
        pieces = _pieces(opened, MOVING if moving else PREFIX)
        meta = _meta(opened, shares)
        tmp = stack.enter_context(new_folder(destination))

        def blocks(piece: Piece) -> Iterable[Bytes]:
            return _mean(opened, shares, piece, MOVING + piece.name if moving else piece.name)

        try:
            part = write_part_blocks(tmp, 0, pieces, blocks)
            name = destination.resolve().name
            publication.write_manifest(
                tmp, publication.Identity(run=name, epoch=0, step=0, layout="whole"), ranks=1, meta=meta
            )
        except FtError as error:
            raise CheckpointError(str(error)) from error
    return {
        "destination": str(destination),
        "sources": [str(one.path) for one in opened],
        "weights": shares,
        "tensors": len(pieces),
        "bytes": part.data_bytes,
        "ledger": "ledger" in meta,
    }


def _shares(runs: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    given = [1.0] * len(runs) if weights is None else list(weights)
    if len(given) != len(runs) or not all(0 < weight < float("inf") for weight in given):
        raise SpecError(f"--weight: {len(runs)} runs need as many weights above 0, got {given}")
    return [weight / sum(given) for weight in given]


def _pieces(opened: Sequence[NativeCheckpoint], prefix: str) -> list[Piece]:
    """Return the parameters, which must be the same in all checkpoints."""
    kinds = [
        {name.removeprefix(MOVING): tensor for name, tensor in one.tensors.items() if name.startswith(prefix)}
        for one in opened
    ]
    for one, tensors in zip(opened, kinds, strict=True):
        if not tensors:
            raise CheckpointError(f"{one.path}: holds no {prefix}*; a moving average needs `moving_average` in the job")
        for name in sorted(kinds[0].keys() | tensors.keys()):
            shapes = [kind[name].shape if name in kind else "not there" for kind in (kinds[0], tensors)]
            if shapes[0] != shapes[1]:
                raise CheckpointError(
                    f"{one.path} is of another architecture than {opened[0].path}: "
                    f"{name} is {shapes[1]} in it, {shapes[0]} there"
                )
    for name, tensor in kinds[0].items():
        if tensor.dtype not in NAMES:
            raise CheckpointError(
                f"{opened[0].path}: {name} is of dtype {tensor.dtype}, only {', '.join(NAMES)} can be"
            )
    return [_whole(name, tensor) for name, tensor in sorted(kinds[0].items())]


def _whole(name: str, tensor: Tensor) -> Piece:
    origin = (0,) * len(tensor.shape)
    return Piece(name=name, global_shape=tensor.shape, offsets=origin, shape=tensor.shape, dtype=tensor.dtype)


def _mean(opened: Sequence[NativeCheckpoint], shares: Sequence[float], piece: Piece, stored: str) -> Iterable[Bytes]:
    blocks = (one.blocks(stored, _ELEMENTS * ITEM_SIZE[one.dtype(stored)]) for one in opened)
    for each in zip(*blocks, strict=True):
        mean: npt.NDArray[np.float64] = np.zeros(len(each[0]) // ITEM_SIZE[opened[0].dtype(stored)])
        for one, share, block in zip(opened, shares, each, strict=True):
            mean += share * as_float32(block, one.dtype(stored)).astype(np.float64)
        yield cast(mean.astype(np.float32).view(np.uint8), "F32", piece.dtype, piece.name)


def _meta(opened: Sequence[NativeCheckpoint], shares: Sequence[float]) -> dict[str, Any]:
    metas = [one.manifest.meta for one in opened]
    tokenizers = [(meta.get("run") or {}).get("tokenizer") for meta in metas]
    for one, tokenizer in zip(opened, tokenizers, strict=True):
        if None not in (tokenizers[0], tokenizer) and tokenizer != tokenizers[0]:
            raise CheckpointError(f"{one.path} was trained with another tokenizer than {opened[0].path}")
    parents = [
        {"path": str(one.path), "run": one.manifest.run, "step": one.manifest.step, "share": share}
        for one, share in zip(opened, shares, strict=True)
    ]
    ledger = _merged([(one.manifest.run, meta.get("ledger")) for one, meta in zip(opened, metas, strict=True)])
    return {
        "weights_only": True,
        "note": f"mean of the weights of {len(opened)} checkpoints: no optimizer state",
        "model": any_model_spec_of(opened[0]).model_dump(mode="json"),
        "run": {"tokenizer": next((found for found in tokenizers if found is not None), None)},
        "averaged": parents,
    } | ({} if ledger is None else {"ledger": ledger.save()})


def _merged(saved: Sequence[tuple[str, Mapping[str, Any] | None]]) -> Ledger | None:
    """Return the union of what the runs saw, each stage once; None if a run has no ledger or numbers samples
    differently.
    """
    ledgers = [Ledger.load(ledger).continued(run) for run, ledger in saved if ledger is not None]
    if len(ledgers) < len(saved) or len({ledger.seed for ledger in ledgers}) > 1:
        return None
    stages: dict[PastStage, None] = {}
    for ledger in ledgers:
        stages |= dict.fromkeys(ledger.past)
    sources = {identity: origin for ledger in ledgers for identity, origin in ledger.sources.items()}
    return msgspec.structs.replace(ledgers[0], sources=sources, past=tuple(stages))
