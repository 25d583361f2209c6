"""The `.bin`/`.idx` format, compared with Megatron Core's own reader and builder in both directions."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.trainer.data.token_format import CODES, DTYPES, LONGEST, TokenFileReader, TokenFileWriter, dtype_for
from tests.support.corpus import write_json_lines
from tests.support.foreign.megatron_tokens import build, megatron_indexed

ROOT = Path(__file__).parents[3]
Document = tuple[list[int], list[int]]
TYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]


def write(prefix: Path, documents: Sequence[Document], dtype: type) -> Path:
    with TokenFileWriter(Path(f"{prefix}.bin"), dtype) as writer:
        for tokens, lengths in documents:
            writer.add_document(tokens, lengths)
        writer.finish(Path(f"{prefix}.idx"))
    return prefix


def read(prefix: Path) -> TokenFileReader:
    return TokenFileReader(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))


@st.composite
def corpora(draw: st.DrawFn) -> list[Document]:
    """Documents of any number of sequences, empty documents and empty sequences among them; at least one token."""
    split = draw(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=12).filter(_holds_a_token))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return [(rng.integers(0, 128, sum(lengths)).tolist(), lengths) for lengths in split]


def _holds_a_token(split: list[list[int]]) -> bool:
    return any(sum(lengths) for lengths in split)


@pytest.mark.parametrize("dtype", TYPES)
def test_writer_any_documents_equals_megatron_builder_bytewise(
    dtype: type, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(max_examples=25)
    @given(corpora())
    def compare(documents: list[Document]) -> None:
        folder = tmp_path_factory.mktemp("files")
        write(folder / "ours", documents, dtype)
        build(folder / "theirs", documents, dtype)
        for suffix in (".bin", ".idx"):
            assert (folder / f"ours{suffix}").read_bytes() == (folder / f"theirs{suffix}").read_bytes()

    compare()


@pytest.mark.parametrize("dtype", TYPES)
def test_reader_of_megatron_files_equals_megatron_reader(dtype: type, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(max_examples=25)
    @given(corpora())
    def compare(documents: list[Document]) -> None:
        prefix = build(tmp_path_factory.mktemp("files") / "theirs", documents, dtype)
        ours, theirs = read(prefix), megatron_indexed().IndexedDataset(str(prefix))
        assert ours.header.dtype == np.dtype(theirs.index.dtype)
        assert ours.lengths.tolist() == theirs.sequence_lengths.tolist()
        assert ours.offsets.tolist() == theirs.index.sequence_pointers.tolist()
        assert ours.boundaries.tolist() == theirs.document_indices.tolist()
        assert ours.documents == len(documents)
        for sequence, length in enumerate(ours.lengths.tolist()):
            if length:
                mine = ours.tokens(ours.first_token(sequence), length)
                assert mine.dtype == theirs[sequence].dtype
                assert mine.tolist() == theirs[sequence].tolist()

    compare()


def test_writer_files_are_read_by_megatron(tmp_path: Path) -> None:
    documents: list[Document] = [([1, 2, 3], [1, 2]), ([], []), ([65_499], [1])]
    theirs = megatron_indexed().IndexedDataset(str(write(tmp_path / "ours", documents, np.uint16)))
    assert [theirs[i].tolist() for i in range(len(theirs))] == [[1], [2, 3], [65_499]]
    assert theirs.document_indices.tolist() == [0, 2, 2, 3]


def test_dtype_codes_equal_megatron() -> None:
    theirs = megatron_indexed().DType
    assert {code: np.dtype(theirs.dtype_from_code(code)) for code in DTYPES} == {
        code: np.dtype(name) for code, name in DTYPES.items()
    }
    assert {one.name for one in theirs} - {dtype.name for dtype in CODES} == {"float32", "float64"}


@pytest.mark.parametrize("vocabulary_size", [1, 257, 65_499, 65_500, 65_536, 10**6])
def test_dtype_for_vocabulary_equals_megatron(vocabulary_size: int) -> None:
    assert dtype_for(vocabulary_size) is megatron_indexed().DType.optimal_dtype(vocabulary_size)


@pytest.mark.parametrize("lengths", [[2], [4], [-1, 4], [], [LONGEST + 1]])
def test_writer_contradictory_lengths_are_refused(lengths: list[int], tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path / "c.bin", np.uint16) as writer, pytest.raises(ValueError, match="of 3"):
        writer.add_document([1, 2, 3], lengths)


def test_writer_type_without_code_opens_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        TokenFileWriter(tmp_path / "c.bin", np.float32)
    assert not (tmp_path / "c.bin").exists()


def test_reader_tokens_outlive_their_reader(tmp_path: Path) -> None:
    tokens = read(write(tmp_path / "c", [([5, 6, 7], [3])], np.uint16)).tokens(1, 2)
    assert tokens.tolist() == [6, 7]
    assert not tokens.flags.writeable


def test_tokenize_and_open_import_neither_torch_nor_megatron(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "corpus.jsonl", ["one", "two"])
    code = f"""
import sys
from pathlib import Path
from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.preprocess.tokenize import tokenize
tokenize([Path({str(corpus)!r})], Path({str(tmp_path / "out")!r}), "bytes")
assert TokenFile({str(tmp_path / "out")!r}).documents == 2
print(*(name for name in ("torch", "megatron") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
