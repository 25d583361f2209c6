"""The command `keepwarm` as people meet it: exit codes, messages, what is left on disk."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TINY = str(ROOT / "configs" / "ci" / "tiny.yaml")


def keepwarm(*arguments: str, cwd: Path | None = None, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "keepwarm", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "KEEPWARM_DEBUG"} | {"COLUMNS": "200"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False, **options
    )


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert all(word in result.stderr for word in words), result.stderr


def test_cli_help_shows_examples() -> None:
    assert "keepwarm train configs/jobs/demo.yaml" in keepwarm("--help").stdout
    assert "torchrun --nproc-per-node 8" in keepwarm("train", "--help").stdout
    assert keepwarm("--version").stdout.startswith("keepwarm ")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("submit", TINY, "--at-once", "2", "--dry-run"), "--at-once was renamed: write --max-parallel"),
        (("submit", TINY, "--at-once=2", "--sweep", "seed=[1, 2]"), "--at-once was renamed: write --max-parallel"),
        (("data", "tokenize", "--control-least=1"), "--control-least was renamed: write --control-threshold"),
        (
            ("surgery", "coalesce", "a", "--layers", "2"),
            "coalesce --layers was renamed: write coalesce-layers --layers",
        ),
    ],
)
def test_cli_renamed_option_is_refused_with_the_new_one(command: tuple[str, ...], said: str) -> None:
    refused(keepwarm(*command), said)


def test_plan_json_holds_layout_and_learning_rates() -> None:
    result = keepwarm("plan", TINY, "parallel.tensor=2", "--parallel.pipeline=2", "parallel.data=2", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    sections = "job site layout decided fits parameters ranks host_memory smaller stages placement"
    assert plan.keys() == set(sections.split())
    assert plan["decided"] == {"accumulate": "whole", "reshard_after_forward": False}
    assert plan["site"] == {}
    assert plan["host_memory"] is None
    sizes = {"data": 2, "pipeline": 2, "tensor": 2, "ranks_per_node": 8, "world_size": 8, "nodes": 1}
    assert plan["layout"] == sizes
    assert [rank["layers"] for rank in plan["ranks"]] == [[[0, 2]], [[2, 4]]]
    for rank in plan["ranks"]:
        memory = rank["memory"]
        assert memory.keys() == {"weights", "gradients", "optimizer", "activations", "total"}
        assert memory["total"] == sum(memory.values()) - memory["total"] > 0
    (stage,) = plan["stages"]
    assert (stage["name"], stage["steps"], stage["tokens"]) == ("pretrain", 20, 10240)
    assert stage["micro_batches"] == [4, 4]
    steps, rates = zip(*stage["learning_rate"], strict=True)
    assert steps == tuple(range(20))
    assert max(rates) == 3e-3
    assert plan["parameters"]["total"] == pytest.approx(100_000, rel=0.2)


def test_plan_of_530b_job_fits_on_a_page() -> None:
    result = keepwarm("plan", "mt-nlg-530b")
    assert result.returncode == 0, result.stderr
    assert "data 8 x pipeline 35 x tensor 8 = 2,240 ranks on 280 nodes of 8" in result.stdout
    assert "530 B (529,600,819,200) in total" in result.stdout
    layout = result.stdout.partition("layout:")[2]
    assert len(layout.splitlines()) < 60
    assert max(map(len, layout.splitlines())) <= 120


def test_plan_with_many_stages_names_each_once() -> None:
    plan = json.loads(keepwarm("plan", "llama-3-8b", "--json").stdout)
    assert [stage["name"] for stage in plan["stages"]] == ["pretrain", "anneal"]
    first, second = plan["stages"]
    assert second["start_step"] == first["steps"]
    assert all(len(stage["learning_rate"]) == 64 for stage in plan["stages"])


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.tensr=2", "parallel.tensr: unknown key; did you mean parallel.tensor?"),
        ("parallel.tensor=two", "parallel.tensor: expected a whole number, got the text 'two'"),
        ("parallel.tensor=3", "model.heads = 4 does not divide by parallel.tensor = 3"),
        ("parallel.pipeline=3", "model.layers = 4 does not divide by 3 pipeline stages"),
        ("parallel.data=3", "batch.global_batch_size = 8 does not divide"),
        ("data.sequence_length=512", "longer than model.max_sequence_length = 256"),
        ("--rezume", "expected KEY=VALUE"),
    ],
)
def test_cli_wrong_spec_is_refused_and_writes_nothing(command: str, override: str, words: str, tmp_path: Path) -> None:
    refused(keepwarm(command, TINY, override, f"output={tmp_path / 'run'}", cwd=tmp_path), words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "words"), [("", "is empty"), ("name: a\nname: b\n", 'duplicate key "name"')])
def test_cli_wrong_job_file_is_refused_and_writes_nothing(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    refused(keepwarm("train", str(path), cwd=tmp_path), words, str(path))
    assert list(tmp_path.iterdir()) == [path]


def test_train_missing_data_is_found_before_anything_is_written(tmp_path: Path) -> None:
    gone = ["data.sources.en=gone.jsonl", "data.sources.de=tokens/de", "data.tokenizer=t.json"]
    result = keepwarm("train", TINY, *gone, f"output={tmp_path / 'run'}", cwd=tmp_path)
    refused(result, f"data.sources.en: {tmp_path / 'gone.jsonl'}: no such file", "tokens/de.idx", "data.tokenizer")
    assert list(tmp_path.iterdir()) == []


def test_train_data_refused_by_a_rank_leaves_no_run(tmp_path: Path) -> None:
    (tmp_path / "foreign.idx").write_bytes(b"not an index")
    (tmp_path / "foreign.bin").write_bytes(b"")
    result = keepwarm("train", TINY, "data.sources.en=foreign", f"output={tmp_path / 'run'}", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "foreign" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.bin", "foreign.idx"]


def test_train_existing_run_needs_resume_or_force(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    refused(keepwarm("train", TINY, f"output={run}"), "--resume continues it, --force starts over")
    refused(keepwarm("train", str(run)), "--resume")
    refused(keepwarm("train", TINY, f"output={run}", "--resume", "--force"), "--resume", "--force")
    assert (run / "run.json").read_text() == "{}"


def test_train_force_empties_run_folders_only(tmp_path: Path) -> None:
    thesis = tmp_path / "home" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years")
    refused(keepwarm("train", TINY, f"output={thesis.parent}", "--force"), "no run.json")
    assert thesis.read_text() == "years"


def test_train_resume_without_a_run_is_refused(tmp_path: Path) -> None:
    refused(keepwarm("train", TINY, f"output={tmp_path / 'run'}", "--resume"), "there is no run to resume")
    assert list(tmp_path.iterdir()) == []


def test_train_unusable_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(keepwarm("train", TINY, f"output={tmp_path / 'file'}"), "this is a file")
    refused(keepwarm("train", TINY, f"output={tmp_path / 'file' / 'run'}"), "run folder cannot be used")
    # Also root cannot make folders here.
    refused(keepwarm("train", TINY, "output=/proc/run"), "/proc/run: the run folder cannot be used")


FULL_DISK = """
mount -t tmpfs -o size=64k keepwarm-test "$1"
head -c 1M /dev/zero > "$1/filler" 2>/dev/null || true
code=0; "$2" -m keepwarm train "$3" "output=$1/run" || code=$?
ls "$1" > "$4"
exit $code
"""
"""A full file system in a mount namespace of its own: it goes with the shell."""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system to fill")
def test_train_full_disk_leaves_nothing(tmp_path: Path) -> None:
    disk, left = tmp_path / "disk", tmp_path / "left"
    disk.mkdir()
    command = ["unshare", "--mount", "sh", "-ec", FULL_DISK, "sh", str(disk), sys.executable, TINY, str(left)]
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    refused(result, "a checkpoint of this job takes", "make room")
    assert left.read_text() == "filler\n"


def test_train_truncated_run_json_leaves_nothing(tmp_path: Path) -> None:
    """The write of run.json fails half-way."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    result = keepwarm("train", TINY, f"output={tmp_path / 'run'}", preexec_fn=limit)
    refused(result, "run.json: cannot be written: File too large")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("plan", TINY, "parallel.tensor=3"), ("lineage", "nowhere")])
