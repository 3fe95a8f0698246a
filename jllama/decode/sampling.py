"""From logits to the next token: penalty, temperature, top-k, top-p, min-p.

In this order, as in `transformers`. Top-p is Meta's rule: sorted down, a token is dropped if the
ones before it already exceed p (so the first that crosses p is kept). Equally likely tokens stand
in the order of their ids.

Nothing is sorted, for a sort of the vocabulary would take a GPU longer than some layers.
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt
from pydantic import Field

from jllama.errors import AtLeast0, NotNegative, Positive, checked

DIGIT = 5  # bits: the search of `_first` reads the vocabulary 6 times and compares with 31 numbers

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
    """A `Sampling` as arrays, with a key for every row: an argument of the compiled functions.

    What a `Sampling` does not ask for is None, and the compiled functions do without it: there is
    one for greedy answers (no keys), and one for each set of cuts in use, whatever their values.
    """

    keys: Key[Array, " B"] | None
    temperature: Float[Array, ""]
    top_k: Float[Array, ""] | None
    top_p: Float[Array, ""] | None
    min_p: Float[Array, ""] | None
    repetition_penalty: Float[Array, ""] | None


@jax.jit
@jax.vmap
def _keys(seed: UInt[Array, ""], sample: UInt[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(seed), sample)


def make_choice(sampling: Sampling, seeds: Sequence[int], samples: Sequence[int]) -> Choice:
    """Row i draws by `seeds[i]`; `samples[i]` tells apart several answers of one seed."""
    temperature = jnp.float32(sampling.temperature)
    penalty = _unless(1, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return Choice(None, temperature, None, None, None, penalty)
    return Choice(
        _keys(np.asarray(seeds, np.uint32), np.asarray(samples, np.uint32)),
        temperature,
        _unless(0, sampling.top_k),
        _unless(1, sampling.top_p),
        _unless(0, sampling.min_p),
        penalty,
    )


def _unless(idle: int, value: int | float) -> Float[Array, ""] | None:
    return None if value == idle else jnp.float32(value)


@jax.named_scope("sampling")
def pick(
    logits: Float[Array, "B V"],
    positions: Int[Array, " B"],
    seen: Bool[Array, "B V"] | None,
    choice: Choice,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The token for each position, and its log-probability in the model (before any of this).

    Args:
        logits: fp32.
        positions: folded into each row's key: a sample depends on the seed and the position alone.
        seen: the tokens that the repetition penalty falls on.
    """
    scores, penalty = logits, choice.repetition_penalty
    if seen is not None and penalty is not None:
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        scores = jnp.where(seen, penalised, logits)
    if choice.keys is None:
        token = jnp.argmax(scores, axis=-1)
    else:
        # A tiny temperature would turn the logits themselves into infinities.
        scores = (scores - jnp.max(scores, axis=-1, keepdims=True)) / choice.temperature
        keys = jax.vmap(jax.random.fold_in)(choice.keys, positions)
        scores = jnp.where(kept_tokens(scores, choice), scores, -jnp.inf)
        token = jax.vmap(jax.random.categorical)(keys, scores)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def kept_tokens(scores: Float[Array, "B V"], choice: Choice) -> Bool[Array, "B V"]:
    """Which tokens the cuts leave; `scores` are log-probabilities but for a constant, at most 0."""
    odds = jnp.exp(scores)  # against the likeliest
    kept = jnp.ones(scores.shape, bool)
    if choice.top_k is not None:
        kept = _first(odds, jnp.ones_like(odds), choice.top_k - 1)
    if choice.top_p is not None:
        weight = jnp.where(kept, odds, 0.0)
        kept &= _first(odds, weight, choice.top_p * jnp.sum(weight, axis=-1, keepdims=True))
    if choice.min_p is not None:
        kept &= odds >= choice.min_p
    return kept


def _first(
    odds: Float[Array, "B V"], weight: Float[Array, "B V"], limit: Float[Array, "..."]
) -> Bool[Array, "B V"]:
    """The tokens that have a weight of at most `limit` before them, in the order of `odds`.

    Read as integers, the bits of numbers from 0 to 1 are in the numbers' order. So the least odds
    that are kept are found digit by digit: theirs is the largest number for which all odds from it
    on weigh more than the limit. Equal odds above 0 must have equal weights.
    """
    bits = jax.lax.bitcast_convert_type(odds, jnp.int32)
    least = jnp.zeros_like(bits, shape=(len(bits), 1))
    for shift in range(30 - DIGIT, -1, -DIGIT):  # 1.0 has 30 bits
        digits = jnp.arange(1, 2**DIGIT, dtype=jnp.int32)[None] << shift
        reached = bits[:, None, :] >= (least + digits)[:, :, None]
        heavy = jnp.sum(jnp.where(reached, weight[:, None, :], 0.0), axis=-1) > limit
        least += jnp.sum(heavy, axis=-1, keepdims=True, dtype=jnp.int32) << shift
    above, tied = bits > least, bits == least
    before = jnp.sum(jnp.where(above, weight, 0.0), axis=-1, keepdims=True)
    before += (jnp.cumsum(tied, axis=-1) - 1).astype(jnp.float32) * weight
    return above | (tied & (before <= limit))
