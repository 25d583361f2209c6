"""Checkpoints in an object store that speaks S3: a server of moto's, spoken to through s3fs."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepwarm.ft.format import publication

ROOT = Path(__file__).parents[3]
DEADLINE = 280.0

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None,
        reason="moto or s3fs is not installed: pip install 'keepwarm[s3]' 'moto[server]'",
    ),
    pytest.mark.long,
    pytest.mark.timeout(600),
]

SERVER = """
import signal
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
signal.pause()
"""
CLIENT = """
import sys
import torch
from pathlib import Path
import fsspec
from keepwarm.parallel.spec import ParallelSpec
from tests.support.layouts import Case, shards_of, whole_state, write_checkpoint
from keepwarm.trainer.checkpoint import checkpoint
from keepwarm.trainer.checkpoint.copy import copy, find
from keepwarm.trainer.errors import CheckpointError, OutputError
from keepwarm.trainer.model.spec import ModelSpec

url, folder = sys.argv[1], Path(sys.argv[2])
files = fsspec.filesystem("s3")
files.mkdir(url.removeprefix("s3://").split("/")[0])
model = ModelSpec(layers=2, hidden_size=16, heads=4, ffn_size=24, vocabulary_size=24, max_sequence_length=8)
state = whole_state(model, seed=5)
quiet = lambda done, total: None
try:
    find(url)
    raise SystemExit("found nothing's checkpoint")
except CheckpointError as error:
    assert "neither a checkpoint" in str(error), error
write_checkpoint(folder / "run/checkpoints", model, Case(spec=ParallelSpec(tensor=2, data=2)), state, {"ledger": 7})
assert copy(str(folder / "run"), url, quiet)["path"] == find(url) == url + "/iter_0000001"
try:
    copy(str(folder / "run"), url, quiet)
    raise SystemExit("overwrote a checkpoint")
except OutputError as error:
    assert "exists already" in str(error), error

case = Case(spec=ParallelSpec(pipeline=2, tensor=4))
for rank in range(case.layout.world_size):
    shards = shards_of(rank, model, case, None)
    assert checkpoint.load(find(url), shards) == {"ledger": 7}
    expected = shards_of(rank, model, case, state)
    assert all(torch.equal(shard.local, expected[name].local) for name, shard in shards.items())
copy(url, str(folder / "back"), quiet)

part = f"{find(url)}/rank_00000.safetensors".removeprefix("s3://")
content = bytearray(files.cat_file(part))
content[-3] ^= 8
files.pipe_file(part, bytes(content))
try:
    for rank in range(case.layout.world_size):
        checkpoint.load(find(url), shards_of(rank, model, case, None))
    raise SystemExit("a flipped bit went by")
except CheckpointError as error:
    assert "rank_00000.safetensors" in str(error), error
files.rm(f"{find(url)}/manifest.json".removeprefix("s3://"))
try:
    find(url)
    raise SystemExit("half of a checkpoint was found")
except CheckpointError as error:
    assert "neither a checkpoint" in str(error), error
print("all well")
"""


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Where the server is, as every S3 client finds it."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            yield os.environ | {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "somebody",
                "AWS_SECRET_ACCESS_KEY": "something",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "PYTHONPATH": str(ROOT / "src"),
            }
        finally:
            server.send_signal(signal.SIGKILL)


def run(environment: dict[str, str], *command: str) -> str:
    ran = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=DEADLINE, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return ran.stdout


def test_s3_any_layout_loads_and_half_an_upload_is_none(tmp_path: Path, environment: dict[str, str]) -> None:
    said = run(environment, "-c", CLIENT, f"s3://bucket-{uuid.uuid4().hex}/runs/one", str(tmp_path))
    assert said.splitlines()[-1] == "all well"
    assert publication.verify(tmp_path / "back/iter_0000001").meta == {"ledger": 7}


def test_s3_run_starts_from_bucket(tmp_path: Path, environment: dict[str, str]) -> None:
    url = f"s3://bucket-{uuid.uuid4().hex}/parent"
    train = [
        "-P",
        "-m",
        "keepwarm.trainer",
        str(ROOT / "configs/ci/tiny.yaml"),
        "log.tensorboard=false",
        "evaluation.samples=4",
    ]
    run(environment, *train, f"output={tmp_path / 'parent'}", "stages.0.tokens=1024")
    run(environment, "-c", f"import fsspec; fsspec.filesystem('s3').mkdir({url.split('/')[2]!r})")
    run(environment, "-P", "-m", "keepwarm.trainer.checkpoint.command", "copy", str(tmp_path / "parent"), url)
    run(environment, *train, f"output={tmp_path / 'child'}", "stages.0.tokens=1024", f"init_from={url}")

    def losses(folder: str) -> list[dict[str, Any]]:
        lines = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        return [line["eval"] for line in lines if "eval" in line]

    assert losses("child")[0] == losses("parent")[-1]
    said = run(environment, "-P", "-m", "keepwarm.trainer.continual.lineage_command", str(tmp_path / "child"))
    assert url in said
