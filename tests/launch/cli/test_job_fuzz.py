"""Job files and overrides that are not written on purpose: exit code 0 or 2, and one message that says where."""

import contextlib
import copy
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from keepwarm.launch.cli.main import main
from keepwarm.trainer.job.files import load_job

EVERY_SECTION = [
    "moving_average={decay: 0.9}", "profile={start: 1, steps: 1}", "snapshot={every: 2, durable: {every: 4}, code: {}}",
    "batch.ramp={start: 4, increment: 4, samples: 16}", "evaluation.every=3", "cluster.ranks_per_node=1",
    "stages.0.mixture_steps=[{at: 0.5, mixture: {en: 1}}]", "stages.0.gate={domain: en, max_forgetting: 1.0}",
    "cluster.slurm.container={image: /i.sqsh, mounts: ['/a:/b']}", "log.sinks={tensorboard: {}}",
    "cluster.kubernetes={image: i, claim: c, mount: /}",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**300, 0.5, -0.0, 1e-300, 1e308, float("inf"), float("nan"),
    "", " ", "off", "null", "a" * 5000, "a\0b", "\ud800", "é", "\u202e", "💥", "~", "~x/y", "$X", "${", "$$", "/", ".",
    "..", "//", "-", "=", "a.b", "file:///", "s3://", "x://y", "1_0", "2026-01-01", "!!python/object:os.system", [], {},
    [[]], [None], {"a": {}}, {"": 1}, ["x"] * 50, [1, 2], [0.1, 0.2], {"name": 1},
]  # fmt: skip
TEXTS = [
    "\0", "\t", "\ufeff", "&a ", "*a", "<<: *a\n", "? ", ": ", "- ", "{", "}", "[" * 2000, "]", "|", ">", "%YAML 9\n",
    "---\n", "...\n", "!!binary x", "!x ", "'", '"', "#", "@", "`", "\r", "\x85", "\u2028", "\x1b", "a: &a [*a]\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """A job with every section, so that every key is tried."""
    return load_job(Path("ci/tiny"), EVERY_SECTION).model_dump(mode="json")


def paths(value: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inner for found in ((*at, key), *paths(part, (*at, key)))]


def mutate(values: dict[str, Any], draw: random.Random) -> str:
    """Change a job in place; return the key."""
    *parents, last = draw.choice(paths(values))
    section: Any = values
    for key in parents:
        section = section[key]
    match draw.randrange(4) if isinstance(section, dict) else 0:
        case 0:
            section[last] = draw.choice(VALUES)
        case 1:
            del section[last]
        case 2:
            section[f"{last}{draw.choice(['x', ' ', '.', '', 'é'])}"] = section.pop(last)
        case 3:
            section[draw.choice(["new", "", "a.b", "name", "\0"])] = copy.deepcopy(section[last])
    return str(last)


def override(values: dict[str, Any], draw: random.Random) -> str:
    keys = list(map(str, draw.choice(paths(values))))
    if draw.random() < 0.3:
        keys[draw.randrange(len(keys))] = draw.choice(["", "x", "0", "-1", "99999999999999999999", "é", " ", "name"])
    equals = draw.choice(["=", "=", "=", "==", "", ":", "= "])
    text = draw.choice([json.dumps(draw.choice(VALUES)), str(draw.choice(VALUES)), draw.choice(TEXTS)])
    argument = f"{draw.choice(['', '', '--', '-'])}{'.'.join(keys)}{equals}{text}"
    return argument.replace("\0", "\\0").replace("\ud800", "?")


def written(values: dict[str, Any], draw: random.Random) -> bytes:
    text = json.dumps(values, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.9)
    for _ in range(draw.choice([0, 0, 1, 3])):
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(TEXTS) + text[at + draw.choice([0, 0, 1, 5]) :]
    if draw.random() < 0.1:  # a key that is there twice
        text = text.rstrip().removesuffix("}") + f', "{draw.choice(list(values) or ["a"])}": 1}}'
    content = text.encode("utf-8", "surrogatepass")
    return content[: draw.randrange(len(content))] if draw.random() < 0.05 else content


def run(arguments: list[str]) -> tuple[int, str]:
    """Return exit code and standard error of the command in this process; what it does not catch is raised."""
    before, said = sys.argv, io.StringIO()
    sys.argv = ["keepwarm", *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            main()
    except SystemExit as ended:
        return int(ended.code or 0), said.getvalue()
    finally:
        sys.argv = before
    return 0, said.getvalue()


def try_one(seed: int, whole: dict[str, Any], folder: Path) -> int:
    draw = random.Random(seed)
    values, job = copy.deepcopy(whole), folder / "job.yaml"
    values["output"] = str(folder / "run")
    keys = [mutate(values, draw) for _ in range(draw.choice([0, 1, 1, 1, 3])) if values]
    overrides = [override(whole, draw) for _ in range(draw.choice([0, 0, 1, 2]))]
    job.write_bytes(written(values, draw))
    command = draw.choice([("plan", "--json"), ("plan", "--json"), ("submit", "--dry-run"), KUBERNETES])
    code, said = run([command[0], str(job), *command[1:], "--", *overrides])
    what = f"seed {seed}: {' '.join(command)} changed {keys} {overrides}: {code} {said[:2000]}"
    assert code in (0, 2), what
    assert "Traceback" not in said, what
    if code:
        named = ("job.yaml", "override", "command line", "data.", "cluster.", "output", "parallel.", "kernel", "engine")
        assert any(name in said for name in (*named, *keys)), what
        assert len(said) < 40_000, what
    assert not (folder / "run").exists(), what
    return code


KUBERNETES = ("submit", "--dry-run", "--backend", "kubernetes")


def test_job_mutated_in_any_way_is_planned_or_refused_in_a_sentence(whole: dict[str, Any], tmp_path: Path) -> None:
    codes = [try_one(seed, whole, tmp_path) for seed in range(300)]
    assert {0, 2} == set(codes)


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_job_mutated_ten_thousand_times_is_planned_or_refused(whole: dict[str, Any], tmp_path: Path) -> None:
    for seed in range(300, 10_300):
        try_one(seed, whole, tmp_path)
