import struct
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.trainer.data.indexed import Sidecar, TokenFile, content_hash
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.packing import PackedSource
from keepwarm.trainer.data.token_format import TokenFileWriter, write_index
from keepwarm.trainer.errors import DataError
from tests.support.corpus import random_documents, write_token_file

DOCUMENTS = random_documents(1, 30)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_token_file(tmp_path / "corpus", DOCUMENTS)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_token_file_any_integer_type_returns_its_documents(tmp_path: Path, dtype: type) -> None:
    tokens = TokenFile(write_token_file(tmp_path / "corpus", DOCUMENTS, dtype), vocabulary_size=200)
    flat = [token for document in DOCUMENTS for token in document]
    assert (tokens.count, tokens.documents) == (len(flat), len(DOCUMENTS))
    assert tokens.read(0, tokens.count).tolist() == flat
    assert [tokens.document(i).tolist() for i in range(tokens.documents)] == DOCUMENTS


def test_token_file_documents_of_several_or_no_sequences_are_read(tmp_path: Path) -> None:
    """Megatron's preprocessing can split a document into sentences, and leaves empty documents in."""
    with TokenFileWriter(tmp_path / "c.bin", np.uint16) as writer:
        writer.add_document(np.arange(5), [2, 3])
        writer.add_document(np.arange(0), [])
        writer.add_document(np.arange(5, 9), [4])
        writer.add_document(np.arange(0), [])
        writer.finish(tmp_path / "c.idx")
    tokens = TokenFile(tmp_path / "c")
    assert [tokens.document(i).tolist() for i in range(4)] == [[0, 1, 2, 3, 4], [], [5, 6, 7, 8], []]
    assert sorted(set(tokens.starts_between(0, 9).tolist())) == [0, 5]
    assert tokens.starts_between(6, 9).tolist() == []
    assert PackedSource("c", tokens, 8, True).windows(np.array([0])).documents.tolist() == [[0] * 5 + [1] * 3]  # type: ignore[union-attr]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.data())
def test_starts_between_equals_counting(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    tokens = TokenFile(write_token_file(folder / "c", [[1] * length for length in lengths]))
    start = data.draw(st.integers(0, tokens.count))
    end = data.draw(st.integers(start, tokens.count))
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    assert tokens.starts_between(start, end).tolist() == [begin for begin in begins if start <= begin < end]


def _damage(prefix: Path, how: str) -> Path:
    """Break one of the two files; returns the one that the message must name."""
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    raw, documents = idx.read_bytes(), len(DOCUMENTS)
    lengths, pointers, boundaries = 34, 34 + 4 * documents, 34 + 12 * documents
    match how:
        case "no idx":
            idx.unlink()
        case "no bin":
            bin_.unlink()
            return bin_
        case "empty idx":
            idx.write_bytes(b"")
        case "empty bin":
            bin_.write_bytes(b"")
            return bin_
        case "short header":
            idx.write_bytes(raw[:20])
        case "short idx":
            idx.write_bytes(raw[:-1])
        case "long idx":
            idx.write_bytes(raw + b"\0")
        case "foreign":
            idx.write_bytes(b"PK\x03\x04" + raw)
        case "version":
            idx.write_bytes(raw[:9] + struct.pack("<Q", 2) + raw[17:])
        case "float":
            idx.write_bytes(raw[:17] + b"\x07" + raw[18:])
        case "huge count":
            idx.write_bytes(raw[:18] + struct.pack("<Q", 2**60) + raw[26:])
        case "multimodal":
            idx.write_bytes(raw + bytes(documents))
        case "negative length":
            idx.write_bytes(raw[:lengths] + struct.pack("<i", -5) + raw[lengths + 4 :])
        case "wild pointer":
            idx.write_bytes(raw[: pointers + 8] + struct.pack("<q", 2**40) + raw[pointers + 16 :])
        case "wild boundary":
            idx.write_bytes(raw[: boundaries + 8] + struct.pack("<q", 10**6) + raw[boundaries + 16 :])
        case "first boundary":
            idx.write_bytes(raw[:boundaries] + struct.pack("<q", 1) + raw[boundaries + 8 :])
        case "short bin":
            bin_.write_bytes(bin_.read_bytes()[:-2])
            return bin_
        case "long bin":
            bin_.write_bytes(bin_.read_bytes() + b"\0\0")
            return bin_
    return idx


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no idx", "no such file"),
        ("no bin", "no such file"),
        ("empty idx", "empty"),
        ("empty bin", "empty"),
        ("short header", "truncated"),
        ("short idx", "truncated"),
        ("long idx", "too long"),
        ("foreign", "not a Megatron index"),
        ("version", "version 2"),
        ("float", "dtype code 7"),
        ("huge count", "truncated"),
        ("multimodal", "multimodal"),
        ("negative length", "damaged"),
        ("wild pointer", "damaged"),
        ("wild boundary", "damaged"),
        ("first boundary", "damaged"),
        ("short bin", "truncated"),
        ("long bin", "too long"),
    ],
)
def test_token_file_damage_is_named(prefix: Path, how: str, words: str) -> None:
    named = _damage(prefix, how)
    with pytest.raises(DataError, match=words) as raised:
        TokenFile(prefix)
    assert str(raised.value).startswith(str(named))


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 33 + 20 * len(DOCUMENTS)), st.integers(1, 255))
def test_token_file_flipped_index_byte_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int
) -> None:
    """Either the file is refused, or what it describes lies inside the `.bin`."""
    folder = tmp_path_factory.mktemp("flipped")
    prefix = write_token_file(folder / "c", DOCUMENTS)
    raw = bytearray(Path(f"{prefix}.idx").read_bytes())
    raw[place] ^= flip
    Path(f"{prefix}.idx").write_bytes(raw)
    try:
        tokens = TokenFile(prefix)
    except DataError:
        return
    read = [tokens.document(i) for i in range(tokens.documents)]
    assert sum(map(len, read)) == tokens.count


