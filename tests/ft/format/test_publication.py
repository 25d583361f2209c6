"""The checkpoint format: readable by the safetensors library, complete or absent, damage always named."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keepwarm.ft.errors import DurableError
from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import Piece, as_bytes
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.ft.format.writer import age_notes, write_part
from tests.support.checkpoint_bytes import stored_bytes


def tensors(rank: int) -> list[tuple[Piece, Any]]:
    random = np.random.default_rng(rank)
    return [
        (
            Piece(name="model.w", global_shape=(8, 3), offsets=(4 * rank, 0), shape=(4, 3), dtype="F32"),
            random.standard_normal((4, 3), dtype=np.float32),
        ),
        (
            Piece(name="b", global_shape=(9,), offsets=(0,), shape=(9,), dtype="BF16", flat=(4 * rank, 5 + 4 * rank)),
            random.integers(0, 2**16, 5, np.uint16),
        ),
        (Piece(name="step", global_shape=(), offsets=(), shape=(), dtype="I64"), np.array(7 + rank)),
        (Piece(name="empty", global_shape=(0, 4), offsets=(0, 0), shape=(0, 4), dtype="F32"), b""),
    ]  # fmt: skip


def checkpoint(root: Path, epoch: int = 0, step: int = 100, compress: bool = False) -> Path:
    root.mkdir(exist_ok=True)
    tmp = publication.staging(root, epoch, step)
    tmp.mkdir()
    for rank in (0, 1):
        write_part(tmp, rank, tensors(rank), compress=compress)
    publication.write_manifest(
        tmp, publication.Identity(run="r", epoch=epoch, step=step, layout="l"), ranks=2, meta={"tokens": 5}
    )
    publication.verify(tmp)
    return tmp


@pytest.mark.parametrize("compress", [False, True])
def test_checkpoint_written_is_read_back(tmp_path: Path, compress: bool) -> None:
    folder = checkpoint(tmp_path, compress=compress)
    manifest = publication.verify(folder)
    assert (manifest.epoch, manifest.step, manifest.meta) == (0, 100, {"tokens": 5})
    for rank, part in enumerate(manifest.parts):
        assert part.compressed == compress
        stored = stored_bytes(folder, part)
        for piece, data in tensors(rank):
            assert stored[piece.name] == as_bytes(data).tobytes()
            assert piece in [entry.piece for entry in part.entries]


def test_checkpoint_part_is_read_by_safetensors_library(tmp_path: Path) -> None:
    part = write_part(tmp_path, 0, [t for t in tensors(0) if t[0].dtype != "BF16"])
    loaded = safetensors.numpy.load_file(tmp_path / part.file)
    assert loaded["model.w"].tolist() == tensors(0)[0][1].tolist()
    assert loaded["step"] == 7
    assert loaded["empty"].shape == (0, 4)


def content_unharmed(bad: bytes, good: bytes) -> bool:
    """Some bits of a zstandard frame, its own trailing checksum for one, are not needed to get the content back."""
    try:
        one, two = (zstandard.ZstdDecompressor().stream_reader(x).read(1 << 20) for x in (bad, good))
    except zstandard.ZstdError:
        return False
    return bool(one == two)


@pytest.mark.parametrize(("umask", "mode"), [(0o027, 0o640), (0o077, 0o600)])
def test_checkpoint_files_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        folder = checkpoint(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}


@pytest.mark.parametrize("compress", [False, True])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_checkpoint_any_damage_is_found(tmp_path: Path, compress: bool, where: float, flip: int, cut: bool) -> None:
    folder = publication.staging(tmp_path, 0, 100)
    if not folder.exists():
        checkpoint(tmp_path, compress=compress)
    path = next(folder.glob("rank_00001*"))
    good = path.read_bytes()
    at = int(where * len(good))
    bad = good[:at] if cut else good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :]
    path.write_bytes(bad)
    try:
        if compress and content_unharmed(bad, good):
            publication.verify(folder)
        else:
            with pytest.raises(DurableError, match="rank_00001"):
                publication.verify(folder)
    finally:
        path.write_bytes(good)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=64) | st.builds(lambda n, b: n.to_bytes(8, "little") + b, st.integers(0, 2**64 - 1), st.binary())
)
def test_checkpoint_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rank_00000.safetensors").write_bytes(content)
    with pytest.raises(DurableError, match="rank_00000"):
        publication.write_manifest(
            tmp_path, publication.Identity(run="r", epoch=0, step=1, layout="l"), ranks=1, meta={}
        )


def test_checkpoint_missing_part_is_named(tmp_path: Path) -> None:
    write_part(tmp_path, 0, tensors(0))
    with pytest.raises(DurableError, match="0 parts of rank 1"):
        publication.write_manifest(
            tmp_path, publication.Identity(run="r", epoch=0, step=1, layout="l"), ranks=2, meta={}
        )


def test_manifest_other_file_names_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"][0]["file"] = "../../rank_00000.safetensors"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DurableError, match="not the name of a part"):
        read_manifest(folder)


def test_latest_only_moves_forward(tmp_path: Path) -> None:
    def publish(epoch: int, step: int) -> bool:
        return publication.publish(checkpoint(tmp_path, epoch, step), publication.folder(tmp_path, step))

    assert publish(0, 100)
    assert publish(0, 200)
    assert not publish(0, 150)
    assert publication.latest(tmp_path) == tmp_path / "iter_0000200"
    assert publish(1, 120)
    assert publication.latest(tmp_path) == tmp_path / "iter_0000120"
    assert publish(1, 200)
    assert not publish(0, 200)
    assert read_manifest(tmp_path / "iter_0000200").epoch == 1
    assert (tmp_path / "latest").read_text() == "iter_0000200\n"


def test_latest_unusable_falls_back_to_newest_complete(tmp_path: Path) -> None:
    for step in (100, 200):
        publication.publish(checkpoint(tmp_path, 0, step), publication.folder(tmp_path, step))
    (tmp_path / "iter_0000300").mkdir()
    for content in ("iter_0000300\n", "../elsewhere\n", ""):
        (tmp_path / "latest").write_text(content)
        assert publication.latest(tmp_path) == tmp_path / "iter_0000200"


def test_prune_keeps_by_count_and_interval(tmp_path: Path) -> None:
    for step in (100, 150, 200, 250, 300):
        publication.publish(checkpoint(tmp_path, 0, step), publication.folder(tmp_path, step))
    gone = publication.prune(tmp_path, keep=1, every=200)
    assert [path.name for path in gone] == ["iter_0000100", "iter_0000150", "iter_0000250"]
    assert [path.name for path in publication.checkpoints(tmp_path)] == ["iter_0000200", "iter_0000300"]


def test_sweep_interrupted_writers_leave_nothing(tmp_path: Path) -> None:
    left = checkpoint(tmp_path)
    publication.publish(checkpoint(tmp_path, 0, 200), publication.folder(tmp_path, 200))
    assert publication.sweep(tmp_path) == [left]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["iter_0000200"]


def test_latest_is_the_largest_whatever_the_file_says(tmp_path: Path) -> None:
    for epoch, step in ((1, 100), (2, 50), (1, 200)):
        publication.publish(checkpoint(tmp_path, epoch, step), publication.folder(tmp_path, step))
    (tmp_path / "latest").write_text("iter_0000200\n")
    assert publication.latest(tmp_path) == tmp_path / "iter_0000050"
    assert publication.newest_epoch(tmp_path) == 2
    (tmp_path / "iter_0000050" / "manifest.json").write_bytes(b"{")
    assert publication.latest(tmp_path) == tmp_path / "iter_0000200"


def test_age_is_read_from_the_beginning_of_any_manifest(tmp_path: Path) -> None:
    folder = publication.folder(tmp_path, 7)
    folder.mkdir()
    for run in ("plain", 'quo"te \\" and back\\\\', "ü" * 100, "x" * 8000):
        publication.write_manifest(
            folder, publication.Identity(run=run, epoch=3, step=7, layout="l"), ranks=0, meta={"epoch": 9}
        )
        assert publication.published(tmp_path, 3, 7)
        assert not publication.published(tmp_path, 4, 7)


def test_published_checkpoint_is_not_pruned_even_if_its_epoch_went_back(tmp_path: Path) -> None:
    for step in (90, 100):
        publication.publish(checkpoint(tmp_path, 4, step), publication.folder(tmp_path, step))
    final = publication.folder(tmp_path, 110)
    assert not publication.publish(checkpoint(tmp_path, 1, 110), final)
    publication.prune(tmp_path, keep=2, published=final)
    assert [path.name for path in publication.checkpoints(tmp_path)] == [
        "iter_0000110",
        "iter_0000090",
        "iter_0000100",
    ]


def test_publish_older_epoch_does_not_replace_the_same_step(tmp_path: Path) -> None:
    for epoch, step in ((5, 100), (5, 200)):
        publication.publish(checkpoint(tmp_path, epoch, step), publication.folder(tmp_path, step))
    assert not publication.publish(checkpoint(tmp_path, 3, 100), publication.folder(tmp_path, 100))
    assert read_manifest(publication.folder(tmp_path, 100)).epoch == 5


def test_part_of_another_step_is_refused(tmp_path: Path) -> None:
    identity = publication.Identity(run="r", epoch=2, step=100, layout="l")
    for rank, step in ((0, 100), (1, 90)):
        write_part(tmp_path, rank, tensors(rank), meta=age_notes(2, step))
    with pytest.raises(DurableError, match=r"rank_00001.*is of epoch 2 and step 90, its checkpoint of epoch 2 and"):
        publication.write_manifest(tmp_path, identity, ranks=2, meta={})
    write_part(tmp_path, 1, tensors(1), meta=age_notes(2, 100))
    manifest = publication.write_manifest(tmp_path, identity, ranks=2, meta={})
    assert {(part.epoch, part.step) for part in manifest.parts} == {(2, 100)}
    publication.verify(tmp_path)
    text = (tmp_path / "manifest.json").read_text().replace('"step": 100', '"step": 101', 1)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DurableError, match="is of epoch 2 and step 100"):
        read_manifest(tmp_path)
