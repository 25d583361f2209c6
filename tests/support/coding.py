"""Parity of whole chunks as the members of a stripe make it: each its own row, one column after the other."""

from collections.abc import Sequence

import numpy as np

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.codec.reed_solomon import Buffer, Codec


def encoded(codec: Codec, data: Sequence[Buffer]) -> list[Bytes]:
    """The m parity chunks of k data chunks of one size."""
    parity = [np.zeros(memoryview(data[0]).nbytes, np.uint8) for _ in range(codec.m)]
    for row, chunk in enumerate(parity):
        for column, source in enumerate(data):
            codec.row(row).accumulate(chunk, column, source)
    return parity
