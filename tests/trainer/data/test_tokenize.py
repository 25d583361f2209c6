import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import psutil
import pytest

from keepwarm.trainer.data.indexed import Sidecar, TokenFile
from keepwarm.trainer.data.preprocess.inspect import inspect
from keepwarm.trainer.data.preprocess.progress import Observer
from keepwarm.trainer.data.preprocess.tokenize import _parts_folder, tokenize
from keepwarm.trainer.data.preprocess.tokenize_options import TextOptions
from keepwarm.trainer.data.preprocess.train_tokenizer import train_tokenizer
from keepwarm.trainer.errors import DataError, OutputError
from tests.support.corpus import write_json_lines
from tests.support.foreign.megatron_tokens import megatron_indexed

TEXTS = [f"Dokument {i}: " + "äöü " * (i * 13 % 29) for i in range(120)]
SMALL = 700
"""Bytes of a part in these tests, so that the corpus has many."""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_json_lines(tmp_path / "corpus.jsonl", TEXTS)


def _digest(prefix: Path) -> dict[str, str]:
    return {s: hashlib.sha256(Path(f"{prefix}.{s}").read_bytes()).hexdigest() for s in ("bin", "idx", "json")}


def _left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tokenize_output_opens_with_megatron_reader(tmp_path: Path, corpus: Path) -> None:
    sidecar = tokenize([corpus], tmp_path / "out", "bytes", TextOptions(part_bytes=SMALL))
    dataset = megatron_indexed().IndexedDataset(str(tmp_path / "out"))
    documents = [[*text.encode(), 256] for text in TEXTS]
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == list(range(len(TEXTS) + 1))
    assert dataset.index.dtype == np.uint16
    tokens = TokenFile(tmp_path / "out", 257)
    assert tokens.sidecar == sidecar == Sidecar(
        content=tokens.content,
        tokenizer="bytes",
        tokenizer_hash="bytes",
        vocabulary_size=257,
        end_of_document=256,
        documents=len(TEXTS),
        tokens=sum(map(len, documents)),
        max_id=256,
    )  # fmt: skip
    assert _left_in(tmp_path) == ["corpus.jsonl", "out.bin", "out.idx", "out.json"]


def test_tokenize_processes_and_part_sizes_give_same_bytes(tmp_path: Path, corpus: Path) -> None:
    train_tokenizer([corpus], tmp_path / "t.json", 300)
    name, seen = str(tmp_path / "t.json"), Counter()
    tokenize([corpus, corpus], tmp_path / "one", name)
    tokenize(
        [corpus, corpus],
        tmp_path / "two",
        name,
        TextOptions(part_bytes=SMALL),
        processes=2,
        observer=seen,
    )
    assert _digest(tmp_path / "one") == _digest(tmp_path / "two")
    assert TokenFile(tmp_path / "one").documents == 2 * len(TEXTS)
    assert seen.bytes == 2 * corpus.stat().st_size


