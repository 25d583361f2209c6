"""Durable checkpoints of live shards: any layout loads any layout, damage is named."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.ft.format.writer import write_part
from keepwarm.ft.worker.snapshotter import piece_of
from keepwarm.parallel.shard import Shard
from keepwarm.trainer.checkpoint import checkpoint
from keepwarm.trainer.checkpoint.checkpoint import Checkpoints
from keepwarm.trainer.checkpoint.own_part import host_bytes
from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.errors import CheckpointError, StateNotSaved
from keepwarm.trainer.job.sections import CheckpointSpec
from tests.support.ranks import run_ranks

SECOND = r"rank_00001.safetensors"
ONE_RANK = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def shard(name: str, whole: torch.Tensor, rows: slice, columns: slice) -> Shard:
    local = whole[rows, columns].clone()
    offsets = (rows.start or 0, columns.start or 0)
    return Shard(
        name=name,
        global_shape=tuple(whole.shape),
        offsets=offsets,
        shape=tuple(local.shape),
        local=local,
        replicas=(0,),
    )


def checkpoints(root: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(root, CheckpointSpec(keep=keep), ONE_RANK, run="run", layout="any")


def whole_of(name: str, tensor: torch.Tensor) -> dict[str, Shard]:
    return {name: shard(name, tensor, slice(None), slice(None))}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_load_any_part_of_a_tensor_comes_from_the_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = torch.arange(35).reshape(5, 7).to(dtype)
    path = checkpoints(tmp_path).save(3, whole_of("w", weights), {"note": 1})
    for rows in (slice(0, 5), slice(1, 4), slice(4, 5), slice(2, 2)):
        for columns in (slice(0, 7), slice(3, 5)):
            part = shard("w", torch.zeros_like(weights), rows, columns)
            assert checkpoint.load(path, {"w": part}) == {"note": 1}
            assert torch.equal(part.local, weights[rows, columns])


def test_save_scalars_and_strided_locals_are_kept(tmp_path: Path) -> None:
    counter = torch.tensor(7.0)
    transposed = torch.arange(6.0).reshape(2, 3).t()
    shards = {
        "c": Shard(name="c", global_shape=(), offsets=(), shape=(), local=counter, replicas=(0,)),
        "t": Shard(name="t", global_shape=(3, 2), offsets=(0, 0), shape=(3, 2), local=transposed, replicas=(0,)),
    }
    expected = transposed.clone()
    path = checkpoints(tmp_path).save(1, shards, {})
    counter.zero_()
    transposed.zero_()
    checkpoint.load(path, shards)
    assert counter.item() == 7.0
    assert torch.equal(transposed, expected)


def save_in_own_epoch(folder: Path) -> int:
    """Each rank has heard of another epoch, and holds one row."""
    rank = dist.get_rank()
    world = World(rank=rank, size=2, local_rank=rank, device=torch.device("cpu"))
    saver = Checkpoints(folder, CheckpointSpec(), world, run="tiny", layout="l")
    saver.epoch = 2 - rank
    own = replace(shard("w", torch.full((2, 3), float(rank)), slice(rank, rank + 1), slice(0, 3)), replicas=(rank,))
    return read_manifest(saver.save(1, {"w": own}, {})).epoch


@pytest.mark.dist
def test_save_ranks_with_different_epochs_save_together(tmp_path: Path) -> None:
    assert run_ranks(2, save_in_own_epoch, tmp_path) == [2, 2]


def test_save_keeps_newest_and_latest_names_the_last(tmp_path: Path) -> None:
    saver = checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        saver.save(step, whole_of("w", torch.full((2, 2), float(step))), {})
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["iter_0000002", "iter_0000003", "latest"]
    assert saver.latest() == tmp_path / "iter_0000003"


def test_load_flipped_bit_is_refused_with_file_name(tmp_path: Path) -> None:
    path = checkpoints(tmp_path).save(1, whole_of("w", torch.ones(4, 4)), {})
    file = path / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors.*checksum"):
        checkpoint.load(path, whole_of("w", torch.zeros(4, 4)))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads((path / "manifest.json").read_text())
    change(table)
    (path / "manifest.json").write_text(json.dumps(table))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: os.truncate(p / SECOND, (p / SECOND).stat().st_size - 1), SECOND + ": ends 1 bytes too"),
    "empty": (lambda p: os.truncate(p / SECOND, 0), SECOND + ": ends"),
    "missing shard": (lambda p: (p / SECOND).unlink(), SECOND + ": missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"manifest\.json: missing; .* never completed"),
    "half a manifest": (lambda p: os.truncate(p / "manifest.json", 100), r"manifest\.json: "),
    "foreign version": (
        lambda p: edit(p, lambda m: m.update(version=2)),
        r"manifest\.json: format version 2",
    ),
    "a field nobody knows": (lambda p: edit(p, lambda m: m.update(extra=2)), r"manifest\.json: .*extra"),
    "a part elsewhere": (
        lambda p: edit(p, lambda m: m["parts"][1].update(file="../../rank_00001.safetensors")),
        r"manifest\.json: '\.\./\.\./rank_00001",
    ),
    "a lie about the header": (
        lambda p: edit(p, lambda m: m["parts"][1].update(header_bytes=2**40)),
        SECOND + ": ",
    ),
    "a lie about the size": (
        lambda p: edit(p, lambda m: m["parts"][1]["entries"][0].update(stop=2**40)),
        r"manifest\.json: rank_00001.* has 1099511627776 bytes instead of 32",
    ),
    "a piece lost": (
        lambda p: edit(p, lambda m: m["parts"][1]["entries"].clear()),
        "w",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_load_damage_is_refused_with_file_name(tmp_path: Path, damage: str) -> None:
    tmp = publication.staging(tmp_path, 0, 1)
    tmp.mkdir()
    whole = torch.arange(16.0).reshape(4, 4)
    for rank in range(2):
        row = shard("w", whole, slice(2 * rank, 2 * rank + 2), slice(0, 4))
        write_part(tmp, rank, [(piece_of(row), host_bytes(row.local))])
    publication.write_manifest(tmp, publication.Identity(run="r", epoch=0, step=1, layout="l"), ranks=2, meta={})
    live = whole_of("w", torch.zeros(4, 4))
    checkpoint.load(tmp, live)
    assert torch.equal(live["w"].local, whole)
    harm, message = DAMAGE[damage]
    harm(tmp)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp, whole_of("w", torch.zeros(4, 4)))


def test_load_state_of_another_model_is_refused(tmp_path: Path) -> None:
    path = checkpoints(tmp_path).save(1, whole_of("w", torch.ones(4, 4)), {})
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load(path, whole_of("w", torch.zeros(4, 5)))
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.load(path, whole_of("missing", torch.zeros(1, 1)))


def test_save_unwritable_folder_is_a_state_that_is_not_saved(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(StateNotSaved, match="checkpoint to"):
        checkpoints(tmp_path / "checkpoints").save(1, whole_of("w", torch.ones(1, 1)), {})


@pytest.mark.parametrize("kind", ["kill", "error"])
@pytest.mark.parametrize("what", ["new", "same"])
def test_save_any_fault_leaves_previous_checkpoint_intact(tmp_path: Path, kind: str, what: str) -> None:
    command = [sys.executable, "-m", "tests.support.faulty.save", kind, what, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr[-3000:]
    # Part, manifest and `latest` are written, synced and renamed each, then the old one is deleted.
    assert int(ran.stdout) > 12
