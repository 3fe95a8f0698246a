"""What the loop takes its windows from: rows of files (`train.data.batches`), or given windows."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import grain
import jax
import numpy as np

from jllama.errors import InputError
from train.data.documents import Shapes
from train.step import Window


class Stream(Protocol):
    """Windows by their step, counted from 0: whatever is asked, and in whatever order, the same."""

    @property
    def lengths(self) -> Sequence[int]:
        """Positions that a sequence may have."""

    @property
    def epoch_ends(self) -> Sequence[int]:
        """The step after which each epoch is over."""

    def __len__(self) -> int: ...

    def window(self, step: int) -> Window:
        """The arrays of one step, `[k, B, T]`."""

    def from_step(self, step: int, end: int | None = None) -> Iterator[Window]:
        """Windows from `step` on, up to `end`."""

    def rows(self, step: int) -> list[int]:
        """Numbers of the rows that a step trains on."""

    def padding_share(self, step: int | None = None) -> float:
        """Share of the positions of a step, or of the whole run, that hold no token."""


class Windows(Protocol):
    """One epoch's windows: a list, a `grain.MapDataset`, or any class with these two methods.

    A window is a `train.Window`, or another named tuple with its fields and more, which a custom
    loss reads. Each has as many micro-batches and sequences as the first one; `windows[i]` is the
    same whenever it is asked for, or a resume would differ.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Window: ...


class GivenWindows:
    """A caller's windows as a stream, as often as there are epochs.

    Nothing is known of their rows and padding: no rows are listed, and a share of 0 is told.

    Args:
        vocab_size: of the model, which has no rows for other ids.

    Raises:
        InputError: if there is none; with the number of a window that does not fit.
    """

    documents: Shapes = ()  # where attention sees packed documents, as far as a plan knows

    def __init__(self, windows: Windows, epochs: int, vocab_size: int):
        if not len(windows):
            raise InputError("windows: there is none; expected at least one")
        self._windows, self._vocab_size = windows, vocab_size
        self.shape: tuple[int, ...] = ()  # `(k, B, T)` of the first
        first = self.window(0)
        self.shape = first.tokens.shape
        self.lengths = self.shape[2:]
        self.epoch_ends = [len(windows) * epoch for epoch in range(1, epochs + 1)]
        digest = hashlib.sha256(f"{len(windows)}".encode())
        for array in jax.tree.leaves(first):
            digest.update(np.ascontiguousarray(array).tobytes())
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return self.epoch_ends[-1]

    def window(self, step: int) -> Window:
        number = step % len(self._windows)
        window = jax.tree.map(np.asarray, self._windows[number])
        shapes = {array.shape for array in (window.tokens, window.targets, window.mask)}
        shape = window.tokens.shape
        as_first = shape[:2] == (self.shape or shape)[:2]
        if len(shapes) > 1 or len(shape) != 3 or not as_first:
            first = ", ".join(map(str, self.shape[:2])) or "k, B"
            raise InputError(
                f"windows[{number}]: tokens, targets and mask of {', '.join(map(str, shapes))}, "
                f"expected one shape ({first}, T)"
            )
        for name in ("tokens", "targets"):
            ids = getattr(window, name)
            if ids.min() < 0 or ids.max() >= self._vocab_size:
                raise InputError(
                    f"windows[{number}]: {name} from {ids.min()} to {ids.max()}, expected ids "
                    f"from 0 to {self._vocab_size - 1}"
                )
        return window._replace(
            tokens=window.tokens.astype(np.int32),
            targets=window.targets.astype(np.int32),
            mask=window.mask.astype(bool),
        )

    def from_step(self, step: int, end: int | None = None) -> Iterator[Window]:
        last = len(self) if end is None else end
        steps = grain.MapDataset.range(step, last).map(self.window)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def rows(self, step: int) -> list[int]:
        return []

    def padding_share(self, step: int | None = None) -> float:
        return 0.0
