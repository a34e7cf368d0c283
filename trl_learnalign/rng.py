"""Counter-based random numbers: pure functions of their purpose, independent of the order of draws.

All random choices of a selection (orders, ties, warm-up subsets, projection signs, rollout seeds) come from this
module, so they are the same on every rank, device, process count and NumPy version. The generator is SplitMix64
(Steele, Lea & Flood, 2014): a bijective mix of a 64-bit counter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key(*parts: int | str) -> int:
    """64-bit key of a tuple of names and numbers, e.g. ``key(seed, "order", phase)``."""
    # The first letter of the type distinguishes 1 from "1"; the separator distinguishes ("a", "bc") from ("ab", "c").
    tagged = [f"{type(part).__name__[0]}{part}" for part in parts]
    text = "\x1f".join(tagged)
    content = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(content, "little")


def digest(value: Any) -> str:
    """Digest of a JSON-like value, 16 hexadecimal digits, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return digest_of([text])


def digest_of(parts: Iterable[str]) -> str:
    """Digest of a sequence of strings, 16 hexadecimal digits."""
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        total.update(part.encode(errors="surrogatepass"))
        total.update(b"\n")
    return total.hexdigest()


def random_bits(stream: int, counters: np.ndarray) -> np.ndarray:
    """64 random bits for each counter.

    Args:
        stream (`int`): Key of the stream, from [`key`].
        counters (`np.ndarray`): Non-negative integers of any shape.

    Returns:
        `np.ndarray`: `uint64` of the same shape; a function of `(stream, counter)` alone.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        places = counters.astype(np.uint64) + np.uint64(1)
        state = np.uint64(stream) + places * _GAMMA
        state = _xor_shift(state, 30) * _MIX_1
        state = _xor_shift(state, 27) * _MIX_2
        return _xor_shift(state, 31)


def _xor_shift(state: np.ndarray, bits: int) -> np.ndarray:
    return state ^ (state >> np.uint64(bits))


def permutation(stream: int, items: np.ndarray) -> np.ndarray:
    """`items` (distinct non-negative integers) in a random order that depends on the items, not on their order."""
    items = np.sort(np.asarray(items, dtype=np.int64))
    draws = random_bits(stream, items)
    order = np.argsort(draws)  # four times as fast as a stable sort
    drawn = draws[order]
    if (drawn[1:] == drawn[:-1]).any():  # equal 64-bit draws are possible but very rare
        order = np.argsort(draws, kind="stable")
    return items[order]


def signs(stream: int, length: int) -> np.ndarray:
    """`length` independent fair signs, `float32` of -1 and +1."""
    bits = random_bits(stream, np.arange(length))
    # The highest bit; all bits of SplitMix64 are equally good.
    high = (bits >> np.uint64(63)).astype(np.float32)
    return np.float32(1) - np.float32(2) * high
