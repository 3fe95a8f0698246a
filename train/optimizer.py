"""Who learns, and by which rule. Nothing else in the project knows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from jllama.lora import split
from jllama.model import Llama
from train.config import OptimizerName, Scheduler, Tune

Parameters = dict[str, nnx.State]  # {"learned": ..., "frozen": ...}


def split_learned(model: Llama, tune: Tune) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model as (structure, what learns, what is frozen): adapters and base, or all and none."""
    if tune == "lora":
        return split(model)
    graphdef, learned, frozen = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return graphdef, learned, frozen


def labels(parameters: Parameters) -> dict[str, nnx.State]:
    """A label for every parameter of the model, frozen weights included."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, parameters)


def adapter_labels(parameters: Parameters) -> Parameters:
    """`b` for every B, `a` for the other adapter arrays: LoRA+ gives them different rates."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "b" if path[-2].key == "b" else "a", parameters
    )


def count(parameters: Parameters) -> dict[str, int]:
    """Number of parameters under each label."""
    totals = {"learned": 0, "frozen": 0}
    pairs = zip(jax.tree.leaves(parameters), jax.tree.leaves(labels(parameters)), strict=True)
    for leaf, label in pairs:
        totals[label] += leaf.size
    return totals


def learning_rate_schedule(
    scheduler: Scheduler, peak: float, warmup: int, steps: int
) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up over the first `warmup`, then decay to 0.

    Steps are optimizer steps, never micro-steps.
    """
    after = max(1, steps - warmup)
    decay = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, after),
        "cosine": optax.cosine_decay_schedule(peak, after),
    }[scheduler]
    if warmup == 0:
        return decay
    # Step 0 already learns: the warm-up starts at peak / warmup, not at nothing.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(
    parameters: Parameters,
    schedule: optax.Schedule,
    *,
    name: OptimizerName = "adamw",
    weight_decay: float,
    max_grad_norm: float,
    accumulation: int,
    b_rate_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """A rule for what learns, after summing `accumulation` gradients; nothing for the rest.

    The accumulator is inside the `learned` label: around the whole tree it would be as large as
    the model. Gradients are added, not averaged, because each micro-batch's loss is already
    divided by the tokens of the whole window. A sum that is not finite changes nothing.

    Args:
        max_grad_norm: clips the global norm of the window's gradient; 0 does not clip.
        b_rate_ratio: LoRA+ (Hayou et al., 2024): how much faster B learns than A.
    """

    def rule_with(rate: optax.Schedule) -> optax.GradientTransformation:
        if name == "adafactor":
            # optax.adafactor scales by the parameter, which holds a B of zeros where it is, and
            # decays weights by a rate of its own.
            return optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(weight_decay),
                optax.scale_by_learning_rate(rate),
            )
        return {"adamw": optax.adamw, "lion": optax.lion}[name](rate, weight_decay=weight_decay)

    rule = rule_with(schedule)
    if b_rate_ratio != 1:
        faster = rule_with(lambda step: b_rate_ratio * schedule(step))
        rule = optax.multi_transform({"a": rule, "b": faster}, adapter_labels)
    learned = accumulate(rule, accumulation, max_grad_norm)
    return optax.multi_transform(
        {"learned": learned, "frozen": optax.set_to_zero()},
        labels(parameters),
    )


class Guarded(NamedTuple):
    """The state of a rule, and of its last window the norms of the gradient and of the update."""

    rule: optax.OptState
    grad_norm: Float[Array, ""]
    update_norm: Float[Array, ""]


def accumulate(
    rule: optax.GradientTransformation, accumulation: int, max_grad_norm: float = 0
) -> optax.GradientTransformation:
    """MultiSteps that adds gradients, clips their sum, and passes over one that is not finite."""

    def start(parameters):
        return Guarded(rule.init(parameters), jnp.zeros(()), jnp.zeros(()))

    def guarded(gradient, state, parameters):
        norm = tree_norm(gradient)
        finite = jnp.isfinite(norm)
        if max_grad_norm > 0:
            share = jnp.minimum(1, max_grad_norm / norm)
            gradient = jax.tree.map(lambda x: share * x, gradient)

        def kept(update, parameter):
            # A weight that would overflow stays: what learns is finite, and can always be written.
            return jnp.where(finite & jnp.isfinite(parameter + update), update, 0)

        updates, moved = rule.update(gradient, state.rule, parameters)
        updates = jax.tree.map(kept, updates, parameters)
        moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state.rule)
        return updates, Guarded(moved, norm, tree_norm(updates))

    multi = optax.MultiSteps(
        optax.GradientTransformation(start, guarded), accumulation, use_grad_mean=False
    )

    def update(gradient, state, parameters=None):
        updates, state = multi.update(gradient, state, parameters)
        # MultiSteps empties its sum by a product with 0, which leaves what is not finite.
        emptied = jax.tree.map(lambda x: jnp.where(state.mini_step == 0, 0.0, x), state.acc_grads)
        return updates, state._replace(acc_grads=emptied)

    return optax.GradientTransformation(multi.init, update)


def tree_norm(tree: Any) -> Float[Array, ""]:
    """The norm of all arrays as one vector.

    Each is summed along its longest axis first, and what is left of all of them together: reduced
    one by one, hundreds of adapters would take two kernels each.
    """
    squares = [jnp.square(leaf) for leaf in jax.tree.leaves(tree)]
    sums = [jnp.ravel(jnp.sum(x, axis=x.shape.index(max(x.shape)))) for x in squares]
    together = jax.lax.optimization_barrier(jnp.concatenate(sums))  # or XLA takes them apart
    return jnp.sqrt(jnp.sum(together))


def take_norms(
    state: optax.OptState,
) -> tuple[Float[Array, ""], Float[Array, ""], optax.OptState]:
    """Norms of the last window's gradient and of what it changed; and the state without them.

    Of a window that was passed over the first is not finite, which no saved state may hold.
    """
    taken = optax.tree.get(state, "grad_norm"), optax.tree.get(state, "update_norm")
    zero = jnp.zeros(())
    return *taken, optax.tree.set(state, grad_norm=zero, update_norm=zero)
