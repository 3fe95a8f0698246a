"""Cross-entropy that never holds `[B, T, V]` in fp32."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK_BYTES = 64 * 2**20  # of fp32 logits at a time


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def frozen_head_loss(
    x: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    chunk: int | None = None,
) -> Float[Array, ""]:
    """Cross-entropy in nats, summed over the supervised positions; `head` gets no gradient.

    The supervised positions are gathered and taken `chunk` at a time, as many chunks as the batch
    has of them. The gradient of x is formed in the same pass, so only it, `[B, T, D]`, waits for
    the backward pass: logits are neither kept nor computed twice.
    """
    return _forward(x, head, targets, mask, chunk)[0]


def _forward(x, head, targets, mask, chunk):
    B, T, D = x.shape
    chunk = chunk or min(B * T, max(64, CHUNK_BYTES // (4 * head.shape[0])))
    rows, targets, mask = x.reshape(-1, D), jnp.ravel(targets), jnp.ravel(mask)
    supervised = jnp.sum(mask)
    order = jnp.argsort(~mask, stable=True)  # supervised positions first
    order = jnp.pad(order, (0, -order.size % chunk), constant_values=order.size)  # dropped below
    precision = "highest" if x.dtype == jnp.float32 else "default"

    def one_chunk(index, carry):
        total, gradient = carry
        at = jax.lax.dynamic_slice(order, (index * chunk,), (chunk,))
        counts = index * chunk + jnp.arange(chunk) < supervised
        wanted = targets[at]
        logits = jnp.einsum(
            "CD,VD->CV", rows[at], head, precision=precision, preferred_element_type=jnp.float32
        )
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        losses = log_sum - jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        slope = jnp.exp(logits - log_sum[:, None]) - jax.nn.one_hot(wanted, head.shape[0])
        slope = jnp.where(counts[:, None], slope, 0).astype(x.dtype)
        pulled = jnp.einsum("CV,VD->CD", slope, head, precision=precision)
        return total + jnp.sum(jnp.where(counts, losses, 0)), gradient.at[at].set(
            pulled, mode="drop"
        )

    carry = (jnp.zeros((), jnp.float32), jnp.zeros_like(rows))
    chunks = (supervised + chunk - 1) // chunk
    total, gradient = jax.lax.fori_loop(0, chunks, one_chunk, carry)
    return total, gradient.reshape(x.shape)


def _backward(chunk, gradient, slope):
    return (slope * gradient).astype(gradient.dtype), None, None, None


frozen_head_loss.defvjp(_forward, _backward)
