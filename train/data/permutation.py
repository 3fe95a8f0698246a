"""Grain's order of an epoch, for many positions at once.

Grain's `index_shuffle` (grain/_src/python/experimental/index_shuffle/index_shuffle.cc) gives one
position a call. Here is the same permutation in arrays, eight times as fast: four rounds of the
block cipher Simon, over and over until the number is that of a row.
"""

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int32, Int64, UInt64

_ROUNDS = 4
_LEAST_BITS = 16  # of the cipher's numbers
_FEW = 2**13  # rows, of which one is found after many turns: better one by one


def permuted(positions: Int64[np.ndarray, " P"], n: int, seed: int) -> Int32[np.ndarray, " P"]:
    """The rows of 0 .. n-1 that stand at these positions of an order.

    Args:
        seed: 32 bits, as `grain.MapDataset.shuffle` takes it.
    """
    if n < _FEW:
        one_by_one = (
            index_shuffle(int(i), max_index=n - 1, seed=seed, rounds=_ROUNDS) for i in positions
        )
        return np.fromiter(one_by_one, np.int32, len(positions))
    found = positions.astype(np.uint64)
    keys = _seed_sequence(seed, _ROUNDS)
    bits = (n - 2).bit_length()  # ceil(log2(n - 1))
    half = max(bits + bits % 2, _LEAST_BITS) // 2
    beyond = np.arange(len(found))
    while len(beyond):
        found[beyond] = _encrypted(found[beyond], keys, half)
        beyond = beyond[found[beyond] >= n]
    return found.astype(np.int32)


def _encrypted(
    numbers: UInt64[np.ndarray, " P"], keys: list[int], half: int
) -> UInt64[np.ndarray, " P"]:
    """Simon's rounds, over two halves of so many bits."""
    mask = np.uint64((1 << half) - 1)

    def turned(x: UInt64[np.ndarray, " P"], by: int) -> UInt64[np.ndarray, " P"]:
        return (x << np.uint64(by)) | (x >> np.uint64(half - by))

    left, right = numbers >> np.uint64(half), numbers & mask
    for key in keys:
        mixed = (turned(right, 1) & turned(right, 8)) ^ turned(right, 2) ^ np.uint64(key)
        left, right = right, (left ^ mixed) & mask
    return (left << np.uint64(half)) | right


def _seed_sequence(seed: int, count: int) -> list[int]:
    """What C++'s `std::seed_seq{seed}` gives for less than 7 words (C++, [rand.util.seedseq])."""
    word = 2**32
    given, made = [seed % word], [0x8B8B8B8B] * count
    t = (count - 1) // 2
    p = (count - t) // 2
    steps = max(len(given) + 1, count)

    def mixed(x: int, factor: int) -> int:
        x %= word
        return factor * (x ^ x >> 27) % word

    for k in range(steps + count):
        here, near, far, before = (at % count for at in (k, k + p, k + p + t, k - 1))
        if k < steps:
            first = mixed(made[here] ^ made[near] ^ made[before], 1664525)
            more = len(given) if k == 0 else here + (given[k - 1] if k <= len(given) else 0)
            second = (first + more) % word
            made[near] = (made[near] + first) % word
            made[far] = (made[far] + second) % word
        else:
            first = mixed(made[here] + made[near] + made[before], 1566083941)
            second = (first - here) % word
            made[near] ^= first
            made[far] ^= second
        made[here] = second
    return made
