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
from keepwarm.trainer.data.preprocess.part_pool import process_count
from keepwarm.trainer.data.preprocess.progress import LogObserver, Observer
from keepwarm.trainer.data.preprocess.tokenize import _parts_folder, tokenize
from keepwarm.trainer.data.preprocess.tokenize_options import TextOptions
from keepwarm.trainer.data.preprocess.train_tokenizer import train_tokenizer
from keepwarm.trainer.errors import DataError, OutputError
from tests.support.corpus import write_json_lines
from tests.support.foreign.megatron_tokens import megatron_indexed

TEXTS = [f"Dokument {i}: " + "äöü " * (i * 13 % 29) for i in range(120)]
ROOT = Path(__file__).parents[3]
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
    ran = subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path), str(processes), moment],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}/src:{ROOT}", "PYTHONWARNINGS": "ignore"},
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


INTERRUPTED = """
    import os, signal, sys
    from pathlib import Path
    from keepwarm.trainer import tool
    from keepwarm.trainer.data.preprocess.progress import Observer
    from keepwarm.trainer.data.preprocess.tokenize import tokenize
    from keepwarm.trainer.data.preprocess.tokenize_options import TextOptions

    class Interrupt(Observer):
        parts = 0
        def read(self, count):
            self.parts += 1
            if self.parts == 3:
                os.killpg(0, signal.SIGINT)

    def app():
        folder = Path(sys.argv[1])
        options = TextOptions(part_bytes=700)
        tokenize([folder / "corpus.jsonl"], folder / "out", "bytes", options, processes=int(sys.argv[2]),
                 observer=Interrupt())

    if __name__ == "__main__":
        tool.run(app)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_tokenize_interrupted_and_restarted_gives_same_bytes(tmp_path: Path, corpus: Path, processes: int) -> None:
    tokenize([corpus], tmp_path / "whole", "bytes", TextOptions(part_bytes=SMALL))
    script = tmp_path / "interrupted.py"
    script.write_text(textwrap.dedent(INTERRUPTED))
    command = [sys.executable, "-P", str(script), str(tmp_path), str(processes)]
    environment = {"PYTHONPATH": f"{ROOT}/src:{ROOT}", "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, start_new_session=True
    )
    assert (ran.returncode, ran.stderr) == (130, "interrupted\n")
    assert not [path for path in _left_in(tmp_path) if path in ("out.bin", "out.idx", "out.json")]
    assert len([*(tmp_path / "out.parts").glob("*.npz")]) >= 3
    tokenize([corpus], tmp_path / "out", "bytes", TextOptions(part_bytes=SMALL))
    assert _digest(tmp_path / "out") == _digest(tmp_path / "whole")


@pytest.mark.parametrize("limit", [1000, 20_000], ids=["at a part", "at the merge"])
def test_tokenize_file_that_may_not_grow_leaves_nothing_half_written(tmp_path: Path, limit: int) -> None:
    """A real error of the kernel while a file is written, as on a full disk."""
    corpus = write_json_lines(tmp_path / "corpus.jsonl", ["x" * 500] * 100)
    tokenize([corpus], tmp_path / "whole", "bytes", TextOptions(part_bytes=SMALL))
    script = textwrap.dedent(f"""
        import resource, sys
        from pathlib import Path
        from keepwarm.trainer import tool
        from keepwarm.trainer.data.preprocess.tokenize import tokenize
        from keepwarm.trainer.data.preprocess.tokenize_options import TextOptions
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        folder = Path({str(tmp_path)!r})
        tool.run(lambda: tokenize([folder / "corpus.jsonl"], folder / "out", "bytes", TextOptions(part_bytes={SMALL})))
    """)
    environment = {"PYTHONPATH": f"{ROOT}/src:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.count("\n") == 1
    assert "cannot write: File too large" in ran.stderr
    assert not [path for path in _left_in(tmp_path) if path in ("out.bin", "out.idx", "out.json")]
    tokenize([corpus], tmp_path / "out", "bytes", TextOptions(part_bytes=SMALL))
    assert _digest(tmp_path / "out") == _digest(tmp_path / "whole")


def test_tokenize_part_that_a_loss_of_power_damaged_is_made_again(tmp_path: Path, corpus: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(corpus.read_text() + "{\n")
    with pytest.raises(DataError):
        tokenize([broken], tmp_path / "out", "bytes", TextOptions(part_bytes=SMALL))
    damaged = sorted((tmp_path / "out.parts").glob("*.npz"))[:2]
    damaged[0].write_bytes(b"")
    damaged[1].write_bytes(damaged[1].read_bytes()[:-30])
    for _ in damaged:
        with pytest.raises(OutputError, match="a damaged part, now removed: run the same command again"):
            tokenize([corpus], tmp_path / "out", "bytes", TextOptions(part_bytes=SMALL))
    tokenize([corpus], tmp_path / "out", "bytes", TextOptions(part_bytes=SMALL))
    tokenize([corpus], tmp_path / "whole", "bytes", TextOptions(part_bytes=SMALL))
    assert _digest(tmp_path / "out") == _digest(tmp_path / "whole")


def test_tokenize_bad_lines_are_counted_and_named(tmp_path: Path, corpus: Path) -> None:
    lines = corpus.read_text().splitlines()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([*lines[:60], "{", '["text"]', *lines[60:], "null", "3"]))
    tokenize([corpus], tmp_path / "good", "bytes", TextOptions(part_bytes=SMALL))
    options = TextOptions(part_bytes=SMALL, skip_bad_lines=True)
    for name, processes in (("one", 1), ("two", 2)):
        seen = Observer()
        sidecar = tokenize([mixed], tmp_path / name, "bytes", options, processes=processes, observer=seen)
        assert (sidecar.skipped, sidecar.documents) == (4, len(TEXTS))
        assert seen.bad == 4
        assert [one.split(": ")[0] for one in seen.examples] == [f"{mixed}:{number}" for number in (61, 62, 123)]
        assert (tmp_path / f"{name}.bin").read_bytes() == (tmp_path / "good.bin").read_bytes()
    with pytest.raises(DataError, match=r"mixed\.jsonl:61: not JSON"):
        tokenize([mixed], tmp_path / "refused", "bytes", TextOptions(part_bytes=SMALL))


def test_tokenize_log_gets_lines_while_it_lasts(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = LogObserver("tokenize", corpus.stat().st_size, interval=0.0)
    tokenize([corpus], tmp_path / "out", "bytes", TextOptions(part_bytes=SMALL), observer=seen)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("tokenize: 0 of 0 MB read, ")
    assert lines[-1].endswith("parts merged")


@pytest.mark.parametrize(
    ("most", "input_bytes", "cores", "processes"),
    [
        (None, 10**6, 64, 1), (None, 2**40, 2, 1), (None, 2**40, 64, 8), (None, 2**30, 64, 4), (None, 0, 1, 1),
        (2, 15 * 10**6, 2, 1), (2, 64 << 20, 2, 2), (8, 100 << 20, 64, 3), (3, 0, 1, 1),
    ],
)  # fmt: skip
def test_tokenize_number_of_processes_follows_input_and_cores(
    most: int | None, input_bytes: int, cores: int, processes: int
) -> None:
    assert process_count(most, input_bytes, cores) == processes


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