def test_token_ids_outside_vocabulary_are_found_when_read(prefix: Path) -> None:
    highest = max(max(document) for document in DOCUMENTS)
    TokenFile(prefix, highest + 1).read(0, 10)
    source = PackedSource("x", TokenFile(prefix, highest), 8)
    with pytest.raises(DataError, match=rf"corpus\.bin: token id {highest} .* model\.vocabulary_size = {highest}"):
        source.windows(np.arange(source.size))


def test_token_ids_negative_are_found_when_read(tmp_path: Path) -> None:
    tokens = TokenFile(write_token_file(tmp_path / "c", [[1, -3, 2]], np.int32), 10)
    with pytest.raises(DataError, match="token id -3"):
        tokens.read(0, 3)


def _write_sidecar(prefix: Path, **changes: object) -> None:
    content = content_hash(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
    known = {"content": content, "tokenizer": "bytes", "tokenizer_hash": "bytes", "vocabulary_size": 257}
    counts = {"end_of_document": 256, "documents": 30, "tokens": 1, "max_id": 199}
    sidecar = Sidecar(**{**known, **counts, **changes})  # type: ignore[arg-type]
    Path(f"{prefix}.json").write_bytes(msgspec.json.encode(sidecar))


def test_token_ids_outside_vocabulary_are_found_at_open_with_sidecar(prefix: Path) -> None:
    _write_sidecar(prefix)
    TokenFile(prefix, 200)
    with pytest.raises(DataError, match="token id 199"):
        TokenFile(prefix, 199)


def test_sidecar_of_other_data_is_refused(prefix: Path) -> None:
    _write_sidecar(prefix, content="0" * 32)
    with pytest.raises(DataError, match=r"does not match the \.bin and \.idx"):
        TokenFile(prefix)


def test_sidecar_unrelated_json_is_ignored(prefix: Path) -> None:
    Path(f"{prefix}.json").write_text('{"hello": 1}')
    assert TokenFile(prefix).sidecar is None


def test_content_hash_is_independent_of_the_path(tmp_path: Path, prefix: Path) -> None:
    (tmp_path / "sub").mkdir()
    other = write_token_file(tmp_path / "sub" / "name", DOCUMENTS)
    changed = write_token_file(tmp_path / "changed", [[(DOCUMENTS[0][0] + 1) % 200, *DOCUMENTS[0][1:]], *DOCUMENTS[1:]])
    assert TokenFile(other).content == TokenFile(prefix).content != TokenFile(changed).content


def test_packed_source_of_a_billion_samples_uses_constant_memory(tmp_path: Path) -> None:
    samples, length, documents = 10**9, 4, 4
    total = samples * length + 1
    lengths = np.array([10**9] * (documents - 1) + [total - (documents - 1) * 10**9], np.int64)
    with (tmp_path / "huge.bin").open("wb") as stream:
        stream.truncate(total)
    write_index(tmp_path / "huge.idx", np.uint8, lengths.tolist(), list(range(documents + 1)))
    tracemalloc.start()
    try:
        source = PackedSource("huge", TokenFile(tmp_path / "huge"), length, True)
        ledger = Ledger(seed=1).opened({"huge": 1}, {"huge": source})
        assert source.size == samples
        draw = ledger.samples_at(np.array([0, 1, samples - 1, samples, 5 * samples]))
        read = source.read(draw.k, seed=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read.tokens.shape == (5, length)
    assert peak < 4 << 20
