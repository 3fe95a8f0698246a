"""The tables of docs/scaling.md: `python docs/site/scaling.py` plans docs/results/scaling.json.

What the file has already is kept: remove it to plan all anew, in half an hour.
`python docs/site/scaling.py --show` prints the tables of what was planned.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jllama.machine import measured_here
from jllama.sharding import mesh_shape
from train.plan.cards import find_gpu
from train.plan.command import PlanConfig, as_json
from train.plan.compiled import Request
from train.plan.planner import COMPILERS, estimate, make_plans

FILE = Path(__file__).parents[1] / "results/scaling.json"
MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3.1-405b")
CARDS = ("rtx-4090", "a100-80gb", "h200")
MESHES = (
    "", "data=8", "fsdp=8", "tensor=8",
    "data=8,fsdp=8", "fsdp=64", "data=8,tensor=8", "fsdp=8,tensor=8",
)  # fmt: skip
SMALL = ("llama-2-7b", "llama-2-13b")  # for which a card or eight are enough
ROWS = 4  # of 512 tokens that a card computes with at a time; of cards that share rows, each


def grid() -> Iterator[PlanConfig]:
    """What is planned, but for what cannot fit."""
    for model in MODELS:
        for gpu in CARDS:
            for mesh in MESHES:
                shape = mesh_shape(mesh)
                if model in SMALL and (shape.tensor > 1 or shape.fsdp > 8):
                    continue
                config = PlanConfig(
                    model=model, gpu=gpu, mesh=mesh, micro_batch_size=ROWS * shape.tensor
                )
                card = find_gpu(gpu)
                if estimate(config.step, card).peak < 0.85 * card.room:  # else compiled whole
                    yield config
    for cards in (2, 4):
        for rows in (1, 8):
            yield PlanConfig(
                model="llama-2-70b", gpu="rtx-4090", base="int4", mesh=f"fsdp={cards}",
                micro_batch_size=rows,
            )  # fmt: skip
    for rows in (1, 8):
        yield PlanConfig(model="llama-2-70b", mesh="fsdp=8", micro_batch_size=rows)


def main() -> None:
    if "--show" in sys.argv:
        print(table())
        return
    plans: list[dict[str, Any]] = json.loads(FILE.read_text())["plans"] if FILE.exists() else []
    configs = [
        config for config in grid() if all(asdict(config) != plan["settings"] for plan in plans)
    ]
    for number, config in enumerate(configs, start=1):
        began = time.monotonic()
        (plan,) = make_plans([Request(config.step, whole=False)], find_gpu(config.gpu))
        plans.append(as_json(plan, config))
        content = {**measured_here("plan", COMPILERS), "plans": plans}
        FILE.write_text(json.dumps(content, indent=1) + "\n")
        name = f"{config.model} {config.gpu} {config.mesh}"
        print(f"{number}/{len(configs)} {name} {time.monotonic() - began:.0f} s", flush=True)


def table() -> str:
    """Lines of Markdown, one for each plan."""

    def place(plan: dict[str, Any]) -> tuple[Any, ...]:
        asked = plan["settings"]
        shape = mesh_shape(asked["mesh"])
        model, card = MODELS.index(asked["model"]), CARDS.index(asked["gpu"])
        return model, card, asked["base"] != "stored", shape.size, asked["mesh"], shape.rows

    lines = []
    for plan in sorted(json.loads(FILE.read_text())["plans"], key=place):
        asked = plan["settings"]
        base = "bf16" if asked["base"] == "stored" else asked["base"]
        sent = sum(plan["exchanged_bytes"].values()) / 1e9
        shape = mesh_shape(asked["mesh"])
        hidden = plan["tokens_per_second_if_exchange_is_hidden"]
        fits = f"{plan['peak_mib']:,.0f}" + ("" if plan["free_mib"] >= 0 else " (too much)")
        lines.append(
            f"| `{asked['model']}` {base} | `{asked['gpu']}` | {shape.size} | {asked['mesh']} | "
            f"{asked['micro_batch_size'] * shape.rows} | {fits} | {sent:,.1f} | "
            f"{plan['predicted_tokens_per_second']:,.0f} | {hidden:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