class Counter(Observer):
    bytes = 0

    def read(self, count: int) -> None:
        self.bytes += count


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import psutil
    from keepwarm.trainer.data.preprocess import token_parts
    from keepwarm.trainer.data.preprocess.progress import Observer
    from keepwarm.trainer.data.preprocess.tokenize import _parts_folder, tokenize
    from keepwarm.trainer.data.preprocess.tokenize_options import TextOptions

    folder, processes, moment = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

    def die(*_):
        children = [child.pid for child in psutil.Process().children(recursive=True)]
        print(*children, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def at(count, then=lambda *_: None):
        calls = iter(range(count))
        return lambda *a, **k: then(*a, **k) if next(calls, None) is not None else die()

    observer = Observer()
    if moment == "reading":
        observer.read = at(3)
    elif moment == "writing a part":
        token_parts.np.savez = lambda stream, **_: (stream.write(b"half"), stream.flush(), die())
    elif moment == "merging":
        writer = token_parts.TokenFileWriter
        writer.add_document = at(7, writer.add_document)
    elif moment.startswith("renaming"):
        token_parts.sync_file = at(int(moment.split()[1]))

    if __name__ == "__main__":
        inputs, prefix = [folder / "corpus.jsonl"], folder / "out"
        tokenize(inputs, prefix, "bytes", TextOptions(part_bytes=700), processes=processes, observer=observer)
        sys.exit("was not killed")
"""


@pytest.mark.parametrize(
    ("moment", "processes"),
    [
        ("reading", 1),
        ("reading", 2),
        ("writing a part", 1),
        pytest.param("merging", 1, marks=pytest.mark.long),
        pytest.param("renaming 1", 1, marks=pytest.mark.long),
        ("renaming 2", 1),
    ],
)
def test_tokenize_killed_and_restarted_gives_same_bytes(
    tmp_path: Path, corpus: Path, moment: str, processes: int
) -> None:
    tokenize([corpus], tmp_path / "whole", "bytes", TextOptions(part_bytes=SMALL))
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    root = Path(__file__).parents[3]
    ran = subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path), str(processes), moment],
        cwd=root,
        env={"PYTHONPATH": f"{root}/src:{root}", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == -9, ran.stderr
    assert not (tmp_path / "out.idx").exists()
    with pytest.raises(DataError, match=r"out\.idx: no such file"):
        TokenFile(tmp_path / "out")
    workers = [psutil.Process(int(pid)) for pid in ran.stdout.split() if psutil.pid_exists(int(pid))]
    assert not psutil.wait_procs(workers, timeout=60)[1], "workers outlived their killed parent"
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.parts").glob("*.npz")}
    assert bool(kept) == (moment != "writing a part")
    tokenize([corpus], tmp_path / "out", "bytes", TextOptions(part_bytes=SMALL))
    assert _digest(tmp_path / "out") == _digest(tmp_path / "whole")
    assert not (tmp_path / "out.parts").exists()


def test_tokenize_finished_parts_are_reused(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = write_json_lines(tmp_path / "broken.jsonl", TEXTS)
    broken.write_text(broken.read_text() + "{\n")
    with pytest.raises(DataError, match=r"broken\.jsonl:121: not JSON"):
        tokenize([broken], tmp_path / "out", "bytes", TextOptions(part_bytes=SMALL))
    assert not (tmp_path / "out.idx").exists()
    finished = len(list((tmp_path / "out.parts").glob("*.npz")))
    assert finished > 5
    made: list[Path] = []
    import keepwarm.trainer.data.preprocess.part_pool as module

    original = module.write_part
    monkeypatch.setattr(module, "write_part", lambda path, *rest: (made.append(path), original(path, *rest))[1])
    tokenize([corpus], tmp_path / "out", "bytes", TextOptions(part_bytes=SMALL))
    assert len(made) <= 1
    assert not (tmp_path / "out.parts").exists()


def test_tokenize_parts_of_another_tokenizer_are_not_reused(tmp_path: Path, corpus: Path) -> None:
    train_tokenizer([corpus], tmp_path / "t.json", 300)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(corpus.read_text() + "{\n")
    with pytest.raises(DataError):
        tokenize([broken], tmp_path / "out", "bytes", TextOptions(part_bytes=SMALL))
    tokenize([corpus], tmp_path / "out", str(tmp_path / "t.json"), TextOptions(part_bytes=SMALL))
    tokenize([corpus], tmp_path / "whole", str(tmp_path / "t.json"), TextOptions(part_bytes=SMALL))
    assert _digest(tmp_path / "out") == _digest(tmp_path / "whole")


def test_tokenize_existing_output_is_not_touched(tmp_path: Path, corpus: Path) -> None:
    tokenize([corpus], tmp_path / "out", "bytes")
    before = _digest(tmp_path / "out")
    with pytest.raises(OutputError, match=r"out\.idx: exists already"):
        tokenize([corpus], tmp_path / "out", "bytes")
    assert _digest(tmp_path / "out") == before


def test_tokenize_unwritable_folder_is_named(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file.*: cannot write"):
        tokenize([corpus], tmp_path / "file" / "out", "bytes")


def test_tokenize_full_disk_is_named(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OutputError, match=r"No space left on device"):
        tokenize([corpus], tmp_path / "out", "bytes")
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
def test_tokenize_input_without_text_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="contains no text"):
        tokenize([tmp_path / "empty.jsonl"], tmp_path / "out", "bytes")
    assert _left_in(tmp_path) == ["empty.jsonl"]


def test_tokenize_concurrent_writer_is_refused(tmp_path: Path, corpus: Path) -> None:
    with _parts_folder(tmp_path / "out"), pytest.raises(OutputError, match="another process is writing"):
        tokenize([corpus], tmp_path / "out", "bytes")


def test_inspect_shows_a_document(tmp_path: Path, corpus: Path) -> None:
    tokenize([corpus], tmp_path / "out", "bytes")
    found = inspect(tmp_path / "out", document=3, length=8)
    assert (found["documents"], found["tokenizer"]) == (len(TEXTS), "bytes")
    assert found["sample"]["text"] == "Dokument"
    assert found["sample"]["document_tokens"] == len(TEXTS[3].encode()) + 1
    with pytest.raises(DataError, match="no document 120"):
        inspect(tmp_path / "out", document=120)


def test_inspect_with_another_tokenizer_is_refused(tmp_path: Path, corpus: Path) -> None:
    train_tokenizer([corpus], tmp_path / "t.json", 300)
    tokenize([corpus], tmp_path / "out", str(tmp_path / "t.json"))
    assert inspect(tmp_path / "out", length=500)["sample"]["text"] == TEXTS[0]
    with pytest.raises(DataError, match="was not tokenized with bytes"):
        inspect(tmp_path / "out", tokenizer_name="bytes")
    (tmp_path / "t.json").unlink()
    assert inspect(tmp_path / "out")["sample"]["text"] is None


def _tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", f"keepwarm.trainer.data.preprocess.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_data_commands_from_text_to_decoded_sample(tmp_path: Path, corpus: Path) -> None:
    made = _tool("train_tokenizer", "--input", corpus, "--output", tmp_path / "t.json", "--vocabulary-size", "300")
    assert (made.returncode, made.stderr) == (0, "")
    made = _tool("tokenize", "--input", corpus, "--output-prefix", tmp_path / "out", "--tokenizer", tmp_path / "t.json",
                 "--processes", "1", "--json")  # fmt: skip
    assert (made.returncode, made.stderr) == (0, "")
    assert json.loads(made.stdout)["documents"] == len(TEXTS)
    shown = _tool("inspect", tmp_path / "out", "--json", "--document", "5")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert json.loads(shown.stdout)["sample"]["text"].startswith("Dokument 5: ")


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("tokenize", ["--input", "gone.jsonl", "--output-prefix", "x"], "gone.jsonl: no such file"),
        ("train_tokenizer", ["--input", "gone.jsonl", "--output", "x.json"], "gone.jsonl: No such file"),
        ("inspect", ["gone"], "gone.idx: no such file"),
    ],
)
def test_data_commands_bad_input_is_one_line_and_exit_2(name: str, arguments: list[str], words: str) -> None:
    ran = _tool(name, *arguments)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    assert words in ran.stderr
