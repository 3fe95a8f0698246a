"""An objective of one's own: label smoothing, and rows that count more than others.

`Trainer` hands it the last hidden states, the head and the rows of a micro-batch, and divides what
it gives by the number of learned tokens of the step; accumulation, adapters, resume and the run
folder are as ever.
"""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jllama
from train import Trainer

SMOOTHING = 0.1


class Weighted(NamedTuple):
    """The fields of `train.Window`, and one more, which the loss reads. `k` is 1, B is 8, T 64."""

    tokens: np.ndarray  # [k, B, T]
    targets: np.ndarray
    mask: np.ndarray  # True where the target is learned
    weights: np.ndarray  # [k, B]
    positions: None = None
    documents: None = None


class Windows:
    """Eight rows a window, in the order of the file; rows about capitals count twice."""

    def __init__(self, rows, tokenizer):
        self.rows, self.tokenizer = rows, tokenizer

    def __len__(self):
        return len(self.rows) // 8

    def __getitem__(self, number):
        ids = np.zeros((1, 8, 65), np.int32)
        learned, weights = np.zeros((1, 8, 65), bool), np.ones((1, 8), np.float32)
        for line, row in enumerate(self.rows[8 * number : 8 * number + 8]):
            prompt = jllama.prompt_ids("plain", row, self.tokenizer)
            answer = [*self.tokenizer.encode(row["output"]), self.tokenizer.eos_id]
            end = len(prompt) + len(answer)
            ids[0, line, :end], learned[0, line, len(prompt) : end] = prompt + answer, True
            weights[0, line] = 2 if "capital" in row["instruction"] else 1
        return Weighted(ids[..., :-1], ids[..., 1:], learned[..., 1:], weights)


def smoothed(x, head, rows):
    """x [B, T, D], head [V, D], arrays of rows [B, T]  ->  a sum over the learned tokens."""
    logits = jnp.einsum("BTD,VD->BTV", x, head.astype(x.dtype)).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log_p, rows.targets[..., None], axis=-1)[..., 0]
    losses = -(1 - SMOOTHING) * right - SMOOTHING * jnp.mean(log_p, axis=-1)
    return jnp.sum(jnp.where(rows.mask, losses * rows.weights[:, None], 0.0))


data = json.loads((jllama.SAMPLE / "train.json").read_text())
trainer = Trainer(
    "models/sample",
    windows=Windows(data, jllama.load_tokenizer("models/sample")),
    loss=smoothed,
    learning_rate=3e-3,
    epochs=1,
)
result = trainer.train()
print(f"loss of the first step {result.losses[0]:.3f}, of the last {result.losses[-1]:.3f}")
