"""The tables of docs/settings.md, and the trainings that they are made from.

    python docs/site/settings.py ROWS     # trains, into docs/results/settings-cpu.json
    python docs/site/settings.py --show   # prints the tables

ROWS is a file of Alpaca rows for SmolLM2 in models/smollm2, which `make demo-smollm2` makes; the
sample has its own. What the results have already is kept: remove them to train all anew.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jllama import bundled
from jllama.cli import children
from jllama.folders.run import RunFolder
from jllama.machine import measured_here

FILE = Path(__file__).parents[1] / "results/settings-cpu.json"
HELD_OUT = bundled.ROWS.with_name("heldout.json")
RATES = {"sample": (3e-3, 1e-2, 1e-3), "smollm2": (1e-3, 3e-3, 3e-4)}
TARGETS = ("wq,wv", "wq,wk,wv,wo", "w1,w2,w3", "all")
ALWAYS = {
    "sample": ["--config", "sample", "--val-data", HELD_OUT],
    "smollm2": ["--config", "smollm2", "--max-steps", 12],
}


class Trial(NamedTuple):
    """One training; `batch` counts packed sequences, of 64 tokens (sample) or 256 (SmolLM2)."""

    model: str
    targets: str = "all"
    learning_rate: float = 3e-3
    rank: int = 16
    alpha: float = 32.0
    batch: int = 5
    epochs: int = 4
    seed: int = 0


def grid() -> Iterator[Trial]:
    """Every training: what is known of all settings at one rate first, then at the others."""
    sample, smollm2 = RATES["sample"], RATES["smollm2"]
    for rate, other in zip(sample, smollm2, strict=True):
        yield from (Trial("sample", targets, rate) for targets in TARGETS)
        for rank in (4, 64):
            yield from (Trial("sample", "all", rate, rank, alpha) for alpha in (32.0, 2.0 * rank))
        yield from (Trial("sample", "all", rate, batch=batch) for batch in (20, 80))
        if rate == sample[0]:
            yield from (Trial("sample", epochs=epochs) for epochs in (1, 2, 8))
        for targets in ("all", "wq,wv"):
            yield Trial("smollm2", targets, other, batch=2, epochs=1)
    for seed in (1, 2):
        yield from (Trial("sample", targets, seed=seed) for targets in TARGETS)
        yield from (Trial("sample", epochs=epochs, seed=seed) for epochs in (1, 2, 8))


def train(trial: Trial, rows: str) -> dict[str, Any]:
    """A run of `train.lora`, and its held-out loss before the first step and after the last."""
    batch = 2 if trial.model == "smollm2" else 5
    data = rows if trial.model == "smollm2" else bundled.ROWS
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        flags = [
            *ALWAYS[trial.model], "--data", data, "--lora-targets", trial.targets,
            "--learning-rate", trial.learning_rate, "--lora-rank", trial.rank,
            "--lora-alpha", trial.alpha, "--micro-batch-size", batch,
            "--gradient-accumulation-steps", trial.batch // batch, "--epochs", trial.epochs,
            "--eval-steps", 10**6, "--seed", trial.seed, "--output-dir", run,
        ]  # fmt: skip
        children.run("train.lora", flags)
        lines = RunFolder(run).read_metrics().values
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    steps = [line for line in lines if "step_seconds" in line]
    return {
        "loss_before": losses[0],
        "held_out_loss": losses[-1],
        "steps": len(steps),
        "learned_tokens": sum(line["tokens"] for line in steps),
    }


def main() -> None:
    if "--show" in sys.argv:
        print(*tables(), sep="\n\n")
        return
    done: list[dict[str, Any]] = json.loads(FILE.read_text())["runs"] if FILE.exists() else []
    wanted = list(dict.fromkeys(grid()))
    missing = [one for one in wanted if all(one != Trial(**run["settings"]) for run in done)]
    for number, trial in enumerate(missing, start=1):
        found = train(trial, sys.argv[1])
        done.append({"settings": trial._asdict(), **found})
        content = {**measured_here("train"), "runs": done}
        content["command"] = ["python", "docs/site/settings.py", "alpaca_data_200.json"]
        FILE.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{number}/{len(missing)} {trial} {found}", flush=True)


def tables() -> list[str]:
    """In Markdown: of each model the held-out loss of settings by rate; then over seeds."""
    runs = json.loads(FILE.read_text())["runs"]
    loss = {Trial(**run["settings"]): run["held_out_loss"] for run in runs}
    found = [by_rate(model, loss) for model in RATES]
    lines = ["| sample, over seeds | mean | from | to | seeds |", "|---|---:|---:|---:|---:|"]
    for first in dict.fromkeys(trial._replace(seed=0) for trial in grid() if trial.seed):
        some = [loss[one] for seed in range(3) if (one := first._replace(seed=seed)) in loss]
        if len(some) > 1:
            figures = [statistics.mean(some), min(some), max(some)]
            cells = [*(f"{figure:.3f}" for figure in figures), str(len(some))]
            lines.append(f"| {named(first)} | {' | '.join(cells)} |")
    return [*filter(None, found), *(["\n".join(lines)] if len(lines) > 2 else [])]


def by_rate(model: str, loss: Mapping[Trial, float]) -> str:
    """A line for each setting of a model, with the first seed; empty if none was trained."""
    rates = sorted(RATES[model])
    rows: dict[Trial, list[str]] = {}
    for trial, figure in loss.items():
        if trial.model == model and trial.seed == 0:
            row = rows.setdefault(trial._replace(learning_rate=0), [""] * len(rates))
            row[rates.index(trial.learning_rate)] = f"{figure:.3f}"
    heads = [f"| {model} | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    heads.append("|---" + "|---:" * len(rates) + "|")
    lines = [f"| {named(row)} | {' | '.join(cells)} |" for row, cells in rows.items()]
    return "\n".join([*heads, *sorted(lines)]) if lines else ""


def named(trial: Trial) -> str:
    """`all`, r 16, alpha 32, 5 sequences a step, 4 epochs"""
    epochs = f"{trial.epochs} epoch{'s' if trial.epochs > 1 else ''}"
    return (
        f"`{trial.targets}`, r {trial.rank}, alpha {trial.alpha:g}, {trial.batch} sequences a "
        f"step, {epochs}"
    )


if __name__ == "__main__":
    main()
