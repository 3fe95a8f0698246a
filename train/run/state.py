"""The state of a run on disk: Orbax, one folder a step, under names of our own parameters.

Of several processes the first one writes, and each reads by itself.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jllama.cli.terminal import console
from jllama.errors import InputError
from jllama.folders.files import room_for
from jllama.folders.manifest import tensor_sha256
from jllama.sharding import on_host, put
from train.step import TrainState


class Checkpoints:
    """A step counts only when Orbax has committed it."""

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        _silence_what_is_told_once_more()
        folder.mkdir(parents=True, exist_ok=True)
        here = jax.process_index()
        # In the background a save that fails would keep the process from ending for ten minutes.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=False, enable_async_checkpointing=False,
            read_only=here > 0,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"{here}"
            ),
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, state: TrainState) -> None:
        """Writes the state of its step: process 0 does, and all processes call it.

        Raises:
            InputError: if it cannot be written, or a state of this step or a later one is there.
        """
        arrays = {name: on_host(leaf) for name, leaf in _named(state).items()}
        if jax.process_index():
            return
        hashes = {name: tensor_sha256(array) for name, array in arrays.items()}
        size = sum(array.nbytes for array in arrays.values())
        with self._explained(), room_for(size, self._folder):
            started = self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave(arrays), sha256=ocp.args.JsonSave(hashes)
                ),
            )
            if not started:
                newest = self._manager.latest_step()
                raise InputError(
                    f"{self._folder}: no state of step {int(state.step)} could be saved beside "
                    f"that of step {newest}; start a new run"
                )

    def restore(self, template: TrainState) -> TrainState | None:
        """The newest state that is whole, in the structure of `template`; None if there is none.

        Damaged ones that are newer are removed: else no state of their steps could be saved.

        Raises:
            InputError: if it is not of this run's shape, or every saved state is damaged.
        """
        damaged: list[int] = []
        for step in self._steps():
            arrays = self._whole(step)
            if arrays is not None:
                restored = self._fitted(arrays, template, step)
                for newer in damaged if jax.process_index() == 0 else ():
                    self._manager.delete(newer)
                return restored
            damaged.append(step)
            console.print(f"{self._folder / str(step)} is damaged; trying the state before it")
        if damaged:
            raise InputError(f"{self._folder}: every saved state is damaged; start a new run")
        return None

    def newest_first(self, template: TrainState) -> Iterator[TrainState]:
        """Every saved state that is whole; errors as for `restore`."""
        for step in self._steps():
            arrays = self._whole(step)
            if arrays is not None:
                yield self._fitted(arrays, template, step)

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps(read=True), reverse=True)

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
        restored = jax.tree.unflatten(
            jax.tree.structure(template), [arrays[name] for name in expected]
        )
        return put(restored, jax.tree.map(lambda leaf: leaf.sharding, template))

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
        self._manager.close()


@functools.cache  # once in a process
def _silence_what_is_told_once_more() -> None:
    """Orbax logs what it raises, and where one read or write fails others find its loop closed."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _named(state: TrainState) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
