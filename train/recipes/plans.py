"""What the recipes for cards are planned to take: planned by docs/site/recipes.py, kept as JSON.

plans.json   {"date": ..., "versions": {...}, "plans": {"7b-8gb": {"model": "llama-2-7b",
              "gpu": "rtx-4060", "step": {...}, "peak_mib": ..., "free_mib": ...,
              "predicted_tokens_per_second": ...}, ...}}
"""

import json
from dataclasses import asdict
from typing import Any

from jllama.cli.settings import settings_from_yaml
from jllama.config import PRESETS
from jllama.folders.json_files import read_json
from jllama.sharding import mesh_shape
from train.config import TrainConfig
from train.data.documents import evenly
from train.plan.arithmetic import Step
from train.plan.cards import GPUS, Gpu
from train.recipes import RECIPES, recipe_file

PLANS = RECIPES / "plans.json"
MODELS = {"7b": "llama-2-7b", "8b": "llama-3-8b"}
# The card that a recipe is planned for, of those with so much memory.
CARDS = {
    "8gb": "rtx-4060", "12gb": "rtx-3060", "24gb": "rtx-4090", "40gb": "a100-40gb",
    "80gb": "h100",
}  # fmt: skip
ROW_TOKENS = 300  # of every packed row, as `jllama plan` has it


def planned() -> dict[str, dict[str, Any]]:
    """The plans by recipe."""
    return read_json(PLANS)["plans"]


def card_of(name: str) -> Gpu:
    """The card that a recipe such as 7b-8gb is planned for."""
    return GPUS[CARDS[name.partition("-")[2]]]


def model_of(name: str) -> str:
    """The preset of its model."""
    return MODELS[name.partition("-")[0]]


def step_of(name: str) -> Step:
    """The step that a recipe for a card takes, with rows of `ROW_TOKENS`."""
    config = settings_from_yaml(TrainConfig, recipe_file(name))
    assert config.remat != "auto"
    assert config.micro_batch_size != "auto"
    return Step(
        PRESETS[model_of(name)],
        config.lora,
        config.precision,
        config.remat,
        config.micro_batch_size,
        config.max_seq_len,
        config.gradient_accumulation_steps,
        config.optimizer,
        evenly(ROW_TOKENS, config.max_seq_len) if config.packing else (),
        mesh_shape(config.mesh),
        config.asked_base,
    )


def described(step: Step) -> dict[str, Any]:
    """A step as JSON, by which a plan is known to be that of a recipe."""
    return json.loads(json.dumps(asdict(step)))
