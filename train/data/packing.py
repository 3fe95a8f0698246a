"""Rows put together into sequences: a greedy loop, held in arrays."""

from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32, Int64

OPEN_SEQUENCES = 32  # that packing tries to fill at a time
_BITS = 40  # of the number of a sequence


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of an epoch; `sequences[i]` is the rows of one.

    rows  [0 1 2 3 ...]    ends  [2 4 ...]  ->  [0 1], [2 3], ...
    """

    rows: Int32[np.ndarray, " rows"]
    ends: Int64[np.ndarray, " sequences"]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Int32[np.ndarray, " some"]:
        return self.rows[self.ends[index - 1] if index else 0 : self.ends[index]]


def pack(
    order: Int[np.ndarray, " rows"], lengths: Int32[np.ndarray, " examples"], capacity: int
) -> Sequences:
    """Puts rows, in order, into the fullest open sequence that still has room.

    lengths 3 5 2 4, capacity 8  ->  [0 1], [2 3]
    """
    # An open sequence is one number, its room before that of its first row: so they are in order,
    # the fullest first and of equals the oldest; at most OPEN_SEQUENCES.
    unfilled: list[int] = []
    done: list[int] = []
    sequence_of = array("i")
    low = (1 << _BITS) - 1
    for number, length in enumerate(memoryview(lengths[order].astype(np.int64) << _BITS)):
        fitting = bisect_left(unfilled, length)
        if fitting < len(unfilled):
            sequence = unfilled.pop(fitting)
        else:
            if len(unfilled) == OPEN_SEQUENCES:
                done.append(unfilled.pop(0) & low)
            sequence = (capacity << _BITS) | number
        sequence_of.append(sequence & low)
        insort(unfilled, sequence - length)
    done += sorted(sequence & low for sequence in unfilled)
    place = np.zeros(len(order), np.int32)
    place[done] = np.arange(len(done))
    of_rows = place[np.frombuffer(sequence_of, np.int32)]
    rows = order[np.argsort(of_rows, kind="stable")].astype(np.int32)
    return Sequences(rows, np.cumsum(np.bincount(of_rows, minlength=len(done))))
