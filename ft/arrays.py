"""The type of raw memory that all of `ft` passes around."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
"""A one-dimensional array of bytes; often a view of shared memory, which its owner keeps mapped."""
