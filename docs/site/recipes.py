"""Plans of the recipes for cards: `python docs/site/recipes.py` writes train/recipes/plans.json.

Plans of steps that are there already are kept: remove the file to plan all anew, in a quarter of an
hour.
"""

import json
from typing import Any

from jllama.machine import measured_here
from train.plan.compiled import Request
from train.plan.planner import COMPILERS, make_plans
from train.recipes import recipe_names
from train.recipes.plans import CARDS, PLANS, card_of, described, model_of, planned, step_of

MIB = 2**20


def main() -> None:
    known = planned() if PLANS.exists() else {}
    plans: dict[str, Any] = {}
    for name in recipe_names():
        if name.partition("-")[2] not in CARDS:
            continue
        plans[name] = known.get(name, {})
        if plans[name].get("step") != described(step_of(name)):
            plans[name] = plan(name)
            print(name, {k: v for k, v in plans[name].items() if k != "step"}, flush=True)
        here = measured_here("plan", COMPILERS)
        here["command"] = ["python", "docs/site/recipes.py"]
        PLANS.write_text(json.dumps({**here, "plans": plans}, indent=1) + "\n")


def plan(name: str) -> dict[str, Any]:
    """A recipe's figures on its card."""
    step, gpu = step_of(name), card_of(name)
    (found,) = make_plans([Request(step, gpu, whole=False)], gpu)
    assert found.compiled, "install the extra `plan`"
    return {
        "model": model_of(name),
        "gpu": gpu.name,
        "peak_mib": found.peak / MIB,
        "free_mib": found.free / MIB,
        "margin_mib": found.margin / MIB,
        "predicted_tokens_per_second": found.predicted,
        "summed": found.summed,
        "compile_seconds": found.compile_seconds,
        "step": described(step),
    }


if __name__ == "__main__":
    main()
