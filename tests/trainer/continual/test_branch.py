"""Branches of a run in its constant phase, and averages of weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.parallel.shard import Shard
from keepwarm.trainer.continual.average import average
from keepwarm.trainer.continual.branch import branched
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.errors import CheckpointError, OutputError, SpecError
from keepwarm.trainer.job.files import load_job, save_job, shipped_configs
from keepwarm.trainer.loop.moving_average import MovingAverage
from keepwarm.trainer.loop.session import run_session

STEP = 8 * 64
"""Tokens of one step."""
CURVE = "{schedule: infinite, max: 3e-3, constant: 1.5e-3, min: 1e-4, warmup: 0.1, cooldown_end: 0.5}"
STAGE = f"{{name: base, tokens: {12 * STEP}, mixture: {{en: 3, de: 1}}, lr: {CURVE}, replay: []}}"


def trained(folder: Path, *overrides: str) -> Path:
    settings = ["log.tensorboard=false", "evaluation.samples=4", f"output={folder}"]
    assert run_session(shipped_configs() / "ci" / "tiny.yaml", [*settings, *overrides], resume=False)
    return folder


def run_branch(base: Path, name: str, *overrides: str, at: int = 8) -> Path:
    folder = base.with_name(name)
    folder.mkdir()
    save_job(branched(base, at, 4 * STEP, [f"output={folder}", f"name={name}", *overrides]), folder / "run.json")
    assert run_session(folder / "run.json", [], resume=False)
    return folder


def rates_of(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["lr"] for line in lines if "lr" in line]


def weights_of(path: Path) -> dict[str, np.ndarray]:
    with NativeCheckpoint(path) as native:
        names = [name for name in native.tensors if name.startswith("model.")]
        return {name: np.concatenate([b.copy() for b in native.blocks(name, 1 << 20)]).view("f4") for name in names}


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = ["checkpoint.every=4", "checkpoint.keep=9", "moving_average.decay=0.5"]
    return trained(tmp_path_factory.mktemp("runs") / "base", f"stages=[{STAGE}]", *kept)


def test_branch_anneals_from_constant_phase_and_leaves_parent_unchanged(base: Path) -> None:
    before = files_of(base)
    one = run_branch(base, "one")
    assert rates_of(one) == pytest.approx([1.5e-3 * (1e-4 / 1.5e-3) ** (step / 4) for step in range(4)])
    assert rates_of(one)[0] == rates_of(base)[8]
    newest = publication.latest(one / "checkpoints")
    assert newest is not None
    meta = read_manifest(newest).meta
    assert meta["run"]["parent"]["step"] == 8
    ledger = Ledger.load(meta["ledger"])
    assert [(stage.name, stage.samples) for stage in ledger.past] == [("base", 64)]
    seen = {origin.name: ledger.given(0)[identity].ranges for identity, origin in ledger.sources.items()}
    assert sorted(seen) == ["de", "en"]
    assert all(share.offset == ledger.given(0)[share.source].ranges[-1][1] for share in ledger.segments[0].shares)
    assert files_of(base) == before


def test_branch_default_name_can_be_overridden(base: Path) -> None:
    made = branched(base, 12, 5 * STEP)
    assert (made.name, made.output) == (f"{load_job(base / 'run.json').name}-anneal-12", f"{base}-anneal-12")
    (stage,) = made.stages
    assert (stage.mixture, stage.tokens) == ({"en": 3, "de": 1}, 5 * STEP)
    changed = branched(base, 12, 5 * STEP, ["stages.0.mixture={de: 1}", "stages.0.lr.min=5e-4"])
    assert (changed.stages[0].mixture, changed.stages[0].lr.min) == ({"de": 1}, 5e-4)


@pytest.mark.parametrize(
    ("at", "overrides", "error", "said"),
    [
        (4, [], SpecError, "with the batch of step 4 its rate is constant after steps 6 to 12"),
        (7, [], CheckpointError, "no checkpoint of step 7; there are those of steps 4, 8, 12"),
        (8, ["output=BASE/inner"], SpecError, "from which the branch begins"),
        (8, ["stages.0.mixture={fr: 1}"], SpecError, "['fr'], not in data.sources"),
    ],
)
def test_branch_impossible_request_is_refused(
    base: Path, at: int, overrides: list[str], error: type[Exception], said: str
) -> None:
    before = files_of(base)
    with pytest.raises(error) as caught:
        branched(base, at, STEP, [text.replace("BASE", str(base)) for text in overrides])
    assert said in str(caught.value)
    assert files_of(base) == before


def test_branch_schedule_without_constant_phase_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run", f"stages.0.tokens={2 * STEP}")
    with pytest.raises(SpecError, match="schedule cosine has none"):
        branched(tmp_path / "run", 2, STEP)
    with pytest.raises(OutputError, match="not a run folder"):
        branched(tmp_path, 2, STEP)


def test_average_of_branches_is_their_mean_and_starts_a_run(base: Path) -> None:
    branches = [run_branch(base, "first"), run_branch(base, "second", "stages.0.mixture={de: 1}")]
    soup = base.with_name("soup")
    done = average(branches, soup)
    assert done["ledger"]
    both = [weights_of(path) for path in branches]
    mean = weights_of(soup)
    assert mean.keys() == both[0].keys()
    for name, value in mean.items():
        exact = (both[0][name].astype("f8") + both[1][name].astype("f8")) / 2
        assert np.array_equal(value, exact.astype("f4"))
    weighted = average(branches, base.with_name("weighted"), weights=[3, 1])
    assert weighted["weights"] == [0.75, 0.25]

    child = trained(base.with_name("child"), f"init_from={soup}", f"stages.0.tokens={STEP}",
                    "stages.0.replay={from: [anneal], fraction: 0.5}")  # fmt: skip
    newest = publication.latest(child / "checkpoints")
    assert newest is not None
    past = read_manifest(newest).meta["ledger"]["past"]
    assert [stage["name"] for stage in past] == ["base", "anneal", "anneal"]

    with pytest.raises(OutputError, match="exists already"):
        average(branches, soup)
    with pytest.raises(SpecError, match="2 runs need as many weights above 0"):
        average(branches, base.with_name("none"), weights=[1])
    wider = trained(base.with_name("wider"), "model.hidden_size=48", f"stages.0.tokens={STEP}")
    with pytest.raises(CheckpointError, match="another architecture"):
        average([branches[0], wider], base.with_name("none"))
    with pytest.raises(CheckpointError, match="a moving average needs `moving_average`"):
        average([wider], base.with_name("none"), moving=True)
    assert not base.with_name("none").exists()


def test_moving_average_follows_weights_and_survives_a_stop(base: Path, tmp_path: Path) -> None:
    weight = torch.tensor([1.0, 2.0])
    shard = Shard(name="model.x", global_shape=(2,), offsets=(0,), shape=(2,), local=weight, replicas=(0,))
    mean = MovingAverage(0.75, {"model.x": shard, "optimizer.x": shard})
    weight += 4
    mean.update()
    (kept,) = mean.shards().values()
    assert (kept.name, kept.local.tolist()) == ("average.model.x", [2.0, 3.0])

    average([base], tmp_path / "mean", moving=True)
    whole = weights_of(tmp_path / "mean")
    assert whole.keys() == weights_of(base).keys()
    assert any(not np.array_equal(whole[name], value) for name, value in weights_of(base).items())

    stopped = tmp_path / "stopped"
    stopped.mkdir()
    save_job(load_job(base / "run.json", [f"output={stopped}"]), stopped / "run.json")
    name = "iter_0000008"
    shutil.copytree(base / "checkpoints" / name, stopped / "checkpoints" / name)
    assert run_session(stopped / "run.json", [], resume=True)
    average([stopped], tmp_path / "again", moving=True)
    assert all(np.array_equal(whole[name], value) for name, value in weights_of(tmp_path / "again").items())
