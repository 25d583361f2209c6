"""Versions of Python and of other distributions that the tests were run with. Imports neither torch nor any of them."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.version import InvalidVersion, Version


@dataclass(frozen=True, slots=True)
class Range:
    """Releases from `lowest` to `highest`, both included, each as exact as it is written: 2.13.1 is in 2.11 to 2.13."""

    lowest: str
    highest: str

    def __str__(self) -> str:
        return self.lowest if self.lowest == self.highest else f"{self.lowest} to {self.highest}"

    def __contains__(self, version: str) -> bool:
        """Whether a release lies inside; a pre-release does not, and a local build (`+cpu`) counts as its release."""
        try:
            parsed = Version(version)
        except InvalidVersion:
            return False
        low, high = (Version(bound).release for bound in (self.lowest, self.highest))
        return not parsed.is_prerelease and low <= parsed.release[: len(low)] and parsed.release[: len(high)] <= high


TESTED: Mapping[str, Range] = {
    "python": Range("3.11", "3.13"),
    "torch": Range("2.11", "2.13"),
    "pyeclib": Range("1.8.0", "1.8.0"),
    "megatron-core": Range("0.16.1", "0.16.1"),
    "deepspeed": Range("0.19.8", "0.19.8"),
    "transformers": Range("5.23", "5.24"),
    "lm-eval": Range("0.4.13", "0.4.13"),
    "s3fs": Range("2026.9.0", "2026.9.0"),
}
"""By distribution; `python` is the interpreter. Widen a range when the tests have passed with the new version."""


def splits_custom_backward(torch: str) -> bool:
    """Whether this torch can split the backward of autograd functions written in Python, as zero bubble does."""
    return Version(torch).release >= (2, 13)


def installed(distribution: str) -> str | None:
    """Return the version that is installed, None where it is not."""
    if distribution == "python":
        return platform.python_version()
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
