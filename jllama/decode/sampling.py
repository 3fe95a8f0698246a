"""From logits to the next token: penalty, temperature, top-k, top-p, min-p.

In this order, as in `transformers`. Top-p is Meta's rule: sorted down, a token is dropped if the
ones before it already exceed p (so the first that crosses p is kept).
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt
from pydantic import Field

from jllama.errors import AtLeast0, NotNegative, Positive, checked

Likelihood = Annotated[float, Field(ge=0, le=1)]
Likeliest = Annotated[float, Field(gt=0, le=1)]


@checked
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest.

    Attributes:
        top_k: only the k likeliest tokens; 0 takes all.
        top_p: only the likeliest tokens that together have this probability.
        min_p: only tokens at least this likely, relative to the likeliest.
        repetition_penalty: divides positive and multiplies negative logits of every token that
            the prompt or the answer holds (Keskar et al., 2019); 1 does nothing.
    """

    temperature: NotNegative = 0.6
    top_k: AtLeast0 = 0
    top_p: Likeliest = 0.9
    min_p: Likelihood = 0.0
    repetition_penalty: Positive = 1.0


class Choice(NamedTuple):
    """A `Sampling` as arrays, with a key for every row: an argument of the compiled functions."""

    keys: Key[Array, " B"]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]


@jax.jit
@jax.vmap
def _keys(seed: UInt[Array, ""], sample: UInt[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(seed), sample)


def make_choice(sampling: Sampling, seeds: Sequence[int], samples: Sequence[int]) -> Choice:
    """Row i draws by `seeds[i]`; `samples[i]` tells apart several answers of one seed."""
    return Choice(
        _keys(np.asarray(seeds, np.uint32), np.asarray(samples, np.uint32)),
        jnp.float32(sampling.temperature),
        jnp.int32(sampling.top_k),
        jnp.float32(sampling.top_p),
        jnp.float32(sampling.min_p),
        jnp.float32(sampling.repetition_penalty),
    )


def pick(
    logits: Float[Array, "B V"],
    positions: Int[Array, " B"],
    seen: Bool[Array, "B V"],
    choice: Choice,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The token for each position, and its log-probability in the model (before any of this).

    Args:
        logits: fp32.
        positions: folded into each row's key: a sample depends on the seed and the position alone.
        seen: the tokens that the repetition penalty falls on.
    """
    penalty = choice.repetition_penalty
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    scores = jnp.where(seen, penalised, logits)

    def sample(row, position, key):
        # A tiny temperature would turn the logits themselves into infinities.
        sharpened = (row - jnp.max(row)) / choice.temperature
        probabilities, ids = jax.lax.top_k(jax.nn.softmax(sharpened), row.size)
        rank = jnp.arange(row.size)
        within = (choice.top_k == 0) | (rank < choice.top_k)
        probabilities = jnp.where(within, probabilities, 0.0)
        probabilities /= jnp.sum(probabilities)
        before = jnp.cumsum(probabilities) - probabilities
        dropped = (before > choice.top_p) | (probabilities < choice.min_p * probabilities[0])
        kept = jnp.log(jnp.where(dropped, 0.0, probabilities))
        return ids[jax.random.categorical(jax.random.fold_in(key, position), kept)]

    token = jax.lax.cond(
        choice.temperature > 0,
        lambda: jax.vmap(sample)(scores, positions, choice.keys).astype(jnp.int32),
        lambda: jnp.argmax(scores, axis=-1).astype(jnp.int32),
    )
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)
