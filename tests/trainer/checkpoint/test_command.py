"""`keepwarm checkpoint`: verify, show, diff and prune, on checkpoints of several layouts; weights alone into shards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import Piece
from keepwarm.ft.format.writer import write_part
from keepwarm.parallel.shard import Shard
from keepwarm.trainer.checkpoint import checkpoint, copy
from keepwarm.trainer.checkpoint.command import app
from keepwarm.trainer.checkpoint.store import opened
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.errors import CheckpointError
from tests.support.corpus import counting_source

LEDGER = Ledger(seed=1).opened({"english": 1.0}, {"english": counting_source("english", 2000)}).advanced(640).save()


def write(
    root: Path, step: int, weights: np.ndarray[Any, Any], *, ranks: int = 1, columns: bool = False, flat: bool = False,
    compress: bool = False,
) -> Path:  # fmt: skip
    """A checkpoint of one matrix and one counter; `ranks` hold rows, columns or flat ranges of the matrix."""
    root.mkdir(exist_ok=True)
    tmp, shape = publication.staging(root, 0, step), weights.shape
    tmp.mkdir()
    for rank in range(ranks):
        if flat:
            start, stop = weights.size * rank // ranks, weights.size * (rank + 1) // ranks
            piece = Piece(
                name="model.w", global_shape=shape, offsets=(0, 0), shape=shape, dtype="F32", flat=(start, stop)
            )
            local = weights.reshape(-1)[start:stop]
        else:
            dim = int(columns)
            start, stop = shape[dim] * rank // ranks, shape[dim] * (rank + 1) // ranks
            local = weights[:, start:stop] if columns else weights[start:stop]
            offsets = (0, start) if columns else (start, 0)
            piece = Piece(name="model.w", global_shape=shape, offsets=offsets, shape=local.shape, dtype="F32")
        counter = Piece(name="optimizer.step", global_shape=(), offsets=(), shape=(), dtype="I64")
        pairs = [(piece, np.ascontiguousarray(local)), (counter, np.array(step))]
        write_part(tmp, rank, pairs[: 2 if rank == 0 else 1], compress=compress)
    publication.write_manifest(
        tmp, publication.Identity(run="r", epoch=0, step=step, layout="l"), ranks=ranks, meta={"ledger": LEDGER}
    )
    publication.publish(tmp, publication.folder(root, step))
    return publication.folder(root, step)


def call(*arguments: object) -> tuple[int, dict[str, Any]]:
    ran = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=True)
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    return ran.exit_code, json.loads(ran.stdout)


WEIGHTS = np.random.default_rng(0).standard_normal((12, 10), dtype=np.float32)


def test_verify_reads_everything_and_names_damage(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = write(tmp_path / "run/checkpoints", 5, WEIGHTS)
    code, found = call("verify", tmp_path / "run")
    assert (code, found["path"], found["step"], found["bytes"]) == (0, str(path), 5, WEIGHTS.nbytes + 8)
    part = path / "rank_00000.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors.*checksum"):
        call("verify", path)
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        call("verify", tmp_path / "elsewhere")


def test_show_lists_global_shapes_and_ledger(tmp_path: Path) -> None:
    path = write(tmp_path, 7, WEIGHTS, ranks=3)
    _, found = call("show", path)
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert by_name["model.w"] == {"name": "model.w", "shape": [12, 10], "dtype": "F32", "bytes": 480, "pieces": 3}
    assert found["groups"]["model"] == {"tensors": 1, "bytes": 480}
    assert found["ledger"] == {"seed": 1, "position": 640, "segments": 1, "given": {"english": 640}}
    assert "english 640" in CliRunner().invoke(app, ["show", str(path)]).stdout


@pytest.mark.parametrize(
    "layout", [{"ranks": 4}, {"ranks": 5, "columns": True}, {"ranks": 7, "flat": True}, {"ranks": 2, "compress": True}]
)
def test_diff_compares_across_layouts(tmp_path: Path, layout: dict[str, Any]) -> None:
    one = write(tmp_path / "one", 5, WEIGHTS)
    code, found = call("diff", one, write(tmp_path / "two", 5, WEIGHTS, **layout))
    assert (code, found["equal"]) == (0, True)
    changed = WEIGHTS.copy()
    changed[11, 3] += 0.25
    code, found = call("diff", one, write(tmp_path / "three", 6, changed, **layout))
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert code == 1
    assert by_name["model.w"]["max_abs_diff"] == pytest.approx(0.25, rel=1e-6)
    assert by_name["optimizer.step"]["max_abs_diff"] == 1


def test_diff_other_shapes_are_named(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", 5, WEIGHTS), write(tmp_path / "two", 5, WEIGHTS[:8])
    code, found = call("diff", one, two)
    assert code == 1
    assert found["tensors"][0]["shapes"] == [[12, 10], [8, 10]]
    shown = CliRunner().invoke(app, ["diff", str(one), str(two)])
    assert "model.w: " in shown.stdout
    assert "[12, 10] / [8, 10]" in shown.stdout


def test_prune_keeps_newest_and_every_nth(tmp_path: Path) -> None:
    for step in (10, 20, 25, 30, 35):
        write(tmp_path, step, WEIGHTS)
    _, found = call("prune", tmp_path, "--keep", 2, "--every", 20)
    assert found["deleted"] == ["iter_0000010", "iter_0000025"]
    assert found["kept"] == ["iter_0000020", "iter_0000030", "iter_0000035"]
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        call("prune", tmp_path / "elsewhere", "--keep", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [{}, {"ranks": 3}, {"ranks": 7, "flat": True}])
def test_load_weights_fits_any_layout_and_dtype(tmp_path: Path, layout: dict[str, Any], dtype: torch.dtype) -> None:
    path = write(tmp_path, 5, WEIGHTS, **layout)
    shards = {
        name: Shard(
            name=name,
            global_shape=(12, 10),
            offsets=(4, 2),
            shape=(5, 8),
            local=torch.full((5, 8), 9.0, dtype=dtype),
            replicas=(0,),
        )
        for name in ("model.w", "optimizer.exp_avg.w")
    }
    assert checkpoint.load_weights(path, shards)["ledger"] == json.loads(json.dumps(LEDGER))
    assert torch.equal(shards["model.w"].local, torch.from_numpy(WEIGHTS[4:9, 2:10]).to(dtype))
    assert torch.equal(shards["optimizer.exp_avg.w"].local, torch.full((5, 8), 9.0, dtype=dtype))
    lost = Shard(name="model.v", global_shape=(1,), offsets=(0,), shape=(1,), local=torch.ones(1), replicas=(0,))
    with pytest.raises(CheckpointError, match=r"model\.v"):
        checkpoint.load_weights(path, {"model.v": lost})


@pytest.mark.parametrize(
    ("name", "quoted"),
    [("plain", False), ("a b", False), ("a::b", False), ("a b", True), ("a%20b", True), ("a::b", True)],
)
def test_file_url_means_its_path_in_every_command(tmp_path: Path, name: str, quoted: bool) -> None:
    """As other programs write it, percent-encoded, and as it was typed."""
    path = write(tmp_path / "run", 3, np.ones((2, 2), np.float32))
    folder = tmp_path / name
    url = folder.as_uri() if quoted else f"file://{folder}"
    if quoted:
        folder.mkdir()
    copied = copy.copy(str(path), url, lambda done, total: None)["path"]
    assert Path(copied) == folder / path.name
    for said in (f"{url}/{path.name}", url):
        assert call("verify", said)[1]["path"] == copied
        assert call("show", said)[1]["step"] == 3
        assert call("diff", said, path)[1]["equal"]
    with opened(f"{url}/{path.name}") as stored:
        assert stored.manifest.step == 3
    assert call("prune", url, "--keep", 1)[1]["kept"] == [path.name]
    again = copy.copy(f"{url}/{path.name}", str(tmp_path / "back"), lambda done, total: None)
    assert again["path"] == str(tmp_path / "back" / path.name)


def test_other_url_is_refused_with_the_command_that_copies_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", "s3://bucket/run"])
    assert isinstance(result.exception, CheckpointError)
    assert "this is a URL; keepwarm checkpoint copy brings the checkpoint here" in str(result.exception)


@pytest.mark.parametrize("cut", ["rank_00000.safetensors", "manifest.json"])
def test_damaged_newest_checkpoint_names_the_newest_older_one_that_is_whole(tmp_path: Path, cut: str) -> None:
    root = tmp_path / "run"
    whole, worse, newest = (write(root, step, np.ones((64, 64), np.float32)) for step in (1, 2, 3))
    (worse / "rank_00000.safetensors").write_bytes(b"")
    (newest / cut).write_bytes((newest / cut).read_bytes()[:-100])
    shard = Shard(
        name="model.w", global_shape=(64, 64), offsets=(0, 0), shape=(64, 64), local=torch.zeros(64, 64), replicas=(0,)
    )
    readers = {
        "verify": lambda: call("verify", root),
        "copy": lambda: copy.copy(str(root), str(tmp_path / "other"), lambda done, total: None),
        "upload": lambda: copy.copy(str(root), "memory://other", lambda done, total: None),
        "convert": lambda: _read_whole(root),
        "resume": lambda: checkpoint.load_weights(newest, {"model.w": shard}),
    }
    for name, read in readers.items():
        with pytest.raises(CheckpointError) as caught:
            read()
        assert f"the checkpoint before it, {whole}, has all of its files: give that one" in str(caught.value), name
        # A checkpoint whose manifest cannot be read is not complete: readers that choose pass over it.
        chosen = worse if cut == "manifest.json" and name != "resume" else newest
        assert f"or move {chosen} elsewhere" in str(caught.value), name


def _read_whole(root: Path) -> None:
    with NativeCheckpoint(root) as native:
        for name in native.tensors:
            list(native.blocks(name, 1 << 20))
