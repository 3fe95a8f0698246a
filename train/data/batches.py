"""From a data file to windows of token ids: a pure function of (seed, position).

    examples (ids, what is learned) -> sequences (one row, or several packed)
         -> windows of k x B sequences, the last one of an epoch padded with empty sequences

An example of 5 ids, the last 2 learned, gives 4 positions:

    ids [1 7 8 4 2]  ->  tokens [1 7 8 4], targets [7 8 4 2], mask [0 0 1 1]
"""

import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from jllama.attention import Documents
from jllama.errors import InputError
from jllama.text.rows import Examples
from train.data.documents import Shapes, lay_out, longer_than, shapes_for, stacked
from train.data.packing import Sequences, pack
from train.data.permutation import permuted
from train.step import Window

_NO_EPOCH = 2**31  # that no run reaches


def shuffled(n: int, seed: int, epoch: int, first: int | None = None) -> Int32[np.ndarray, " rows"]:
    """0 .. n-1, or the first of them, in the order of one epoch: a function of (seed, epoch) alone.

    The order is that of `grain.MapDataset.range(n).shuffle`.
    """
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return permuted(np.arange(n if first is None else first), n, mixed)


def rows_of_epoch(
    weights: Float32[np.ndarray, " rows"], seed: int | None, epoch: int
) -> Int[np.ndarray, " rows"]:
    """The rows of one epoch, ascending, each as often as its weight says.

    Rows of one weight are taken together. Those that a fraction leaves out of one epoch come in the
    next: with weight 0.5 each row once in two epochs.

    weights 1 1 0.5 0.5 2  ->  0 1 3 4 4, then 0 1 2 4 4

    Args:
        seed: None takes the first rows of a fraction, in every epoch.
    """
    chosen = []
    for weight in np.unique(weights):
        rows = np.flatnonzero(weights == weight)
        whole, left = divmod(max(1, round(float(weight) * len(rows))), len(rows))
        order, first = rows, 0
        if seed is not None and left:
            order, first = rows[shuffled(len(rows), seed, _NO_EPOCH)], epoch * left
        part = order[np.arange(first, first + left) % len(rows)]
        chosen += [np.repeat(rows, whole), part]
    return np.sort(np.concatenate(chosen))


def hold_out(examples: Examples, size: float, seed: int) -> tuple[Examples, Examples]:
    """(training, held-out) examples; `size` is a share below 1 or a number of rows.

    Raises:
        InputError: if nothing is left to train on.
    """
    rows, of_rows = np.unique(examples.rows, return_inverse=True)  # a long row may be in parts
    n = round(size * len(rows)) if size < 1 else int(size)
    if n >= len(rows):
        raise InputError(f"--val-size {size} holds out all {len(rows)} rows")
    held = np.zeros(len(rows), bool)
    held[shuffled(len(rows), seed, _NO_EPOCH, first=n)] = True
    return examples.take(~held[of_rows]), examples.take(held[of_rows])


