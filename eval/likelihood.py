"""How likely models find tokens, and how far one model is from another: NLL and KL in nats.

    NLL               -log p(token)
    KL(last || first) = sum over v of p_last(v) (log p_last(v) - log p_first(v))

Logits and log-softmax are fp32 and never `[B, T, V]`; sums over tokens are fp64, on the host.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from eval.subject import Voices
from jllama.decode.generate import Weights, power_of_two
from jllama.errors import InputError
from jllama.lora import scaled, split
from jllama.loss import chunk_logits, supervised_chunks

SHORTEST = 32  # positions to which a row is padded; then 64, 128, ...

# Ids, and for each whether it is learned.
Learned = tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]


class Score(NamedTuple):
    """Of one sequence, summed over its learned tokens, in nats."""

    tokens: int
    nll: dict[str, float]
    kl: float  # KL(last voice || first voice); 0 for a single voice


def batches(lengths: Sequence[int], batch_size: int) -> list[tuple[int, list[int]]]:
    """(positions, rows) of every batch; each number of positions is compiled once.

    lengths 5 40 9 7, 2 rows a batch  ->  [(32, [0, 2]), (32, [3]), (64, [1])]
    """
    alike: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        alike.setdefault(power_of_two(length, SHORTEST), []).append(row)
    return [
        (width, rows[start : start + batch_size])
        for width, rows in sorted(alike.items())
        for start in range(0, len(rows), batch_size)
    ]


def count_batches(sequences: Sequence[Learned], batch_size: int) -> int:
    """How many batches `score_sequences` makes of them: an id is an input or a target, or both."""
    return len(batches([len(ids) - 1 for ids, _ in sequences], batch_size))


@functools.partial(jax.jit, static_argnames=("graphdef",))
def hidden(
    weights: Weights, tokens: Int[Array, "B T"], *, graphdef: nnx.GraphDef
) -> Float[Array, "B T D"]:
    """The normed stream before the head, with the adapters scaled."""
    adapters, base, adapter_scale = weights
    return nnx.merge(graphdef, scaled(adapters, adapter_scale), base).hidden(tokens)


@functools.partial(jax.jit, static_argnames=("chunk",))
def compare(
    xs: Sequence[Float[Array, "B T D"]],
    heads: Sequence[Float[Array, "V D"]],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    chunk: int | None = None,
) -> tuple[list[Float[Array, "B T"]], Float[Array, "B T"]]:
    """Each model's NLL at every position, and KL(last || first); fp32 nats, 0 outside the mask.

    Args:
        xs: what `hidden` gave, one for each model.
        heads: theirs, in the same order.
        chunk: supervised positions whose logits `[chunk, V]` are held at a time.
    """
    D = xs[0].shape[-1]
    rows, targets = [x.reshape(-1, D) for x in xs], jnp.ravel(targets)

    def measure(at):
        logs = [
            jax.nn.log_softmax(chunk_logits(x[at], head.astype(x.dtype)), axis=-1)
            for x, head in zip(rows, heads, strict=True)
        ]
        wanted = targets[at][:, None]
        nll = [-jnp.take_along_axis(log, wanted, axis=-1)[:, 0] for log in logs]
        kl = jnp.sum(jnp.exp(logs[-1]) * (logs[-1] - logs[0]), axis=-1)
        return jnp.stack([*nll, kl])

    *nll, kl = at_supervised(measure, len(xs) + 1, mask, heads[0].shape[0], chunk)
    return nll, kl


def at_supervised(
    measure: Callable[[Int[Array, " C"]], Float[Array, "M C"]],
    measures: int,
    mask: Bool[Array, "B T"],
    vocab_size: int,
    chunk: int | None,
) -> Float[Array, "M B T"]:
    """What `measure` says of the supervised positions, some of the flat `[B * T]` at a time.

    Args:
        measures: M, numbers that it gives of a position; all are 0 outside the mask.
        chunk: positions at a time; by default as many as `supervised_chunks` takes.
    """
    chunks, positions = supervised_chunks(mask, vocab_size, chunk)

    def one_chunk(index, found):
        at, counts = positions(index)
        return found.at[:, at].set(jnp.where(counts[None], measure(at), 0), mode="drop")

    nothing = jnp.zeros((measures, mask.size), jnp.float32)
    return jax.lax.fori_loop(0, chunks, one_chunk, nothing).reshape(measures, *mask.shape)


def score_sequences(
    voices: Voices,
    sequences: Sequence[Learned],
    batch_size: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Score]:
    """Scores (ids, what is learned of them), in their order.

    Args:
        advance: called after each batch, of which `count_batches` says how many there are.

    Raises:
        InputError: if the logits are not finite.
    """
    parts = []
    for model, adapter_scale in voices.values():
        graphdef, adapters, base = split(model)
        parts.append((graphdef, (adapters, base, jnp.float32(adapter_scale))))
    weights = [model.head_weight for model, _ in voices.values()]
    heads = [weight.matrix(weight.dtype) for weight in weights]
    scores: dict[int, Score] = {}
    for width, chosen in batches([len(ids) - 1 for ids, _ in sequences], batch_size):
        tokens, targets, mask = (np.zeros((batch_size, width), np.int32) for _ in range(3))
        for line, index in enumerate(chosen):
            ids, learned = sequences[index]
            here = (line, slice(len(ids) - 1))
            tokens[here], targets[here], mask[here] = ids[:-1], ids[1:], learned[1:]
        xs = [hidden(weights, tokens, graphdef=graphdef) for graphdef, weights in parts]
        nll, kl = compare(xs, heads, targets, mask.astype(bool))
        sums = np.stack(jax.device_get([*nll, kl])).sum(axis=-1, dtype=np.float64)
        if not np.all(np.isfinite(sums)):
            raise InputError(
                "the model's logits are not finite; its weights or adapter are damaged"
            )
        for line, index in enumerate(chosen):
            *each, kl_sum = sums[:, line].tolist()
            supervised = int(mask[line].sum())
            scores[index] = Score(supervised, dict(zip(voices, each, strict=True)), kl_sum)
        advance()
    return [scores[index] for index in range(len(sequences))]
