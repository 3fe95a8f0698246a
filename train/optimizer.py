"""Who learns, and by which rule. Nothing else in the project knows."""

from typing import Literal

import jax
import optax
from flax import nnx

Scheduler = Literal["constant", "linear", "cosine"]
Parameters = dict[str, nnx.State]  # {"adapters": ..., "base": ...}


def labels(parameters: Parameters) -> dict[str, nnx.State]:
    """A label for every parameter of the model, base weights included."""
    return {
        "adapters": jax.tree.map(lambda _: "lora", parameters["adapters"]),
        "base": jax.tree.map(lambda _: "frozen", parameters["base"]),
    }


def count(parameters: Parameters) -> dict[str, int]:
    """Number of parameters under each label."""
    totals = {"lora": 0, "frozen": 0}
    pairs = zip(jax.tree.leaves(parameters), jax.tree.leaves(labels(parameters)), strict=True)
    for leaf, label in pairs:
        totals[label] += leaf.size
    return totals


def learning_rate_schedule(
    scheduler: Scheduler, peak: float, warmup_ratio: float, steps: int
) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up over `warmup_ratio` of all, then decay to 0.

    Steps are optimizer steps, never micro-steps.
    """
    warmup = round(warmup_ratio * steps)
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
    weight_decay: float,
    max_grad_norm: float,
    accumulation: int,
) -> optax.GradientTransformation:
    """AdamW on the adapters, after summing `accumulation` gradients; nothing on the base.

    The accumulator is inside the `lora` label: around the whole tree it would be as large as
    the model. Gradients are added, not averaged, because each micro-batch's loss is already
    divided by the tokens of the whole window.

    Args:
        max_grad_norm: clips the global norm of the window's gradient; 0 does not clip.
    """
    rule = optax.adamw(schedule, weight_decay=weight_decay)
    if max_grad_norm > 0:
        rule = optax.chain(optax.clip_by_global_norm(max_grad_norm), rule)
    accumulated = optax.MultiSteps(rule, accumulation, use_grad_mean=False)
    return optax.multi_transform(
        {"lora": accumulated.gradient_transformation(), "frozen": optax.set_to_zero()},
        labels(parameters),
    )
