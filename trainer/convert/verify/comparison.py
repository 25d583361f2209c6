"""Compare the logits of two models on a fixed prompt, one model after the other."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch

from keepwarm.trainer.convert.verify.opened import Opened, Rounding
from keepwarm.trainer.errors import CheckpointError

TOKENS = 128
"""Length of the prompt, at most."""
TOLERANCE = 1e-4
"""Of the largest difference, relative to the largest logit, where both compute in fp32 with the same weights."""
OF_ROUNDED = {"F16": 1e-2, "BF16": 1e-1}
"""The same where weights have been rounded, and not all of them to one dtype."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was found; `as_json` has the fields of the command's answer."""

    tokens: int
    difference: float
    """Largest difference of two logits."""
    relative: float
    """By what the largest logit of the source is in absolute value."""
    tolerance: float
    position: int
    token: int
    """Where the largest difference is."""
    same_choice: int
    """At how many positions both give the same token the largest logit."""
    rounded: str | None
    """The dtype to which the weights of the source were rounded first."""

    @property
    def equal(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.relative <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        """Return the fields, and whether the models are equal."""
        return {**asdict(self), "equal": self.equal}

    def __str__(self) -> str:
        verdict = "equal" if self.equal else f"NOT EQUAL (at position {self.position}, token {self.token})"
        rounded = f"; weights of the source rounded to {self.rounded}" if self.rounded else ""
        return (
            f"logits of {self.tokens} tokens: {verdict}; largest difference {self.difference:.3g}, "
            f"{self.relative:.2g} of the largest logit, tolerance {self.tolerance:.2g}{rounded}; "
            f"same next token at {self.same_choice} of {self.tokens}"
        )


def prompt(vocabulary: int, length: int) -> torch.Tensor:
    """Return token ids `[length]` that are the same everywhere and lie all over the vocabulary."""
    # Knuth's multiplicative hash: its high bits are well mixed.
    spread = (torch.arange(1, length + 1) * 2654435761) % 2**32
    return (spread * vocabulary) >> 32


def compare(source: Opened, result: Opened, tolerance: float | None = None) -> Comparison:
    """Compute one model, then the other, in fp32; neither is in memory as a whole.

    Where all weights of the result have one dtype, those of the source are rounded to it first, so that what is left
    is the difference of two computations.

    Raises:
        CheckpointError: a tensor is missing, left over, damaged or does not fit; names it.
    """
    if source.vocabulary != result.vocabulary:
        raise CheckpointError(f"vocabularies of {source.vocabulary} and {result.vocabulary} tokens")
    rounded = next(iter(result.dtypes)) if len(result.dtypes) == 1 and source.dtypes != result.dtypes else None
    tokens = prompt(source.vocabulary, min(TOKENS, source.context, result.context))
    expected = source.logits(tokens, Rounding(rounded))
    found = result.logits(tokens, Rounding())
    limit = allowed(source.dtypes, result.dtypes) if tolerance is None else tolerance
    return found_in(expected, found, limit, rounded)


def allowed(source: Collection[str], result: Collection[str]) -> float:
    """Return the tolerance for weights of these dtypes."""
    if set(source) == set(result) or len(result) == 1:
        return TOLERANCE
    return max((OF_ROUNDED.get(dtype, TOLERANCE) for dtype in (*source, *result)), default=TOLERANCE)


def found_in(expected: torch.Tensor, found: torch.Tensor, tolerance: float, rounded: str | None) -> Comparison:
    """Compare logits `[sequence, vocabulary]`."""
    apart = (found - expected).abs()
    # NaN counts as the largest.
    largest = torch.where(apart.isnan(), torch.inf, apart)
    at = int(largest.argmax())
    return Comparison(
        tokens=len(expected),
        difference=float(largest.flatten()[at]),
        relative=float(largest.flatten()[at] / expected.abs().max()),
        tolerance=tolerance,
        position=at // expected.shape[1],
        token=at % expected.shape[1],
        same_choice=int((expected.argmax(-1) == found.argmax(-1)).sum()),
        rounded=rounded,
    )
