"""From a data file to windows of token ids: a pure function of (seed, position).

    examples (ids, what is learned) -> sequences (one row, or several packed)
         -> windows of k x B sequences, the last one of an epoch padded with empty sequences

An example of 5 ids, the last 2 learned, gives 4 positions:

    ids [1 7 8 4 2]  ->  tokens [1 7 8 4], targets [7 8 4 2], mask [0 0 1 1]
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jllama.errors import InputError
from jllama.text.rows import Example
from train.step import Window

OPEN_SEQUENCES = 32  # that packing tries to fill at a time


def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    """0 .. n-1 in the order of one epoch: a function of (seed, epoch) alone."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return [int(i) for i in grain.MapDataset.range(n).shuffle(seed=mixed)]


def hold_out(examples: list[Example], size: float, seed: int) -> tuple[list, list]:
    """(training, held-out) examples; `size` is a share below 1 or a number of rows.

    Raises:
        InputError: if nothing is left to train on.
    """
    n = round(size * len(examples)) if size < 1 else int(size)
    if n >= len(examples):
        raise InputError(f"--val-size {size} holds out all {len(examples)} rows")
    order = shuffled(len(examples), seed, epoch=2**31)  # an epoch that no run reaches
    held = set(order[:n])
    return (
        [example for i, example in enumerate(examples) if i not in held],
        [example for i, example in enumerate(examples) if i in held],
    )


def pack(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts rows, in order, into the fullest open sequence that still has room.

    lengths 3 5 2 4, capacity 8  ->  [[0, 1], [2, 3]]
    """
    done: list[list[int]] = []
    bins: list[tuple[int, list[int]]] = []  # (room, rows), at most OPEN_SEQUENCES of them
    for row in order:
        fitting = [(room, i) for i, (room, _) in enumerate(bins) if room >= lengths[row]]
        if fitting:
            room, i = min(fitting)
            bins[i] = (room - lengths[row], [*bins[i][1], row])
            continue
        if len(bins) == OPEN_SEQUENCES:
            done.append(bins.pop(min(range(len(bins)), key=lambda i: bins[i][0]))[1])
        bins.append((capacity - lengths[row], [row]))
    return done + [rows for _, rows in bins]


def bucket_lengths(lengths: Sequence[int], buckets: int, max_seq_len: int) -> list[int]:
    """At most `buckets` lengths, multiples of 32 or `max_seq_len`, that hold equal shares of rows.

    lengths 5 9 20 40 90 100, 2 buckets, 512 at most  ->  [32, 128]
    """
    ordered = sorted(lengths)
    longest = (ordered[len(ordered) * (i + 1) // buckets - 1] for i in range(buckets))
    return sorted({min(max_seq_len, -(-length // 32) * 32) for length in longest})


def sequence_lengths(
    examples: Sequence[Example], max_seq_len: int, packing: bool, length_buckets: int = 1
) -> list[int]:
    """What a run's sequences are padded to, ascending."""
    if packing:
        return [max_seq_len]
    used = [len(example.ids) - 1 for example in examples]
    return bucket_lengths(used, length_buckets, max_seq_len)


class Batches:
    """The windows of a run, addressed by optimizer step.

    A window lists its sequences, each a list of positions in `examples`; nothing is read ahead
    of what is asked for, so a resume needs the step's number and nothing else.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        accumulation: int,
        batch: int,
        max_seq_len: int,
        packing: bool,
        length_buckets: int = 1,
        shuffle: bool,
        seed: int,
        epochs: int,
    ):
        self._examples = examples
        self._shape = (accumulation, batch)
        self._packing = packing
        used = [len(example.ids) - 1 for example in examples]
        # The lengths that sequences are padded to, ascending; each is compiled once.
        self.lengths = sequence_lengths(examples, max_seq_len, packing, length_buckets)
        self.windows: list[list[list[int]]] = []
        self.epoch_ends: list[int] = []  # step after which each epoch is over
        for epoch in range(epochs):
            order = shuffled(len(examples), seed, epoch) if shuffle else range(len(examples))
            sequences = pack(order, used, max_seq_len) if packing else [[i] for i in order]
            filling: dict[int, list[list[int]]] = {length: [] for length in self.lengths}
            for sequence in sequences:
                window = filling[self._length([sequence])]
                window.append(sequence)
                if len(window) == accumulation * batch:
                    self.windows.append(window.copy())
                    window.clear()
            self.windows += [window for window in filling.values() if window]
            self.epoch_ends.append(len(self.windows))

    def _length(self, window: list[list[int]]) -> int:
        """The shortest length that holds every sequence of a window."""
        longest = max(self._used(sequence) for sequence in window)
        return next(length for length in self.lengths if length >= longest)

    def _used(self, sequence: list[int]) -> int:
        return sum(len(self._examples[i].ids) - 1 for i in sequence)

    def rows(self, step: int) -> list[int]:
        """Row numbers (in the file) that a step trains on."""
        return [self._examples[i].row for sequence in self.windows[step] for i in sequence]

    def padding_share(self, step: int | None = None) -> float:
        """Share of the positions of a step, or of the whole run, that hold no token."""
        windows = self.windows if step is None else [self.windows[step]]
        used = sum(self._used(sequence) for window in windows for sequence in window)
        size = self._shape[0] * self._shape[1]
        return 1 - used / (size * sum(self._length(window) for window in windows))

    def window(self, step: int) -> Window:
        """The arrays of one step, `[k, B, T]`; segment 0 is padding."""
        shape = (*self._shape, self._length(self.windows[step]))
        flat = [np.zeros((shape[0] * shape[1], shape[2]), np.int32) for _ in range(5)]
        tokens, targets, mask, segments, positions = flat
        for line, sequence in enumerate(self.windows[step]):
            start = 0
            for number, i in enumerate(sequence, start=1):
                example = self._examples[i]
                here = (line, slice(start, start + len(example.ids) - 1))
                tokens[here] = example.ids[:-1]
                targets[here] = example.ids[1:]
                mask[here] = example.learned[1:]
                segments[here] = number
                positions[here] = np.arange(len(example.ids) - 1)
                start = here[1].stop
        arrays = [array.reshape(shape) for array in flat]
        arrays[2] = arrays[2].astype(bool)
        return Window(*arrays) if self._packing else Window(*arrays[:3])

    def from_step(self, step: int, end: int | None = None) -> Iterator[Window]:
        """Windows from `step` on, up to `end`, prepared ahead by Grain's threads."""
        last = len(self.windows) if end is None else end
        steps = grain.MapDataset.range(step, last).map(self.window)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
