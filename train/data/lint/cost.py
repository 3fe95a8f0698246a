"""What a run on the rows costs: steps, tokens, padding, and time on a card."""

from collections.abc import Mapping
from typing import Any

from jllama.errors import InputError
from jllama.folders.model import model_sizes
from jllama.text.rows import Examples
from train.config import TrainConfig
from train.data.batches import Batches, rows_of_epoch
from train.plan.auto import step_of
from train.plan.cards import Gpu
from train.plan.compiled import Request
from train.plan.planner import make_plans

# Ways to lay rows into sequences, by their flags.
LAYOUTS: Mapping[str, dict[str, Any]] = {
    "padded": {"packing": False},
    "--length-buckets 3": {"packing": False, "length_buckets": 3},
    "--packing": {"packing": True},
}


def layouts(examples: Examples, config: TrainConfig) -> dict[str, dict[str, Any]]:
    """An epoch of single sequences in each layout: how many, how long, and how much is padding."""
    found = {}
    for name, layout in LAYOUTS.items():
        batches = Batches(
            examples, accumulation=1, batch=1, max_seq_len=config.max_seq_len, shuffle=True,
            seed=config.seed, epochs=1, **layout,
        )  # fmt: skip
        share = batches.padding_share()
        found[name] = {"sequences": len(batches), "lengths": batches.lengths, "padding": share}
    return found


def cost(examples: Examples, config: TrainConfig, batches: Batches) -> dict[str, Any]:
    """Of one epoch, and of the run: its positions count the padding, too.

    {"epochs": 3, "steps": 124, "sequences_a_step": 16, "tokens_an_epoch": 14200,
     "learned_tokens_an_epoch": 4100, "positions": 90000, "padding": 0.52}
    """
    seed = config.seed if config.shuffle else None
    rows = [rows_of_epoch(examples.weights, seed, epoch) for epoch in range(config.epochs)]
    used = sum(int((examples.lengths[some] - 1).sum()) for some in rows)
    padding = batches.padding_share()
    steps = min(config.max_steps or len(batches), len(batches))
    assert config.micro_batch_size != "auto"
    return {
        "epochs": config.epochs,
        "steps": steps,
        "sequences_a_step": config.gradient_accumulation_steps * config.micro_batch_size,
        "tokens_an_epoch": int(examples.lengths[rows[0]].sum()),
        "learned_tokens_an_epoch": int(examples.learned_counts[rows[0]].sum()),
        "positions": round(used / (1 - padding) * steps / len(batches)),
        "padding": padding,
    }


def on_card(
    positions: int, config: TrainConfig, batches: Batches, gpu: Gpu, present: bool
) -> dict[str, Any]:
    """The time of a run's positions on a card, evaluations and saves aside.

    Compiles the step as `jllama plan` does, or knows it from before; without the packages for that
    the time is the least that the card's data sheet allows.

    {"gpu": "rtx-4090", "compiled": true, "tokens_per_second": 2900.0, "seconds": 1210.0,
     "peak_mib": 9100.0, "free_mib": 13000.0}

    Raises:
        InputError: if the model's sizes are not known, or its step cannot be compiled.
    """
    lora = config.lora if config.tune == "lora" else None
    sizes = model_sizes(config.model)
    step = step_of(config, sizes, lora, batches.lengths[-1], batches.documents)
    (plan,) = make_plans([Request(step)], gpu, present=present)
    if not plan.speed:
        raise InputError(f"{gpu.name}: nothing is known of its speed; name a listed card")
    return {
        "gpu": gpu.name,
        "compiled": bool(plan.predicted),
        "tokens_per_second": plan.speed,
        "seconds": positions / plan.speed,
        "peak_mib": plan.peak / 2**20,
        "free_mib": plan.free / 2**20,
    }
