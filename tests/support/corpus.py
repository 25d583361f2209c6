"""Small data for tests: token files without a sidecar, token streams in memory, text files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keepwarm.trainer.data.packing import PackedSource
from keepwarm.trainer.data.table import Ints
from keepwarm.trainer.data.token_format import TokenFileWriter


def random_documents(seed: int, count: int, *, vocabulary: int = 200, longest: int = 40) -> list[list[int]]:
    """Documents of 1 to `longest` tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, int(rng.integers(1, longest + 1))).tolist() for _ in range(count)]


def write_token_file(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> Path:
    """A token file as Megatron-LM's preprocessing writes it, without a sidecar of ours."""
    with TokenFileWriter(Path(f"{prefix}.bin"), dtype) as writer:
        for document in documents:
            writer.add_document(document, [len(document)])
        writer.finish(Path(f"{prefix}.idx"))
    return prefix


def write_json_lines(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@dataclass(frozen=True)
class MemoryTokens:
    """Documents in memory, for properties that need many small sources."""

    documents: tuple[tuple[int, ...], ...]
    path: str = "memory"

    @property
    def content(self) -> str:
        return f"{hash(self.documents):x}"

    @property
    def stream(self) -> Ints:
        return np.array([token for document in self.documents for token in document], np.int64)

    @property
    def count(self) -> int:
        return len(self.stream)

    def read(self, start: int, count: int) -> Ints:
        return self.stream[start : start + count]

    def prefixes_between(self, start: int, end: int) -> list[tuple[int, int]]:
        return []

    def starts_between(self, start: int, end: int) -> Ints:
        starts = {sum(map(len, self.documents[:i])) for i in range(len(self.documents))}
        return np.array(sorted(s for s in starts if start <= s < end), np.int64)


def counting_source(name: str, samples: int, *, first: int = 0, sequence_length: int = 4) -> PackedSource:
    """A source whose window w holds the tokens first + w * length + (0, 1, ...), so that tokens tell the window."""
    tokens = tuple(range(first, first + samples * sequence_length + 1))
    return PackedSource(name, MemoryTokens((tokens,)), sequence_length)
