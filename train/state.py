"""The state of a run on disk: Orbax, one folder a step, under names of our own parameters."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jllama.errors import InputError
from train.step import TrainState, on_device

KEPT = 2


class Checkpoints:
    """Saves in the background; a step counts only when Orbax has committed it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=True),
        )

    def save(self, state: TrainState) -> None:
        """Starts to write the state of its step; returns once the arrays are copied."""
        # The next step donates these buffers, so Orbax gets copies of its own.
        arrays = {name: np.array(leaf) for name, leaf in _named(state).items()}
        self._manager.save(int(state.step), args=ocp.args.PyTreeSave(arrays))

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, template: TrainState) -> TrainState:
        """The newest state, in the structure of `template`.

        Raises:
            InputError: if there is none, or it is not of this run's shape.
        """
        step = self.latest_step()
        if step is None:
            raise InputError(f"{self._folder}: no saved state to resume from")
        stored = self._manager.restore(step, args=ocp.args.PyTreeRestore())
        expected = {name: (leaf.shape, leaf.dtype) for name, leaf in _named(template).items()}
        found = {name: (leaf.shape, leaf.dtype) for name, leaf in stored.items()}
        if found != expected:
            wrong = sorted(
                name
                for name in found.keys() | expected.keys()
                if found.get(name) != expected.get(name)
            )
            raise InputError(
                f"{self._folder}/{step}: {len(wrong)} arrays differ from this run's settings, "
                f"first {wrong[0]}"
            )
        leaves = [stored[name] for name in expected]
        return on_device(jax.tree.unflatten(jax.tree.structure(template), leaves))

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _named(state: TrainState) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
