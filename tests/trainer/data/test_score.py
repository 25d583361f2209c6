"""A high-quality subset of scored documents."""

import json
from pathlib import Path

import pytest

from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.preprocess.score import Keep
from keepwarm.trainer.data.preprocess.tokenize import command, tokenize
from keepwarm.trainer.data.preprocess.tokenize_options import TextOptions
from keepwarm.trainer.errors import DataError, SpecError

SCORES = [0.5, -1.0, 3.0, 2.0, 2.0, 0.0, 1.0, 7.0]


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    path = tmp_path / "scored.jsonl"
    lines = [{"text": str(place), "quality": score} for place, score in enumerate(SCORES)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def kept(prefix: Path) -> list[int]:
    """Places of the documents that a token file of bytes holds."""
    file = TokenFile(prefix)
    return [int(bytes(file.document(index)[:-1].tolist()).decode()) for index in range(file.documents)]


@pytest.mark.parametrize(
    ("least", "top", "expected"),
    [
        (1.0, None, [2, 3, 4, 6, 7]),
        (8.0, None, []),
        (None, 0.25, [2, 7]),
        (None, 0.375, [2, 3, 4, 7]),
        (None, 1.0, list(range(8))),
    ],
)
def test_score_threshold_or_top_fraction_selects_documents(
    scored: Path, tmp_path: Path, least: float | None, top: float | None, expected: list[int]
) -> None:
    options = {"processes": 1, "score_key": "quality", "min_score": least, "top": top}
    if not expected:
        with pytest.raises(DataError, match="contains no text"):
            command([scored], tmp_path / "out", **options)  # type: ignore[arg-type]
        return
    command([scored], tmp_path / "out", **options)  # type: ignore[arg-type]
    assert kept(tmp_path / "out") == expected


def test_score_parts_of_another_threshold_are_not_reused(scored: Path, tmp_path: Path) -> None:
    tokenize([scored], tmp_path / "best", "bytes", TextOptions(keep=Keep(key="quality", least=3.0), part_bytes=16))
    tokenize([scored], tmp_path / "good", "bytes", TextOptions(keep=Keep(key="quality", least=2.0), part_bytes=16))
    assert (kept(tmp_path / "best"), kept(tmp_path / "good")) == ([2, 7], [2, 3, 4, 7])


@pytest.mark.parametrize("value", ["true", '"high"', "null", "NaN"])
def test_score_missing_in_a_document_is_named(scored: Path, tmp_path: Path, value: str) -> None:
    scored.write_text(scored.read_text() + f'{{"text": "x", "quality": {value}}}\n')
    with pytest.raises(DataError, match=r"scored\.jsonl:9: no number at 'quality' \(--score-key\)"):
        tokenize([scored], tmp_path / "out", "bytes", TextOptions(keep=Keep(key="quality", least=0.0)))


def test_score_invalid_options_are_refused(scored: Path, tmp_path: Path) -> None:
    for options in ({"score_key": "quality"}, {"top": 0.5}, {"score_key": "quality", "top": 0.5, "min_score": 1.0}):
        with pytest.raises(SpecError, match="requires either --min-score or --top"):
            command([scored], tmp_path / "out", processes=1, **options)  # type: ignore[arg-type]
    plain = tmp_path / "plain.txt"
    plain.write_text("text")
    with pytest.raises(DataError, match="plain text has no scores"):
        command([plain], tmp_path / "out", processes=1, score_key="quality", top=0.5)
