"""Who learns, and by which rule. Nothing else in the project knows."""

from typing import Literal

import jax
import optax
from flax import nnx

Scheduler = Literal["constant", "linear", "cosine"]
OptimizerName = Literal["adamw", "adafactor", "lion"]
Parameters = dict[str, nnx.State]  # {"adapters": ..., "base": ...}


def labels(parameters: Parameters) -> dict[str, nnx.State]:
    """A label for every parameter of the model, base weights included."""
    return {
        "adapters": jax.tree.map(lambda _: "lora", parameters["adapters"]),
        "base": jax.tree.map(lambda _: "frozen", parameters["base"]),
    }


def adapter_labels(parameters: Parameters) -> Parameters:
    """`b` for every B, `a` for the other adapter arrays: LoRA+ gives them different rates."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "b" if path[-2].key == "b" else "a", parameters
    )


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
    name: OptimizerName = "adamw",
    weight_decay: float,
    max_grad_norm: float,
    accumulation: int,
    b_rate_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """A rule for the adapters, after summing `accumulation` gradients; nothing for the base.

    The accumulator is inside the `lora` label: around the whole tree it would be as large as
    the model. Gradients are added, not averaged, because each micro-batch's loss is already
    divided by the tokens of the whole window.

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
    if max_grad_norm > 0:
        rule = optax.chain(optax.clip_by_global_norm(max_grad_norm), rule)
    accumulated = optax.MultiSteps(rule, accumulation, use_grad_mean=False)
    return optax.multi_transform(
        {"lora": accumulated.gradient_transformation(), "frozen": optax.set_to_zero()},
        labels(parameters),
    )
