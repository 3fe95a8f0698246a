"""Cross-entropy that never holds `[B, T, V]` in fp32."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK_BYTES = 64 * 2**20  # of fp32 logits at a time


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    head_learns: bool,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """Cross-entropy in nats, summed over the supervised positions.

    The supervised positions are gathered and taken `chunk` at a time, as many chunks as the batch
    has of them. The gradient of x is formed in the same pass, so only it, `[B, T, D]`, waits for
    the backward pass: logits are neither kept nor computed twice. `head` gets a gradient, formed
    in fp32 in the same way, only if `head_learns`.
    """
    return _forward(x, head, targets, mask, head_learns, chunk)[0]


def _forward(x, head, targets, mask, head_learns, chunk):
    B, T, D = x.shape
    stored, head = head, head.astype(x.dtype)
    chunk = chunk or min(B * T, max(64, CHUNK_BYTES // (4 * head.shape[0])))
    rows, targets, mask = x.reshape(-1, D), jnp.ravel(targets), jnp.ravel(mask)
    supervised = jnp.sum(mask)
    order = jnp.argsort(~mask, stable=True)  # supervised positions first
    order = jnp.pad(order, (0, -order.size % chunk), constant_values=order.size)  # dropped below
    precision = "highest" if x.dtype == jnp.float32 else "default"

    def one_chunk(index, carry):
        total, gradient, head_gradient = carry
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
        if head_learns:
            head_gradient += jnp.einsum(
                "CV,CD->VD", slope, rows[at], precision=precision,
                preferred_element_type=jnp.float32,
            )  # fmt: skip
        total += jnp.sum(jnp.where(counts, losses, 0))
        return total, gradient.at[at].set(pulled, mode="drop"), head_gradient

    nothing = jnp.zeros(head.shape, jnp.float32) if head_learns else None
    carry = (jnp.zeros((), jnp.float32), jnp.zeros_like(rows), nothing)
    chunks = (supervised + chunk - 1) // chunk
    total, gradient, head_gradient = jax.lax.fori_loop(0, chunks, one_chunk, carry)
    if head_learns:
        head_gradient = head_gradient.astype(stored.dtype)
    return total, (gradient.reshape(x.shape), head_gradient)


def _backward(head_learns, chunk, gradients, slope):
    gradient, head_gradient = gradients
    pulled = None if head_gradient is None else slope * head_gradient
    return (slope * gradient).astype(gradient.dtype), pulled, None, None


cross_entropy.defvjp(_forward, _backward)