def bucket_lengths(
    lengths: Int32[np.ndarray, " rows"], buckets: int, max_seq_len: int
) -> list[int]:
    """At most `buckets` lengths, multiples of 32 or `max_seq_len`, that hold equal shares of rows.

    lengths 5 9 20 40 90 100, 2 buckets, 512 at most  ->  [32, 128]
    """
    ordered = np.sort(lengths)
    longest = (int(ordered[len(ordered) * (i + 1) // buckets - 1]) for i in range(buckets))
    return sorted({min(max_seq_len, -(-length // 32) * 32) for length in longest})


def sequence_lengths(
    examples: Examples, max_seq_len: int, packing: bool, length_buckets: int = 1
) -> list[int]:
    """What a run's sequences are padded to, ascending."""
    if packing:
        return [max_seq_len]
    return bucket_lengths(examples.lengths - 1, length_buckets, max_seq_len)


class Epoch(NamedTuple):
    """An epoch's sequences, each a few positions among the examples, window by window."""

    sequences: Sequences  # without packing each has one row
    ends: Int64[np.ndarray, " windows"]  # the sequence behind each window's last one


class Batches:
    """The windows of a run, addressed by optimizer step; there are `len(batches)` of them.

    A window lists its sequences, each a list of positions in `examples`. An epoch's rows are put
    in order when a step of it is asked for, so a resume needs the step's number and nothing else.
    Only packing looks ahead, for the number of an epoch's sequences depends on its order.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        accumulation: int,
        batch: int,
        devices: int = 1,
        max_seq_len: int,
        packing: bool,
        length_buckets: int = 1,
        shuffle: bool,
        seed: int,
        epochs: int,
    ):
        self._examples = examples
        self._shape, self._size = (accumulation, batch), accumulation * batch
        self._devices = devices  # to which the sequences of a micro-batch are dealt
        self._packing = packing
        self._seed = seed if shuffle else None  # or rows come in the file's order
        self._used = examples.lengths - 1
        # The lengths that sequences are padded to, ascending; each is compiled once.
        self.lengths = sequence_lengths(examples, max_seq_len, packing, length_buckets)
        self._bucket = np.searchsorted(self.lengths, self._used)  # of each row
        self.documents: Shapes = ()  # of the rows in which attention sees packed documents
        # Two, for reading ahead enters an epoch before the reports have left the one before it.
        self._epoch = functools.lru_cache(maxsize=2)(self._windows)
        # Windows of each length in each epoch. Packing's first epoch comes last, to be kept.
        if packing:
            packed = range(epochs if shuffle else 1)
            found = [
                (len(self._epoch(epoch).ends), self._longer(epoch)) for epoch in reversed(packed)
            ]
            counts = [[count] for count, _ in reversed(found)] * (epochs // len(found))
            longer = np.max([some for _, some in found], axis=0)
            self.documents = shapes_for(longer, batch // devices, max_seq_len)
        else:
            rows = [
                np.bincount(self._bucket[self._rows_of(epoch)], minlength=len(self.lengths))
                for epoch in range(epochs)
            ]
            counts = [(-(-some // self._size)).tolist() for some in rows]
        # The step after which each epoch is over.
        self.epoch_ends = list(itertools.accumulate(sum(count) for count in counts))
        self._positions = self._size * int(np.sum(np.array(counts) @ self.lengths))

    def __len__(self) -> int:
        return self.epoch_ends[-1]

    def _rows_of(self, epoch: int) -> Int[np.ndarray, " rows"]:
        return rows_of_epoch(self._examples.weights, self._seed, epoch)

    def _windows(self, epoch: int) -> Epoch:
        """An epoch's windows in the order in which they are full; then those that stay partial."""
        order, size = self._rows_of(epoch), self._size
        if self._seed is not None:
            order = order[shuffled(len(order), self._seed, epoch)]
        if self._packing:
            sequences = pack(order, self._used, self.lengths[-1])
            ends = np.arange(size, len(sequences) + size, size).clip(max=len(sequences))
            return Epoch(sequences, ends)
        full_at = np.empty(len(order), np.int64)  # where each row's window is full
        buckets = self._bucket[order]
        for bucket in range(len(self.lengths)):
            places = np.flatnonzero(buckets == bucket)
            full, partial = np.split(places, [len(places) // size * size])
            full_at[full] = np.repeat(full[size - 1 :: size], size)
            full_at[partial] = len(order) + bucket
        by_window = np.argsort(full_at, kind="stable")
        ends = np.append(np.flatnonzero(np.diff(full_at[by_window])) + 1, len(order))
        rows = order[by_window].astype(np.int32)
        return Epoch(Sequences(rows, np.arange(1, len(rows) + 1)), ends)

    def _longer(self, epoch: int) -> Int[np.ndarray, " W"]:
        """Of `longer_than`, over each device's part of the micro-batches of a packed epoch."""
        sequences = self._epoch(epoch).sequences
        batches = np.arange(len(sequences)) // (self._shape[1] // self._devices)
        of_rows = np.repeat(batches, np.diff(sequences.ends, prepend=0))
        return longer_than(self._used[sequences.rows], of_rows, self.lengths[-1])

    def _sequences(self, step: int) -> list[Int32[np.ndarray, " rows"]]:
        """The sequences of a step's window."""
        epoch = bisect_right(self.epoch_ends, step)
        window = step - (self.epoch_ends[epoch - 1] if epoch else 0)
        sequences, ends = self._epoch(0 if self._seed is None else epoch)
        first = ends[window - 1] if window else 0
        return [sequences[i] for i in range(first, ends[window])]

    def _rows(self, step: int) -> Int32[np.ndarray, " rows"]:
        return np.concatenate(self._sequences(step))

    def _length(self, step: int) -> int:
        """What a step's sequences are padded to; they are all of one bucket."""
        return self.lengths[-1 if self._packing else self._bucket[self._sequences(step)[0][0]]]

    def rows(self, step: int) -> list[int]:
        """Row numbers (in the file) that a step trains on."""
        return self._examples.rows[self._rows(step)].tolist()

    def padding_share(self, step: int | None = None) -> float:
        """Share of the positions of a step, or of the whole run, that hold no token."""
        if step is None:
            epochs = range(len(self.epoch_ends))
            used = sum(int(self._used[self._rows_of(epoch)].sum()) for epoch in epochs)
            return 1 - used / self._positions
        return 1 - int(self._used[self._rows(step)].sum()) / (self._size * self._length(step))

    def window(self, step: int) -> Window:
        """The arrays of one step, `[k, B, T]`."""
        shape = (*self._shape, self._length(step))
        tokens, targets, mask, positions = (np.zeros(shape, np.int32) for _ in range(4))
        for line, sequence in enumerate(self._sequences(step)):
            start = 0
            for i in sequence:
                example = self._examples[int(i)]
                end = start + len(example.ids) - 1
                here = (*divmod(line, shape[1]), slice(start, end))
                tokens[here] = example.ids[:-1]
                targets[here] = example.ids[1:]
                mask[here] = example.learned[1:]
                positions[here] = np.arange(end - start)
                start = end
        learned = mask.astype(bool)
        if not self._packing:
            return Window(tokens, targets, learned)
        return Window(tokens, targets, learned, positions, self._documents(step))

    def _documents(self, step: int) -> tuple[Documents, ...]:
        k, B = self._shape
        lengths = [self._used[sequence] for sequence in self._sequences(step)]
        micro_batches = (lengths[i * B : (i + 1) * B] for i in range(k))
        shape = B, self.lengths[-1]
        return stacked(
            [lay_out(some, shape, self.documents, self._devices) for some in micro_batches]
        )

    def from_step(self, step: int, end: int | None = None) -> Iterator[Window]:
        """Windows from `step` on, up to `end`, prepared ahead by Grain's threads."""
        last = len(self) if end is None else end
        steps = grain.MapDataset.range(step, last).map(self.window)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
