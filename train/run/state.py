"""The state of a run on disk: Orbax, one folder a step, under names of our own parameters."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from jllama.cli.terminal import console
from jllama.errors import InputError
from jllama.folders.files import room_for, shortage_named
from jllama.folders.manifest import tensor_sha256
from train.step import TrainState, on_device

_YEAR = 365 * 24 * 3600


class Checkpoints:
    """Saves in the background; a step counts only when Orbax has committed it."""

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        self._size = 0  # bytes of what is being written
        _silence_what_is_told_once_more()
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                # Orbax waits by the clock on the wall, which may jump; ten minutes are its default.
                async_options=ocp.AsyncOptions(timeout_secs=_YEAR),
            ),
        )

    def save(self, state: TrainState) -> None:
        """Starts to write the state of its step; returns once the arrays are copied.

        Raises:
            InputError: if there is no room, or the save before this one failed.
        """
        # The next step donates these buffers, so Orbax gets copies of its own.
        arrays = {name: np.array(leaf) for name, leaf in _named(state).items()}
        hashes = {name: tensor_sha256(array) for name, array in arrays.items()}
        self._size = sum(x.nbytes for x in arrays.values())
        with self._explained(), room_for(self._size, self._folder):
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave(arrays), sha256=ocp.args.JsonSave(hashes)
                ),
            )

    def restore(self, template: TrainState) -> TrainState | None:
        """The newest state that is whole, in the structure of `template`; None if there is none.

        Raises:
            InputError: if it is not of this run's shape, or every saved state is damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            arrays = self._whole(step)
            if arrays is not None:
                return self._fitted(arrays, template, step)
            console.print(f"{self._folder / str(step)} is damaged; trying the state before it")
        if steps:
            raise InputError(f"{self._folder}: every saved state is damaged; start a new run")
        return None

    def _whole(self, step: int) -> dict[str, np.ndarray] | None:
        how = ocp.args.Composite(arrays=ocp.args.PyTreeRestore(), sha256=ocp.args.JsonRestore())
        try:
            stored = self._manager.restore(step, args=how)
            found = {name: tensor_sha256(array) for name, array in stored.arrays.items()}
        except Exception:  # a damaged file can fail in any way
            return None
        return stored.arrays if found == stored.sha256 else None

    def _fitted(self, arrays: dict[str, np.ndarray], template: TrainState, step: int) -> TrainState:
        expected = {name: (leaf.shape, leaf.dtype) for name, leaf in _named(template).items()}
        found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        names = found.keys() | expected.keys()
        wrong = sorted(name for name in names if found.get(name) != expected.get(name))
        if wrong:
            raise InputError(
                f"{self._folder / str(step)}: {len(wrong)} arrays differ from this run's "
                f"settings, first {wrong[0]}"
            )
        leaves = [arrays[name] for name in expected]
        return on_device(jax.tree.unflatten(jax.tree.structure(template), leaves))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Orbax's failures to write, as one message that says what is left."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # a failing disk has a different face in each library
            raise InputError(
                f"{self._folder}: a state could not be written ({str(error).splitlines()[0]}); "
                "the state before it is kept. Make room, then continue with --resume"
            ) from error

    def close(self) -> None:
        """Waits for what is being written."""
        with self._explained(), shortage_named(self._size, self._folder):
            self._manager.wait_until_finished()
        self._manager.close()


@functools.cache  # once in a process
def _silence_what_is_told_once_more() -> None:
    """Orbax logs what it raises, and where one read or write fails others find its loop closed."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _named(state: TrainState) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
