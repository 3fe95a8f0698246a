"""Generation with a key-value cache: one compiled prefill, one compiled chunk of decoding.

Prompts of different lengths stand left in one batch. A row's key and value of position p lie in
slot p of its cache, and a query at position p reads slots 0 to p; so what padding wrote behind a
short prompt is overwritten before anything can see it.

Every shape is compiled once, so few are used: prompts are padded to a width, and an answer is
decoded in chunks of one size.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jllama.cli.compiler import DECODING, DECODING_CODES, READING
from jllama.decode.sampling import Choice, Sampling, make_choice, pick
from jllama.decode.weights import Weights, merged, widened
from jllama.errors import InputError
from jllama.lora import split
from jllama.model import Cache, Llama
from jllama.quantize.weights import in_codes
from jllama.text.tokenizer import Tokenizer

CHUNK = 32  # at most so many tokens are decoded between two looks at who has stopped
PROMPT_BUCKET = 32  # multiples to which lengths are rounded up
CACHE_BUCKET = 128


class Decoding(NamedTuple):
    """Where each row of a batch stands: `token` is its newest, not yet in the cache."""

    cache: Cache
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    seen: Bool[Array, "B V"] | None  # tokens of the prompt and the answer, where a penalty asks


class Answer(NamedTuple):
    """New tokens, without the prompt, and the log-probability that the model gave to each."""

    ids: list[int]
    logprobs: list[float]


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | None = None,
    **more,
) -> list[list[int]]:
    """The ids of `generate_with_logprobs`, which takes the same arguments."""
    answers = generate_with_logprobs(model, prompts, max_new_tokens, sampling, **more)
    return [answer.ids for answer in answers]


def generate_with_logprobs(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | None = None,
    *,
    seed: int | Sequence[int] = 0,
    samples: int = 1,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    adapter_scale: float = 1.0,
    width: int | None = None,
) -> list[Answer]:
    """An answer to each prompt, up to and with the first stop token.

    Args:
        prompts: token ids, beginning with the tokenizer's BOS.
        max_new_tokens: for all prompts, or one for each; cut where the context ends.
        sampling: by default Meta's for LLaMA 2 and 3, temperature 0.6 and top-p 0.9.
        seed: for all prompts, or one for each; fixes the sample of a prompt, whichever batch it
            is in.
        samples: answers to every prompt; those of one prompt follow each other.
        stop_ids: a row ends with the first of these.
        stop_strings: a row also ends with the token that completes one of these; needs
            `tokenizer`.
        adapter_scale: 1 answers with the adapter, 0 as the base model; both from one compilation.
        width: to which the prompts are padded; by default the next multiple of 32.

    Raises:
        InputError: for an empty prompt, one that fills the context or holds an id out of range,
            and if the model's logits are not finite.
    """
    if stop_strings and tokenizer is None:
        raise InputError("stop_strings need the tokenizer")
    seeds = np.broadcast_to(np.asarray(seed), (len(prompts),))
    budgets = np.broadcast_to(np.asarray(max_new_tokens, np.int64), (len(prompts),))
    check_prompts(model, prompts, budgets)
    budgets = np.repeat(
        np.minimum(budgets, [model.config.max_seq_len - len(prompt) for prompt in prompts]), samples
    )
    found: list[Answer] = [Answer([], []) for _ in budgets]
    rows = [prompt for prompt in prompts for _ in range(samples)]
    if not len(budgets) or budgets.max() == 0:
        return found
    choice = make_choice(
        sampling or Sampling(),
        np.repeat(seeds, samples).tolist(),
        list(range(samples)) * len(prompts),
    )
    ends = [0 if budget == 0 else None for budget in budgets]
    budget = int(budgets.max())
    width = width or _round_up(max(map(len, prompts)), PROMPT_BUCKET)
    for tokens, logprobs in decode_chunks(
        model, rows, budget, choice, adapter_scale, width, chunk_for(budget - 1)
    ):
        for row, answer in enumerate(found):
            if ends[row] is None:
                answer.ids.extend(tokens[row].tolist())
                answer.logprobs.extend(logprobs[row].tolist())
                ends[row] = answer_end(
                    answer.ids, int(budgets[row]), stop_ids, stop_strings, tokenizer
                )
        if None not in ends:
            break
    return [Answer(x.ids[:end], x.logprobs[:end]) for x, end in zip(found, ends, strict=True)]


def decode_chunks(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    budget: int,
    choice: Choice,
    adapter_scale: float,
    width: int,
    chunk: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """New ids and their log-probabilities `[B, n]`: first one of each row, then chunks of them.

    It ends when every row has `budget` tokens; a reader that has enough may stop before.

    Args:
        width: to which the prompts are padded.
        chunk: tokens decoded by one call of the compiled function.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    # Decoding runs on until the last row is done: the cache has room for whole chunks.
    chunks = -(-(budget - 1) // chunk)
    slots = _round_up(width + chunks * chunk, CACHE_BUCKET)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    graphdef, adapters, base = split(model)
    one_chunk = decoder(base)
    weights = widened((adapters, base, jnp.float32(adapter_scale)))
    state, first = prefill(weights, tokens, lengths, choice, graphdef=graphdef, slots=slots)
    yield _checked(state.token[:, None], first[:, None])
    for _ in range(chunks):
        state, *new = one_chunk(weights, state, choice, graphdef=graphdef, chunk=chunk)
        yield _checked(*new)


def chunk_for(tokens: int) -> int:
    """The multiple of 4 up to `CHUNK` in which so many tokens are decoded with least waste.

    What a last chunk decodes too much is waste, and so is a call, which costs about a token.

    199  ->  20, ten times with one token too many; 32 would decode 25 too many
    """
    return min(range(CHUNK, 0, -4), key=lambda chunk: -(-tokens // chunk) * (chunk + 1))


@functools.partial(jax.jit, static_argnames=("graphdef", "slots"), compiler_options=dict(READING))
def prefill(
    weights: Weights,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    choice: Choice,
    *,
    graphdef: nnx.GraphDef,
    slots: int,
) -> tuple[Decoding, Float[Array, " B"]]:
    """Reads the prompts; chooses the first new token of each, and gives its log-probability."""
    model = merged(graphdef, weights)
    B, T = tokens.shape
    x, cache = model.prefill(tokens, slots)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    logits = model.head(last)[:, 0]
    seen = None
    if choice.repetition_penalty is not None:
        rows = jnp.broadcast_to(jnp.arange(B)[:, None], (B, T))
        inside = jnp.arange(T)[None] < lengths[:, None]
        seen = jnp.zeros(logits.shape, bool).at[rows, tokens].max(inside)
    token, logprob = pick(logits, lengths, seen, choice)
    cache = jax.tree.map(lambda x: x.astype(model.head_weight.dtype), cache)  # also if widened
    return Decoding(cache, token, lengths, _with(seen, token)), logprob


def _decode(
    weights: Weights,
    state: Decoding,
    choice: Choice,
    *,
    graphdef: nnx.GraphDef,
    chunk: int = CHUNK,
) -> tuple[Decoding, Int[Array, "B C"], Float[Array, "B C"]]:
    """The next `chunk` tokens of every row; the cache is updated in place."""
    model = merged(graphdef, weights)

    def one_token(state, _):
        x, cache = model.decode(state.token[:, None], state.position[:, None], state.cache)
        logits = model.head(x)[:, 0]
        token, logprob = pick(logits, state.position + 1, state.seen, choice)
        state = Decoding(cache, token, state.position + 1, _with(state.seen, token))
        return state, (token, logprob)

    state, (tokens, logprobs) = jax.lax.scan(one_token, state, length=chunk)
    return state, tokens.T, logprobs.T


_compiled = functools.partial(
    jax.jit, _decode, static_argnames=("graphdef", "chunk"), donate_argnames=("state",)
)
decode = _compiled(compiler_options=dict(DECODING))
decode_codes = _compiled(compiler_options=dict(DECODING_CODES))


def decoder(base: nnx.State) -> Any:
    """The compiled function that decodes with these weights: `decode`, or `decode_codes`."""
    return decode_codes if in_codes(base) else decode


def check_prompts(model: Llama, prompts: Sequence[Sequence[int]], budgets: np.ndarray) -> None:
    """Raises InputError with everything that is wrong with the prompts."""
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
    if problems:
        raise InputError("; ".join(problems))


def answer_end(
    ids: list[int],
    budget: int,
    stop_ids: Sequence[int],
    stop_strings: Sequence[str],
    tokenizer: Tokenizer | None,
) -> int | None:
    """How many of the ids are the answer; None if it goes on."""
    ids = ids[:budget]
    ends = [index + 1 for index, token in enumerate(ids) if token in stop_ids][:1]
    if stop_strings and tokenizer:

        def stopped(n: int) -> bool:
            text = tokenizer.decode(ids[:n])
            return any(stop in text for stop in stop_strings)

        if stopped(len(ids)):
            ends.append(next(n for n in range(1, len(ids) + 1) if stopped(n)))
    if len(ids) == budget:
        ends.append(budget)
    return min(ends, default=None)


def _with(seen: Bool[Array, "B V"] | None, token: Int[Array, " B"]) -> Bool[Array, "B V"] | None:
    return None if seen is None else seen.at[jnp.arange(token.size), token].set(True)


def _checked(tokens: Array, logprobs: Array) -> tuple[np.ndarray, np.ndarray]:
    found = np.asarray(logprobs)
    if not np.all(np.isfinite(found)):
        raise InputError("the model's logits are not finite; its weights or adapter are damaged")
    return np.asarray(tokens), found


def power_of_two(length: int, least: int) -> int:
    """The power of two that a length is padded to where it is to be compiled a few times only."""
    return max(least, 1 << (length - 1).bit_length())


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
