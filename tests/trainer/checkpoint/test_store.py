"""Checkpoints at URLs: any layout loads them, reading the bytes it needs; half of an upload is no checkpoint."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from typer.testing import CliRunner

from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import CHUNK, read_manifest
from keepwarm.ft.format.writer import write_part
from keepwarm.ft.worker.snapshotter import piece_of
from keepwarm.parallel.shard import Shard
from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.checkpoint import checkpoint
from keepwarm.trainer.checkpoint.command import app
from keepwarm.trainer.checkpoint.copy import copy, find
from keepwarm.trainer.checkpoint.own_part import host_bytes
from keepwarm.trainer.errors import CheckpointError, OutputError, TrainerError
from keepwarm.trainer.model.spec import ModelSpec
from tests.support.layouts import Case, shards_of, whole_state, write_checkpoint

MODEL = ModelSpec(
    layers=2, hidden_size=16, heads=4, ffn_size=24, vocabulary_size=24, max_sequence_length=8, qkv_bias=True
)
ROWS = 3000
"""Of a matrix of 24 MB: six chunks."""


def no_progress(done: int, total: int) -> None:
    assert done <= total


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder of fsspec's memory filesystem for one test."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    files = fsspec.filesystem("memory")
    if files.exists(url):
        files.rm(url, recursive=True)


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    return memory if request.param == "memory" else (tmp_path / "remote").as_uri()


def large(root: Path, compress: bool = False) -> tuple[Path, torch.Tensor]:
    """A checkpoint of one rank with one matrix of several chunks."""
    matrix = torch.randn(ROWS, 2000, generator=torch.Generator().manual_seed(3))
    root.mkdir(exist_ok=True)
    tmp = publication.staging(root, 0, 4)
    tmp.mkdir()
    whole = rows(matrix, 0, ROWS)
    write_part(tmp, 0, [(piece_of(whole), host_bytes(whole.local))], compress=compress)
    publication.write_manifest(
        tmp, publication.Identity(run="r", epoch=0, step=4, layout="l"), ranks=1, meta={"note": 1}
    )
    publication.publish(tmp, publication.folder(root, 4))
    return publication.folder(root, 4), matrix


def rows(matrix: torch.Tensor, start: int, stop: int) -> Shard:
    return Shard(
        name="model.w",
        global_shape=tuple(matrix.shape),
        offsets=(start, 0),
        shape=(stop - start, matrix.shape[1]),
        local=matrix[start:stop].clone(),
        replicas=(0,),
    )


@pytest.mark.parametrize("target", [{"tensor": 4}, {"pipeline": 2, "data": 2}])
def test_store_any_layout_loads_any_other_from_url(tmp_path: Path, url: str, target: dict[str, int]) -> None:
    state = whole_state(MODEL, seed=5)
    written = Case(spec=ParallelSpec(tensor=2, data=2))
    write_checkpoint(tmp_path / "run/checkpoints", MODEL, written, state, {"ledger": {"seed": 7}})
    done = copy(str(tmp_path / "run"), url, no_progress)
    assert find(url) == done["path"] == f"{url.removeprefix('file://')}/iter_0000001"
    case = Case(spec=ParallelSpec(**target))
    for rank in range(case.layout.world_size):
        shards = shards_of(rank, MODEL, case, None)
        assert checkpoint.load(find(url), shards) == {"ledger": {"seed": 7}}
        expected = shards_of(rank, MODEL, case, state)
        assert all(torch.equal(shard.local, expected[name].local) for name, shard in shards.items())
    copy(url, str(tmp_path / "back"), no_progress)
    assert publication.verify(tmp_path / "back/iter_0000001").meta == {"ledger": {"seed": 7}}


def test_store_rank_reads_only_the_chunks_it_needs(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, matrix = large(tmp_path / "run")
    copy(str(path), memory, no_progress)
    files, read = fsspec.filesystem("memory"), []
    real = files.cat_file

    def counted(path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        content = real(path, start=start, end=end, **options)
        if path.endswith(".safetensors"):
            read.append(len(content))
        return content

    monkeypatch.setattr(files, "cat_file", counted)
    for start, stop in ((0, 10), (700, 900), (ROWS - 500, ROWS)):
        read.clear()
        part = rows(torch.zeros_like(matrix), start, stop)
        checkpoint.load(find(memory), {"model.w": part})
        assert torch.equal(part.local, matrix[start:stop])
        assert part.local.nbytes <= sum(read) < part.local.nbytes + 2 * CHUNK


@pytest.mark.parametrize("compress", [False, True])
def test_store_damage_is_found_by_the_reader_of_the_chunk(tmp_path: Path, url: str, compress: bool) -> None:
    path, matrix = large(tmp_path / "run", compress)
    copy(str(path), url, no_progress)
    files, root = fsspec.core.url_to_fs(f"{url}/iter_0000004")
    name = next(iter(read_manifest(path).parts)).file
    content = bytearray(files.cat_file(f"{root}/{name}"))
    content[-1000] ^= 4
    files.pipe_file(f"{root}/{name}", bytes(content))
    last = rows(torch.zeros_like(matrix), ROWS - 10, ROWS)
    with pytest.raises(CheckpointError, match=rf"iter_0000004/{name}: "):
        checkpoint.load(find(url), {"model.w": last})
    if not compress:
        first = rows(torch.zeros_like(matrix), 0, 10)
        checkpoint.load(find(url), {"model.w": first})
        assert torch.equal(first.local, matrix[:10])
    with pytest.raises(CheckpointError, match=name):
        copy(url, str(tmp_path / "back"), no_progress)
    assert not (tmp_path / "back").exists() or [path.name for path in (tmp_path / "back").glob("[!.]*")] == []


def test_store_missing_truncated_or_existing_is_named(tmp_path: Path, url: str) -> None:
    path, matrix = large(tmp_path / "run")
    copy(str(path), url, no_progress)
    with pytest.raises(OutputError, match="iter_0000004 exists already"):
        copy(str(path), url, no_progress)
    files, root = fsspec.core.url_to_fs(f"{url}/iter_0000004")
    part = f"{root}/rank_00000.safetensors"
    files.pipe_file(part, files.cat_file(part)[:-5])
    whole = {"model.w": rows(torch.zeros_like(matrix), 0, ROWS)}
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: ends 5 bytes too early"):
        checkpoint.load(find(url), whole)
    files.rm(part)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: missing"):
        checkpoint.load(find(url), whole)
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        find(f"{url}/nowhere")


def test_store_partial_upload_is_no_checkpoint(tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = whole_state(MODEL, seed=5)
    write_checkpoint(tmp_path / "run", MODEL, Case(spec=ParallelSpec(tensor=2)), state, {})
    files = fsspec.filesystem("memory")
    calls = 0

    for at in range(1, 100):
        calls = 0
        with monkeypatch.context() as patched:
            for name in ("makedirs", "open", "pipe_file"):
                real = getattr(files, name)

                def call(*arguments: Any, real: Any = real, at: int = at, **options: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == at:
                        raise OSError(28, "No space left on device")
                    return real(*arguments, **options)

                patched.setattr(files, name, call)
            with contextlib.suppress(OutputError):
                copy(str(tmp_path / "run"), memory, no_progress)
                break
        if files.exists(f"{memory}/iter_0000001/manifest.json"):
            checkpoint.load(f"{memory}/iter_0000001", shards_of(0, MODEL, Case(spec=ParallelSpec()), None))
            files.rm(memory, recursive=True)
        else:
            with pytest.raises(CheckpointError):
                find(memory)
    assert at > 6
    assert find(memory) == f"{memory}/iter_0000001"


def test_store_unknown_protocol_is_named(tmp_path: Path) -> None:
    path, _ = large(tmp_path / "run")
    with pytest.raises(TrainerError, match="nosuch"):
        copy(str(path), "nosuch://bucket/run", no_progress)


def test_copy_command_copies_both_ways(tmp_path: Path, url: str) -> None:
    path, _ = large(tmp_path / "run")
    ran = CliRunner().invoke(app, ["copy", str(path), url], catch_exceptions=False)
    assert ran.stdout == f"{url.removeprefix('file://')}/iter_0000004: step 4, 24.00 MB\n"
    CliRunner().invoke(app, ["copy", url, str(tmp_path / "back")], catch_exceptions=False)
    assert publication.latest(tmp_path / "back") == tmp_path / "back/iter_0000004"
