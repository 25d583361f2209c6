"""A keyed pseudorandom permutation of [0, size) with random access and no memory.

An alternating Feistel network over Z_a x Z_b with a * b just above `size` (Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002); values that fall outside follow their cycle until they fall inside. NumPy only.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import numpy as np
import numpy.typing as npt

from keepwarm.trainer.data.table import Ints

ROUNDS = 8
_FEW = 16
"""Up to this many indices, Python integers are faster: mixtures ask each of hundreds of sources for one or two."""
_MASK = 2**64 - 1
_Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Permutation:
    """A bijection of [0, size), fixed by its key; size at most 2**62."""

    size: int
    key: bytes

    def forward(self, indices: Ints) -> Ints:
        """Return the image of each index, int64 of the same shape."""
        if indices.size <= _FEW:
            return np.array([self.image(int(index)) for index in indices.flat], np.int64).reshape(indices.shape)
        return self._walk(indices, self._encrypt)

    def inverse(self, images: Ints) -> Ints:
        """Return the index of each image: `inverse(forward(i)) == i`."""
        return self._walk(images, self._decrypt)

    def _walk(self, values: Ints, apply: Callable[[_Words], _Words]) -> Ints:
        if values.size and not (values.min() >= 0 and values.max() < self.size):
            raise IndexError(f"index outside [0, {self.size})")
        out = apply(values.astype(np.uint64).reshape(-1))
        outside = np.flatnonzero(out >= self.size)
        while outside.size:
            out[outside] = apply(out[outside])
            outside = outside[out[outside] >= self.size]
        return out.astype(np.int64).reshape(values.shape)

    def image(self, index: int) -> int:
        """Return `forward` of one index."""
        if not 0 <= index < self.size:
            raise IndexError(f"index outside [0, {self.size})")
        high_size, low_size = (int(half) for half in _halves(self.size))
        words = [int(word) for word in _round_words(self.key)]
        while True:
            high, low = divmod(index, low_size)
            for turn, word in enumerate(words):
                if turn % 2:
                    low = (low + _mix_one(high, word) % low_size) % low_size
                else:
                    high = (high + _mix_one(low, word) % high_size) % high_size
            index = high * low_size + low
            if index < self.size:
                return index

    def _encrypt(self, values: _Words) -> _Words:
        high_size, low_size = _halves(self.size)
        high, low = np.divmod(values, low_size)
        for turn, word in enumerate(_round_words(self.key)):
            if turn % 2:
                low = (low + _mix(high, word) % low_size) % low_size
            else:
                high = (high + _mix(low, word) % high_size) % high_size
        return high * low_size + low

    def _decrypt(self, values: _Words) -> _Words:
        high_size, low_size = _halves(self.size)
        high, low = np.divmod(values, low_size)
        for turn, word in reversed(list(enumerate(_round_words(self.key)))):
            if turn % 2:
                low = (low + low_size - _mix(high, word) % low_size) % low_size
            else:
                high = (high + high_size - _mix(low, word) % high_size) % high_size
        return high * low_size + low


def _halves(size: int) -> tuple[np.uint64, np.uint64]:
    """Return the sizes a and b of the two halves: a * b >= size, and less than size + a."""
    high = isqrt(max(size, 1) - 1) + 1
    return np.uint64(high), np.uint64(-(-size // high))


@lru_cache(maxsize=256)
def _round_words(key: bytes) -> tuple[np.uint64, ...]:
    digest = hashlib.shake_128(key).digest(8 * ROUNDS)
    return tuple(np.frombuffer(digest, "<u8").astype(np.uint64))


def _mix(values: _Words, word: np.uint64) -> _Words:
    """Apply the finaliser of splitmix64 (Steele et al., 2014) to values shifted by a round word."""
    z = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + word
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_one(value: int, word: int) -> int:
    """Return `_mix` of one value."""
    z = ((value + 1) * 0x9E3779B97F4A7C15 + word) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def counter_words(key: bytes, counters: Ints) -> _Words:
    """Return uniform 64-bit words, one per counter, from a counter-based generator with this key."""
    first, second, *_ = _round_words(key)
    return _mix(_mix(counters.astype(np.uint64), first), second)


def window_at(k: Ints, *, seed: int, identity: str, size: int) -> Ints:
    """Return the window of a source's k-th sample: each epoch of `size` samples has its own permutation."""

    def of_epoch(epoch: int) -> Permutation:
        return Permutation(size, f"{seed}/{identity}/{epoch}".encode())

    if k.size <= _FEW:
        wanted = (divmod(one, size) for one in k.flat)
        return np.array([of_epoch(int(epoch)).image(int(place)) for epoch, place in wanted], np.int64).reshape(k.shape)
    epochs, places = np.divmod(k, size)
    windows = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        windows[chosen] = of_epoch(int(epoch)).forward(places[chosen])
    return windows
