"""Type of raw memory used throughout `ft`."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
"""A one-dimensional byte array, often a view of shared memory that its owner keeps mapped."""
