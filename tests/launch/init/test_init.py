"""`keepwarm init`: the job that it writes loads and trains, and what it cannot use is one sentence."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from keepwarm.launch.errors import LaunchError
from keepwarm.launch.init.choices import Choices, Wanted, choose
from keepwarm.launch.init.command import Request, write_first_job
from keepwarm.launch.init.document import flow, path_in_job
from keepwarm.launch.init.job_text import layout_of
from keepwarm.launch.init.machine import machine
from keepwarm.launch.plan.plan import Plan
from keepwarm.launch.plan.search import find
from keepwarm.parallel.cards import CARDS
from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.errors import TrainerError
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.yaml import parse_value
from tests.support.corpus import random_documents, write_json_lines, write_token_file
from tests.support.tokenizer_files import byte_level

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote."""
    folder = tmp_path_factory.mktemp("model")
    words = PreTrainedTokenizerFast(tokenizer_file=str(byte_level(folder)), eos_token="<|endoftext|>")
    words.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, tie_word_embeddings=True, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_json_lines(folder / "letters.jsonl", [f"letter {number} of many words, " * 8 for number in range(64)])
    write_json_lines(folder / "letters.valid.jsonl", ["a letter that is held out, " * 20] * 8)
    return folder


def request(tmp_path: Path, *data: Path, **changes: object) -> Request:
    nothing = dict.fromkeys(("model", "tokenizer", "end_of_document", "tokens", "gpu", "gpus_per_node"))
    lists = {"data": data, "replay": (), "validation": ()}
    return Request(**nothing | lists | {"gpus": 0, "output": tmp_path / "job.yaml", "force": False} | changes)  # type: ignore[arg-type]


def written(wanted: Request) -> JobSpec:
    write_first_job(wanted)
    return load_job(wanted.output)


