"""Probe prompts on their way through a model's blocks, one block in memory at a time.

What a change of the weights does to the model is told by two streams of the same prompts, in fp32,
through the weights before and after it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jllama.folders.model import read_config
from jllama.layers import RMSNorm, Rotation, rotary_frequencies, rotation
from jllama.model import Llama, map_named
from jllama.text.tokenizer import load_tokenizer

_TOKENS = 32  # of each prompt
_ROWS = 4096  # of the head, in fp32 at a time
_PROMPTS = (
    "The committee met on Tuesday to discuss the new bridge across the river. After two hours of "
    "debate, most of the members agreed that the old one could not be repaired for long.",
    "To make a simple vegetable soup, first wash and chop two carrots, an onion and a leek. Then "
    "warm some oil in a large pot and let the vegetables soften for about ten minutes.",
    "Question: Why does ice float on water?\nAnswer: Because water expands when it freezes, ice "
    "is less dense than the liquid around it, and so a part of it stays above the surface.",
    'def mean(values):\n    """The arithmetic mean of a list of numbers."""\n    total = 0\n'
    "    for value in values:\n        total += value\n    return total / len(values)\n",
)


class Probe:
    """The streams `[B, T, D]` before the next block, by whom they belong to.

    Args:
        model: a model folder; its tokenizer and sizes are read.
    """

    def __init__(self, model: Path):
        self.config, tokenizer = read_config(model), load_tokenizer(model)
        rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in _PROMPTS]
        length = min(_TOKENS, *map(len, rows))
        self.tokens = np.array([row[:length] for row in rows])
        positions = jnp.broadcast_to(jnp.arange(length)[None], self.tokens.shape)
        self._rotary = rotation(positions, rotary_frequencies(self.config))
        self.streams: dict[str, jax.Array] = {}

    def layer(self, block: str, tensors: Mapping[str, np.ndarray]) -> Llama:
        """A model of one layer alone, `layers.0`, of a block's tensors."""
        config = dataclasses.replace(self.config, n_layers=1, vocab_size=1, tied=True)
        dtype = next(iter(tensors.values())).dtype
        model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))

        def fill(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
            stored = tensors.get(name.replace("layers.0", block))
            return jnp.zeros(shape.shape, shape.dtype) if stored is None else jnp.asarray(stored)

        nnx.update(model, map_named(fill, nnx.state(model)))
        return model

    def run(self, who: str, layer: Llama) -> None:
        """Takes a stream through a layer."""
        self.streams[who] = _run(*nnx.split(layer), self.streams[who], self._rotary)

    def logits(self, who: str, norm: np.ndarray, head: np.ndarray) -> np.ndarray:
        """What the head makes of a stream at its end, fp32 `[B, T, V]`."""
        last = RMSNorm(self.config.dim, self.config.norm_eps, dtype=jnp.float32)
        last.weight[...] = jnp.asarray(norm, jnp.float32)
        x = np.asarray(last(self.streams[who]))
        parts = (head[at : at + _ROWS] for at in range(0, len(head), _ROWS))
        return np.concatenate([x @ part.astype(np.float32).T for part in parts], -1)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef: nnx.GraphDef, state: nnx.State, x: jax.Array, rotary: Rotation) -> jax.Array:
    """A one-layer model's block on a stream `[B, T, D]`."""
    block = nnx.merge(graphdef, state).layers[0]
    with jax.default_matmul_precision("highest"):
        return block(x, rotary, None, None, "none")
