"""Generation with a key-value cache: one compiled prefill, one compiled chunk of decoding.

Prompts of different lengths stand left in one batch. A row's key and value of position p lie in
slot p of its cache, and a query at position p reads slots 0 to p; so what padding wrote behind a
short prompt is overwritten before anything can see it.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jllama.errors import InputError
from jllama.lora import scaled, split
from jllama.model import Cache, Llama

CHUNK = 32  # tokens decoded between two looks at who has stopped
PROMPT_BUCKET = 32  # lengths are rounded up to these, so that few shapes are compiled
CACHE_BUCKET = 128


class Decoding(NamedTuple):
    """Where each row of a batch stands: `token` is its newest, not yet in the cache."""

    cache: Cache
    token: Int[Array, " B"]
    position: Int[Array, " B"]


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    temperature: float = 0.6,
    top_p: float = 0.9,
    seed: int = 0,
    *,
    stop_ids: Sequence[int] = (),
    adapter_scale: float = 1.0,
) -> list[list[int]]:
    """New token ids for each prompt, without the prompt, up to and with the first stop token.

    Args:
        prompts: token ids, beginning with the tokenizer's BOS.
        max_new_tokens: for all prompts, or one for each; cut where the context ends.
        temperature: 0 takes the likeliest token.
        top_p: samples from the likeliest tokens that together have this probability.
        seed: fixes the sample of a prompt, whichever batch it is in; other samples of the same
            prompt need other seeds.
        stop_ids: a row ends with the first of these.
        adapter_scale: 1 answers with the adapter, 0 as the base model; both from one compilation.

    Raises:
        InputError: for an empty prompt, one that fills the context or holds an id out of range,
            and if the model's logits are not finite.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    budgets = np.broadcast_to(np.asarray(max_new_tokens, np.int32), lengths.shape)
    _check(model, prompts, budgets, temperature, top_p)
    budgets = np.minimum(budgets, model.config.max_seq_len - lengths)
    if not len(prompts) or budgets.max() == 0:
        return [[] for _ in prompts]

    # Decoding runs on until the last row is done: the cache has room for whole chunks.
    chunks = -(-(int(budgets.max()) - 1) // CHUNK)
    slots = _round_up(int(lengths.max()) + 1 + chunks * CHUNK, CACHE_BUCKET)
    tokens = np.zeros((len(prompts), _round_up(int(lengths.max()), PROMPT_BUCKET)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt

    graphdef, adapters, base = split(model)
    weights = (adapters, base, jnp.float32(adapter_scale))
    choice = (jax.random.key(seed), jnp.float32(temperature), jnp.float32(top_p))
    state, finite = prefill(weights, tokens, lengths, choice, graphdef=graphdef, slots=slots)
    if not finite:
        raise InputError("the model's logits are not finite; its weights or adapter are damaged")
    answers = [[int(token)] for token in state.token]
    stops = set(stop_ids)
    while True:
        open_rows = [
            row
            for row, answer in enumerate(answers)
            if len(answer) < budgets[row] and not stops.intersection(answer)
        ]
        if not open_rows:
            break
        state, new = decode(weights, state, choice, graphdef=graphdef)
        new = np.asarray(new)
        for row in open_rows:
            answers[row] += new[row].tolist()
    return [_cut(answer, budget, stops) for answer, budget in zip(answers, budgets, strict=True)]


@functools.partial(jax.jit, static_argnames=("graphdef", "slots"))
def prefill(
    weights: tuple[nnx.State, nnx.State, Float[Array, ""]],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    choice: tuple[Key[Array, ""], Float[Array, ""], Float[Array, ""]],
    *,
    graphdef: nnx.GraphDef,
    slots: int,
) -> tuple[Decoding, Bool[Array, ""]]:
    """Reads the prompts; returns the first new token of each, and whether its logits are finite."""
    model = _model(graphdef, weights)
    config = model.config
    B, T = tokens.shape
    shape = (B, slots, config.n_kv_heads, config.head_dim)
    dtype = model.tok_embeddings.weight.dtype
    cache = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layers)]
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    x, cache = model.decode(tokens, positions, cache)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    logits = model.head(last)[:, 0]
    return Decoding(cache, pick(logits, lengths, choice), lengths), jnp.all(jnp.isfinite(logits))


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("state",))
def decode(
    weights: tuple[nnx.State, nnx.State, Float[Array, ""]],
    state: Decoding,
    choice: tuple[Key[Array, ""], Float[Array, ""], Float[Array, ""]],
    *,
    graphdef: nnx.GraphDef,
) -> tuple[Decoding, Int[Array, "B CHUNK"]]:
    """The next CHUNK tokens of every row; the cache is updated in place."""
    model = _model(graphdef, weights)

    def one_token(state, _):
        x, cache = model.decode(state.token[:, None], state.position[:, None], state.cache)
        logits = model.head(x)[:, 0]
        token = pick(logits, state.position + 1, choice)
        return Decoding(cache, token, state.position + 1), token

    state, tokens = jax.lax.scan(one_token, state, length=CHUNK)
    return state, tokens.T


def pick(
    logits: Float[Array, "B V"],
    positions: Int[Array, " B"],
    choice: tuple[Key[Array, ""], Float[Array, ""], Float[Array, ""]],
) -> Int[Array, " B"]:
    """The token for each position: the likeliest at temperature 0, else a top-p sample.

    Top-p is Meta's rule: sorted down, a token is dropped if those before it already exceed p.
    """
    key, temperature, top_p = choice

    def sample(row, position):
        probabilities, ids = jax.lax.top_k(jax.nn.softmax(row / temperature), row.size)
        before = jnp.cumsum(probabilities) - probabilities
        kept = jnp.where(before > top_p, 0.0, probabilities)
        return ids[jax.random.categorical(jax.random.fold_in(key, position), jnp.log(kept))]

    return jax.lax.cond(
        temperature > 0,
        lambda: jax.vmap(sample)(logits, positions).astype(jnp.int32),
        lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )


def _model(graphdef, weights) -> Llama:
    adapters, base, adapter_scale = weights
    return nnx.merge(graphdef, scaled(adapters, adapter_scale), base)


def _check(model, prompts, budgets, temperature, top_p) -> None:
    context, vocabulary = model.config.max_seq_len, model.config.vocab_size
    problems = []
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            problems.append(f"prompt {row} is empty; it needs at least BOS")
        elif len(prompt) >= context:
            problems.append(f"prompt {row} has {len(prompt)} tokens, the context is {context}")
        elif min(prompt) < 0 or max(prompt) >= vocabulary:
            problems.append(f"prompt {row} holds ids outside 0..{vocabulary - 1}")
    if budgets.size and budgets.min() < 0:
        problems.append(f"max_new_tokens {budgets.min()} is below 0")
    if temperature < 0 or not 0 < top_p <= 1:
        problems.append(
            f"temperature {temperature}, top_p {top_p}; expected temperature >= 0 and "
            "0 < top_p <= 1"
        )
    if problems:
        raise InputError("; ".join(problems))


def _cut(answer: list[int], budget: int, stops: set[int]) -> list[int]:
    answer = answer[:budget]
    for index, token in enumerate(answer):
        if token in stops:
            return answer[: index + 1]
    return answer


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