def test_init_job_of_a_model_folder_trains_on_the_cpu(model: Path, corpus: Path, tmp_path: Path) -> None:
    write_json_lines(tmp_path / "before.jsonl", ["what the model knew, " * 9] * 40)
    command = ["init", "--model", str(model), "--data", "corpus", "--replay", "before.jsonl", "--tokens", "2_000"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/src"}
    for words in (
        [*command, "--gpus", "0"],
        ["train", "job.yaml", "numerics.threads_per_rank=1", "checkpoint.every=1"],
    ):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "keepwarm", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/job/checkpoints").is_dir()
    assert "letters" in done.stdout
    job = load_job(tmp_path / "job.yaml")
    assert job.model.vocabulary_size == 320
    assert job.data.tokenizer == str(model / "tokenizer.json")
    assert [clause.proxy_source for stage in job.stages for clause in stage.replays] == ["before"]
    assert list(job.data.validation) == ["letters"]


def test_init_from_scratch_takes_bytes_and_one_pass(corpus: Path, tmp_path: Path) -> None:
    write_json_lines(corpus / "letters.jsonl", [f"letter {number} of many words, " * 8 for number in range(512)])
    job = written(request(tmp_path, corpus))
    assert job.init_from is None
    assert (job.data.tokenizer, job.layout.world_size, len(job.stages)) == ("bytes", 1, 2)
    tokens = sum(len(line) - 12 for line in (corpus / "letters.jsonl").read_text().splitlines()) + 512
    assert sum(stage.tokens for stage in job.stages) == pytest.approx(tokens, rel=0.1)
    assert [stage.name for stage in job.stages] == ["pretrain", "anneal"]
    assert Plan(job).stages[-1].curve.at(10**9) == 0


@pytest.mark.parametrize(("gpus", "gpu"), [(1, None), (16, "h100"), (64, "A100")])
def test_init_for_gpus_fits_them(model: Path, corpus: Path, tmp_path: Path, gpus: int, gpu: str | None) -> None:
    job = written(request(tmp_path, corpus, model=model, gpus=gpus, gpu=gpu))
    assert (job.layout.world_size, job.layout.nodes) == (gpus, max(1, gpus // 8))
    assert job.numerics.precision == "bf16"
    assert Plan(job).fits
    assert ("assumed" in (tmp_path / "job.yaml").read_text()) == (gpu is None)


@pytest.mark.parametrize("gpus", [1, 8, 96])
def test_layout_in_a_job_is_the_one_that_was_found(gpus: int) -> None:
    job = load_job(
        Path("llama-3-8b"),
        ["model.layers=31", "parallel={tensor: 1}", "cluster={}", f"batch={{global_batch_size: {gpus * 4}}}"],
    )
    for found in find(job, CARDS["H200"], gpus):
        text = flow(layout_of(found.job.parallel))
        assert ParallelSpec.model_validate_json(json.dumps(parse_value(text, "test"))) == found.job.parallel


def test_init_tokens_are_counted_exactly_in_token_files(tmp_path: Path) -> None:
    prefix = write_token_file(tmp_path / "tokens", random_documents(1, 300))
    job = written(request(tmp_path, prefix, tokenizer="bytes"))
    assert job.data.sources == {"tokens": str(prefix)}
    assert "About" not in (tmp_path / "job.yaml").read_text()


def test_init_leaves_an_existing_file_unless_forced(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "job.yaml").write_text("mine")
    with pytest.raises(TrainerError, match="exists already"):
        write_first_job(request(tmp_path, corpus))
    assert (tmp_path / "job.yaml").read_text() == "mine"
    write_first_job(request(tmp_path, corpus, force=True))
    assert (tmp_path / "job.yaml").read_text() != "mine"


def break_config(content: bytes) -> Callable[[Path, Path], None]:
    def spoil(model: Path, corpus: Path) -> None:
        (model / "config.json").write_bytes(content)

    return spoil


def config_is_a_folder(model: Path, corpus: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").mkdir()


def remove(name: str) -> Callable[[Path, Path], None]:
    return lambda model, corpus: (model / name).unlink()


def pickled(model: Path, corpus: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def truncated(model: Path, corpus: Path) -> None:
    os.truncate(model / "model.safetensors", 100)


def write(name: str, content: bytes) -> Callable[[Path, Path], None]:
    def spoil(model: Path, corpus: Path) -> None:
        (corpus / name).write_bytes(content)

    return spoil


def foreign(model: Path, corpus: Path) -> None:
    (corpus / "a.bin").write_bytes(b"tokens")
    (corpus / "a.idx").write_bytes(b"not an index")


def many(model: Path, corpus: Path) -> None:
    for number in range(20):
        (corpus / f"{number}.txt").write_text("text")


def empty(model: Path, corpus: Path) -> None:
    for file in corpus.iterdir():
        file.unlink()


def only_pipe(model: Path, corpus: Path) -> None:
    empty(model, corpus)
    os.mkfifo(corpus / "pipe.jsonl")


def tiny(model: Path, corpus: Path) -> None:
    empty(model, corpus)
    write_json_lines(corpus / "letters.jsonl", ["a"])


def circle(model: Path, corpus: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("config.json")


def a_run(model: Path, corpus: Path) -> None:
    (model / "run.json").write_text("{}")


def not_utf8(model: Path, corpus: Path) -> None:
    (corpus / "letters.jsonl").rename(os.fsdecode(os.fsencode(corpus) + b"/caf\xe9.jsonl"))


BROKEN: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "config not JSON": (break_config(b"{"), "config.json: not JSON"),
    "config a list": (break_config(b"[]"), "config.json"),
    "config empty": (break_config(b""), "config.json"),
    "config of no kind": (break_config(b"{}"), "config.json: model_type"),
    "config of an encoder": (break_config(b'{"model_type": "bert"}'), "config.json"),
    "config of text": (break_config(b'{"model_type": "llama", "hidden_size": "wide"}'), "hidden_size"),
    "config with code": (break_config(b'{"model_type": "own", "auto_map": {"AutoModel": "a.B"}}'), "auto_map"),
    "config a folder": (config_is_a_folder, "holds no config.json"),
    "config a circle": (circle, "holds no config.json"),
    "no config": (remove("config.json"), "holds no config.json"),
    "no weights": (remove("model.safetensors"), "holds neither model.safetensors"),
    "weights in a pickle": (pickled, "pickle"),
    "weights truncated": (truncated, "model.safetensors"),
    "no tokenizer": (remove("tokenizer.json"), "give --tokenizer"),
    "a run": (a_run, "a run of keepwarm"),
    "no corpus": (empty, "no corpus in this folder"),
    "a pipe": (only_pipe, "no corpus in this folder"),
    "too many files": (many, "21 files"),
    "no text": (write("letters.jsonl", b'{"body": "a"}\n'), "letters.jsonl:1: not an object with a string at 'text'"),
    "binary": (write("letters.jsonl", bytes(range(256))), "letters.jsonl"),
    "damaged gzip": (write("more.jsonl.gz", b"\x1f\x8bnothing"), "more.jsonl.gz"),
    "foreign index": (foreign, "a.idx"),
    "too small": (tiny, "too small"),
    "name not UTF-8": (not_utf8, "not UTF-8"),
}


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("case", BROKEN)
def test_init_what_cannot_be_used_is_one_sentence_and_nothing_is_written(
    case: str, copied: Path, corpus: Path, tmp_path: Path
) -> None:
    spoil, said = BROKEN[case]
    spoil(copied, corpus)
    with pytest.raises((LaunchError, TrainerError)) as error:
        write_first_job(request(tmp_path, corpus, model=copied))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "own"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": 12}, "do not fill whole nodes of 8"),
        ({"gpu": "tpu"}, "choose from A100"),
        ({"replay": (Path("corpus"),)}, "give --model"),
        ({"tokenizer": "gone.json"}, "gone.json: no such tokenizer file"),
        ({"output": Path("/proc/job.yaml")}, "cannot be written"),
        ({"output": Path()}, "this is a folder"),
    ],
)
def test_init_options_that_do_not_fit_are_refused(
    changes: dict[str, object], said: str, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises((LaunchError, TrainerError), match=said):
        write_first_job(request(tmp_path, corpus, **changes))


def wanted(**changes: object) -> Wanted:
    usual = {"parameters": 1_200_000_000, "continues": False, "max_sequence_length": 131_072, "replays": False}
    many = {"tokens": {"web": 10**11}, "smallest": 10**11, "budget": None}
    return Wanted(**usual | many | changes)  # type: ignore[arg-type]


def test_choices_halve_the_rate_of_a_trained_model_and_end_in_an_anneal() -> None:
    devices = machine(8, "H100", None)
    scratch, continued = choose(wanted(), devices), choose(wanted(continues=True, replays=True), devices)
    assert continued.peak == scratch.peak / 2 == 1e-4
    assert scratch.sequence_length == 4096
    assert scratch.step_tokens == 2**19
    assert scratch.passes == pytest.approx(1, rel=1e-3)
    assert continued.steps == pytest.approx(scratch.steps / 0.9, rel=1e-3)
    assert 0.19 < scratch.anneal_steps / scratch.steps < 0.21


@pytest.mark.parametrize("smallest", [17, 100, 1000, 10**6])
@pytest.mark.parametrize("longest", [8, 96, 4096])
def test_choices_give_every_corpus_a_sample_that_the_model_takes(smallest: int, longest: int) -> None:
    made: Choices = choose(
        wanted(smallest=smallest, tokens={"a": smallest}, max_sequence_length=longest), machine(0, None, None)
    )
    assert made.sequence_length <= min(longest, smallest - 1)
    assert made.sequence_length & (made.sequence_length - 1) == 0
    assert made.steps >= 1


def test_choices_cut_what_a_cpu_would_train_on_for_days() -> None:
    assert choose(wanted(), machine(0, None, None)).is_short
    assert not choose(wanted(), machine(8, None, None)).is_short
    assert choose(wanted(budget=10**9), machine(0, None, None)).passes == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    "text", ["null", "1e3", "0x10", "true", "~", "a: b", "é", "a'b\"c\\", "\x7f\x00", "#a", "", "no"]
)
def test_text_in_a_job_stays_text(text: str) -> None:
    assert parse_value(flow(text), "test") == text
    assert parse_value(flow([text, {text: 3e-5}]), "test") == [text, {text: 3e-5}]


@pytest.mark.parametrize("name", ["plain", "a $HOME b", "~user", "a: b", "#x"])
def test_path_in_a_job_names_the_same_file(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    write_json_lines(folder / f"{name}.jsonl", ["text " * 50] * 20)
    job = written(request(tmp_path, folder))
    assert list(job.data.sources.values()) == [str(folder / f"{name}.jsonl")]
    assert path_in_job(folder, tmp_path / "elsewhere").startswith("/")
