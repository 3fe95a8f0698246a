"""How likely a model finds continuations of texts, and whether greedy decoding would write them."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import jllama
from eval.likelihood import at_supervised, batches, hidden
from jllama.cli.terminal import Progress
from jllama.errors import InputError
from jllama.lora import split
from jllama.loss import chunk_logits

Continued = tuple[Sequence[int], int]  # ids; so many of them, the last, are the continuation


class Found(NamedTuple):
    """Of one continuation."""

    logprob: float  # nats, summed over its tokens
    greedy: bool  # each of its tokens is the likeliest one


@functools.partial(jax.jit, static_argnames=("chunk",))
def follow(
    x: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    rows: Int[Array, " N"],
    targets: Int[Array, "N T"],
    mask: Bool[Array, "N T"],
    chunk: int | None = None,
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """Each target's log-probability, and 1 where it is not the likeliest; fp32, 0 outside the mask.

    Args:
        x: what `hidden` gave.
        rows: the row of x that each line of targets follows: several may follow one.
        chunk: as for `at_supervised`.
    """
    T, wanted, head = x.shape[1], jnp.ravel(targets), head.astype(x.dtype)

    def measure(at):
        logits = chunk_logits(x[rows[at // T], at % T], head)
        here = jnp.take_along_axis(logits, wanted[at][:, None], axis=-1)[:, 0]
        logprob = here - jax.nn.logsumexp(logits, axis=-1)
        return jnp.stack([logprob, jnp.argmax(logits, axis=-1) != wanted[at]])

    logprob, missed = at_supervised(measure, 2, mask, head.shape[0], chunk)
    return logprob, missed


def find(
    voice: tuple[jllama.Llama, float], requests: Sequence[Continued], batch_size: int, title: str
) -> list[Found]:
    """What the model says of each continuation, in their order.

    Requests that read the same ids and differ in the last token alone, as the letters of a
    multiple-choice question do, are read once.

    Raises:
        InputError: if the logits are not finite.
    """
    model, adapter_scale = voice
    graphdef, adapters, base = split(model)
    weights = adapters, base, jnp.float32(adapter_scale)
    head = model.head_weight.matrix(model.head_weight.dtype)
    alike: dict[bytes, list[int]] = {}
    for index, (ids, _) in enumerate(requests):
        alike.setdefault(np.array(ids[:-1], np.int32).tobytes(), []).append(index)
    groups = list(alike.values())
    read = [np.array(requests[group[0]][0][:-1], np.int32) for group in groups]
    found: dict[int, Found] = {}
    todo = batches(list(map(len, read)), batch_size)
    with Progress(title, len(todo), "batches") as progress:
        for width, chosen in todo:
            tokens = np.zeros((batch_size, width), np.int32)
            for row, group in enumerate(chosen):
                tokens[row, : len(read[group])] = read[group]
            x = hidden(weights, tokens, graphdef=graphdef)
            asked = [(row, index) for row, group in enumerate(chosen) for index in groups[group]]
            for start in range(0, len(asked), batch_size):
                part = asked[start : start + batch_size]
                found |= _of_rows(x, head, [(row, index, requests[index]) for row, index in part])
            progress.advance()
    return [found[index] for index in range(len(requests))]


def _of_rows(
    x: jax.Array, head: jax.Array, asked: Sequence[tuple[int, int, Continued]]
) -> dict[int, Found]:
    """By index, of at most as many (row of x, index, request) as x has rows."""
    B, T, _ = x.shape
    rows, targets, mask = np.zeros(B, np.int32), np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    for line, (row, _, (ids, length)) in enumerate(asked):
        here = (line, slice(len(ids) - 1 - length, len(ids) - 1))
        rows[line], targets[here], mask[here] = row, ids[-length:], True
    logprobs, missed = jax.device_get(follow(x, head, rows, targets, mask))
    sums = logprobs.sum(axis=-1, dtype=np.float64)
    if not np.all(np.isfinite(sums)):
        raise InputError("the model's logits are not finite; its weights or adapter are damaged")
    return {
        index: Found(float(sums[line]), not missed[line].any())
        for line, (_, index, _) in enumerate(asked)
    }
