"""Where packed documents lie in rows of their own, in which attention sees each by itself.

A run has a few shapes of such rows, (n, L): n rows of L positions for each sequence of a
micro-batch. They hold the documents of each of its micro-batches, so that the step is compiled
once.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from jllama.attention import Documents

WIDTH = 32  # rows are a multiple of this long, or as long as a sequence
SHAPES = 3  # at most so many
WORTH = 0.9  # of the positions with fewer shapes, or one more is not worth its kernels

Shapes = tuple[tuple[int, int], ...]  # (rows for each sequence, positions in each), shortest first


def widths(max_seq_len: int) -> Int[np.ndarray, " W"]:
    """Lengths that rows may have."""
    return np.append(np.arange(WIDTH, max_seq_len, WIDTH), max_seq_len)


def longer_than(
    lengths: Int[np.ndarray, " rows"], batches: Int[np.ndarray, " rows"], max_seq_len: int
) -> Int[np.ndarray, " W"]:
    """How many documents longer than 0, and than each of `widths` but the last, a micro-batch has.

    Args:
        lengths: positions of every document.
        batches: number of the micro-batch in which it lies.
    """
    possible = widths(max_seq_len)
    counts = np.zeros((int(batches.max(initial=0)) + 1, len(possible)), np.int64)
    np.add.at(counts, (batches, np.searchsorted(possible, lengths)), 1)
    return counts[:, ::-1].cumsum(axis=1)[:, ::-1].max(axis=0)


def shapes_for(longer: Int[np.ndarray, " W"], batch: int, max_seq_len: int) -> Shapes:
    """The shapes with the fewest positions that hold every micro-batch of `batch` sequences.

    Args:
        longer: of `longer_than`, the most that any micro-batch has.

    Rows of L1 < L2 < ... suffice if, for each i, those longer than L(i-1) are as many as the
    documents that are. So the positions are a sum over the steps from one length to the next, and
    the best steps to each length follow from the best to all shorter ones.
    """
    possible = np.append(0, widths(max_seq_len))
    needed = np.append(-(-longer // batch), 0)  # rows longer than each
    longest = int(np.flatnonzero(needed[:-1] > 0)[-1]) + 1
    best, steps = np.append(0.0, np.full(longest, np.inf)), []
    totals = []
    for _ in range(SHAPES):
        # From every shorter length (rows) to every longer one (columns).
        cost = (needed[: longest + 1, None] - needed[None, : longest + 1]) * possible[: longest + 1]
        total = np.where(np.tri(longest + 1, k=-1).T > 0, best[:, None] + cost, np.inf)
        steps.append(total.argmin(axis=0))
        best = total.min(axis=0)
        totals.append(best[-1])
    count = 1 + max((i for i in range(1, SHAPES) if totals[i] < WORTH * totals[i - 1]), default=0)
    shapes, at = [], longest
    for came_from in reversed(steps[:count]):
        before = int(came_from[at])
        shapes.append((int(needed[before] - needed[at]), int(possible[at])))
        at = before
    return tuple(shape for shape in reversed(shapes) if shape[0])


def evenly(tokens: int, max_seq_len: int) -> Shapes:
    """The shapes of sequences that are filled with documents of so many tokens."""
    length = min(tokens, max_seq_len)
    rows = widths(max_seq_len)
    return ((-(-max_seq_len // length), int(rows[np.searchsorted(rows, length)])),)


def lay_out(
    sequences: Sequence[Sequence[int] | Int[np.ndarray, " docs"]],
    shape: tuple[int, int],
    shapes: Shapes,
    devices: int = 1,
) -> tuple[Documents, ...]:
    """The rows of one micro-batch.

    Args:
        sequences: the lengths of the documents of each sequence, which lie one after the other.
        shape: (B, T) of the micro-batch.
        devices: to which its sequences are dealt; the documents of each stay with it.

    Raises:
        ValueError: if the documents have no room in these shapes.
    """
    B, T = shape
    if devices > 1:
        dealt = (sequences[i : i + B // devices] for i in range(0, B, B // devices))
        return _together(np.concatenate, [lay_out(x, (B // devices, T), shapes) for x in dealt])
    begins, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for number, some in enumerate(sequences):
        lengths.append(np.asarray(some, np.int32))
        begins.append(number * T + np.cumsum(lengths[-1]) - lengths[-1])
    start, length = np.concatenate(begins), np.concatenate(lengths)
    longest_first = np.argsort(-length, kind="stable")
    found: list[Documents] = []
    for n, L in reversed(shapes):
        here, longest_first = np.split(longest_first, [n * B])
        if (length[here] > L).any():
            break
        place = np.arange(L, dtype=np.int32)
        filled = place < length[here, None]
        rows = np.full((n * B, L), B * T, np.int32)
        rows[: len(here)] = np.where(filled, start[here, None] + place, B * T)
        places = np.full(B * T, rows.size, np.int32)
        places[rows[: len(here)][filled]] = np.flatnonzero(filled)
        found.insert(0, Documents(rows, places.reshape(B, T)))
    if len(found) < len(shapes) or len(longest_first):
        raise ValueError(f"documents of {sorted(length)[::-1]} positions do not fit in {shapes}")
    return tuple(found)


def stacked(micro_batches: Sequence[tuple[Documents, ...]]) -> tuple[Documents, ...]:
    """Those of several micro-batches, their arrays one axis larger."""
    return _together(np.stack, micro_batches)


def _together(
    join: Callable[..., np.ndarray], several: Sequence[tuple[Documents, ...]]
) -> tuple[Documents, ...]:
    by_shape = zip(*several, strict=True)
    return tuple(Documents(*map(join, zip(*of, strict=True))) for of in by_shape)