def test_cli_debug_shows_the_traceback(command: tuple[str, ...]) -> None:
    """Of a command of this program, and of one that becomes a program of its own."""
    for extra in ((), ("--debug",)):
        result = keepwarm(*command, *extra)
        assert result.returncode == 2
        assert ("Traceback" in result.stderr) == bool(extra)


@pytest.mark.parametrize("tool", ["train-tokenizer", "tokenize", "inspect"])
def test_data_tools_receive_their_arguments_unchanged(tool: str) -> None:
    shown = keepwarm("data", tool, "--help")
    assert shown.returncode == 0, shown.stderr
    assert f"keepwarm.trainer.data.preprocess.{tool.replace('-', '_')}" in shown.stdout
    assert keepwarm("data", tool, "--no-such-option").returncode == 2


@pytest.mark.parametrize(
    "command",
    [
        ("sample", "run", "--prompt", b"caf\xe9"),
        ("plan", b"caf\xe9.yaml"),
        ("plan", TINY, b"output=caf\xe9"),
        ("data", "inspect", b"caf\xe9"),
        ("submit", TINY, b"--sweep", b"name=[caf\xe9]"),
        ("status", b"caf\xe9"),
    ],
)
def test_cli_argument_that_is_not_utf8_is_refused(command: tuple[str | bytes, ...]) -> None:
    result = subprocess.run(
        [sys.executable, "-P", "-m", "keepwarm", *command], capture_output=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.endswith(b"this argument is not UTF-8; write it, or name the file, in UTF-8\n")
    assert b"caf\\xe9" in result.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: caf\xe9\n", "not UTF-8 text: byte 9 is 0xe9"),
        (b'name: "a\\ud800"\n', "name: a\\ud800 is not UTF-8 text"),
        (b"\xff\xfen\0a\0", "not UTF-8 text: byte 0 is 0xff"),
        (
            b"a: &a [x]\n"
            + b"".join(
                b"b%d: &b%d [%s]\n" % (i, i, b", ".join([b"*b%d" % (i - 1) if i else b"*a"] * 10)) for i in range(9)
            ),
            "more than 1,000,000 values",
        ),
        (b"a: &a [*a]\n", "more than 1,000,000 values"),
        (b"a: " + b"[" * 100_000, "nested too deep"),
    ],
    ids=["latin-1", "surrogate", "utf-16", "alias bomb", "alias circle", "deep"],
)
def test_cli_job_file_that_is_not_text_or_too_large_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "job.yaml").write_bytes(content)
    refused(keepwarm("plan", str(tmp_path / "job.yaml")), words, "job.yaml")


def test_plan_job_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    text = Path(TINY).read_text().replace("../corpora", str(ROOT / "configs" / "corpora"))
    (tmp_path / "job.yaml").write_text(text, encoding="utf-8-sig")
    assert keepwarm("plan", str(tmp_path / "job.yaml")).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", TINY, "data.sources.en=LONG"],
        ["train", TINY, "data.tokenizer=LONG.json"],
        ["train", TINY, "output=LONG"],
        ["plan", "LONG"],
        ["status", "LONG"],
        ["status", "LOOP"],
        ["train", TINY, "init_from=LONG"],
        ["convert", "LONG", "LONG", "--to", "hf"],
        ["checkpoint", "verify", "LONG"],
        ["data", "tokenize", "--input", "LONG.txt", "--output-prefix", "x", "--tokenizer", "bytes"],
    ],
    ids=lambda arguments: " ".join(arguments).replace(TINY, "job"),
)
def test_cli_path_that_the_system_refuses_to_look_up_is_named(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    made = [word.replace("LONG", "x" * 300).replace("LOOP", str(tmp_path / "loop" / "a")) for word in arguments]
    refused(keepwarm(*made, cwd=tmp_path), "oo")  # of "too long", "too many levels", "no such file"
