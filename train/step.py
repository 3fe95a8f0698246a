"""One compiled call per optimizer step."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jllama.loss import frozen_head_loss


class Window(NamedTuple):
    """The rows of one optimizer step: k micro-batches of B rows of T positions."""

    tokens: Int[Array | np.ndarray, "k B T"]
    targets: Int[Array | np.ndarray, "k B T"]
    mask: Bool[Array | np.ndarray, "k B T"]  # True where the target is learned
    segments: Int[Array | np.ndarray, "k B T"] | None = None  # packed rows: number of the document,
    positions: Int[Array | np.ndarray, "k B T"] | None = None  # and the position in it


class TrainState(NamedTuple):
    """Everything that changes; what a resume needs."""

    step: Int[Array, ""]
    adapters: nnx.State
    optimizer: optax.OptState


class StepMetrics(NamedTuple):
    """Of one window: summed cross-entropy (nats), supervised tokens, norm of the gradient.

    `skipped` is True where loss or gradient was not finite and the step changed nothing.
    """

    loss_sum: Float[Array, ""]
    tokens: Int[Array, ""]
    grad_norm: Float[Array, ""]
    update_ratio: Float[Array, ""]  # norm of the update over norm of the adapters
    skipped: Bool[Array, ""]


def summed_loss(
    adapters: nnx.State,
    base: nnx.State,
    rows: Window,
    key: Key[Array, ""] | None,
    graphdef: nnx.GraphDef,
) -> Float[Array, ""]:
    """Cross-entropy of one micro-batch (arrays `[B, T]`), summed over its supervised tokens."""
    model = nnx.merge(graphdef, adapters, base, copy=True)
    x = model.hidden(rows.tokens, rows.positions, rows.segments, key)
    return frozen_head_loss(x, model.head_weight[...], rows.targets, rows.mask)


def initial_state(
    adapters: nnx.State, base: nnx.State, optimizer: optax.GradientTransformation
) -> TrainState:
    """Step 0, with zero moments and an empty accumulator."""
    moments = optimizer.init({"adapters": adapters, "base": base})
    return on_device(TrainState(jnp.zeros((), jnp.int32), adapters, moments))


def on_device(state: TrainState) -> TrainState:
    """The state where the step will leave it: placed elsewhere, step 2 would compile again."""
    return jax.device_put(state, jax.local_devices()[0])


@functools.partial(jax.jit, static_argnames=("graphdef", "optimizer"), donate_argnames=("state",))
def train_step(
    state: TrainState,
    base: nnx.State,
    window: Window,
    key: Key[Array, ""],
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, StepMetrics]:
    """Learns from one window.

    The loss of a micro-batch is its summed cross-entropy over the supervised tokens of the whole
    window, so the sum of k gradients is the gradient of the big batch, whatever the rows hold.

    Args:
        base: the frozen weights; an argument, never differentiated, donated or copied.
        key: the run's key; the step's number is folded in here, so a resume needs no generator.
    """
    supervised = jnp.sum(window.mask)
    step_key = jax.random.fold_in(key, state.step)

    def loss(adapters, rows, micro_key):
        total = summed_loss(adapters, base, rows, micro_key, graphdef)
        return total / jnp.maximum(supervised, 1), total

    def micro_step(carry, rows):
        adapters, moments, gradient, index = carry
        micro_key = jax.random.fold_in(step_key, index)
        grads, total = jax.grad(loss, has_aux=True)(adapters, rows, micro_key)
        # multi_transform takes a whole model; the frozen part is dead code in the compiled step.
        frozen = jax.tree.map(jnp.zeros_like, base)
        updates, moments = optimizer.update(
            {"adapters": grads, "base": frozen}, moments, {"adapters": adapters, "base": base}
        )
        adapters = optax.apply_updates(adapters, updates["adapters"])
        gradient = jax.tree.map(jnp.add, gradient, grads)
        return (adapters, moments, gradient, index + 1), total

    nothing = jax.tree.map(jnp.zeros_like, state.adapters)
    carry = (state.adapters, state.optimizer, nothing, jnp.zeros((), jnp.int32))
    (adapters, moments, gradient, _), losses = jax.lax.scan(micro_step, carry, window)
    loss_sum, norm = jnp.sum(losses), optax.global_norm(gradient)
    skipped = ~jnp.isfinite(loss_sum + norm)
    kept = jax.tree.map(
        lambda old, new: jnp.where(skipped, old, new),
        (state.adapters, state.optimizer),
        (adapters, moments),
    )
    moved = optax.global_norm(jax.tree.map(jnp.subtract, kept[0], state.adapters))
    ratio = moved / optax.global_norm(state.adapters)
    metrics = StepMetrics(loss_sum, supervised, norm, ratio, skipped)
    return TrainState(state.step + 1, *kept), metrics


@functools.partial(jax.jit, static_argnames=("graphdef",))
def eval_step(
    adapters: nnx.State, base: nnx.State, window: Window, *, graphdef: nnx.GraphDef
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed cross-entropy and supervised tokens of a window, without dropout."""

    def micro_step(total, rows):
        return total + summed_loss(adapters, base, rows, None, graphdef), None

    total, _ = jax.lax.scan(micro_step, jnp.zeros(()), window)
    return total, jnp.sum(window.mask)


def compilations() -> int:
    """How often the two steps have been compiled in this process; a run needs one of each."""
    return train_step._cache_size() + eval_step._cache_size()  # type: ignore[attr-defined]
