"""How well each method learns: every one at its own best rate, on the same tokens, with some seeds.

A method is a precision, what learns and the base's format. Remat and accumulation are none: with
them the sums are the same, but for rounding. Those on the way from no technique to all are trained
at three learning rates, and with more seeds at the best of them. LoRA's rates are ten times those
of full tuning, for its best is about so much higher (Schulman et al., "LoRA Without Regret", 2025).

    accuracy.jsonl   {"precision": "bf16", "tune": "lora", "base": "stored", "learning_rate": 0.01,
                      "seed": 0, "eval_loss": 0.34, "tokens": 4873, "steps": 60, ...}

A seed is that of the rows held out, too, so that methods are compared over the same seeds.
"""

import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from eval.ablate.cells import (
    STORED,
    Cell,
    Figures,
    Training,
    check,
    out_of_memory,
    steps_of,
    train_flags,
)
from eval.ablate.staircase import staircase
from jllama.cli.children import Children
from jllama.folders.run import RunFolder

OF_LORA = 10  # times the rates of full tuning
SWEEP = (1 / 3, 1, 3)  # times the rate in the middle
DIVERGED = ("diverged", "no finite gradient")  # what train.lora says then

Method = tuple[str, str, str]  # precision, what learns, the base's format


@dataclass(frozen=True)
class Trial:
    """One training of a method."""

    precision: str
    tune: str
    base: str
    learning_rate: float
    seed: int


class Accuracy(NamedTuple):
    """What a method reached at its best rate: places of its trials, one for each seed."""

    method: Method
    learning_rate: float
    places: list[int]
    at_the_edge: bool  # the best rate is the lowest or the highest that was tried

    @property
    def name(self) -> str:
        """`bf16, LoRA`, with the base if it is in codes."""
        precision, tune, base = self.method
        words = [precision, {"full": "full tuning", "lora": "LoRA"}[tune]]
        return ", ".join(words + ([f"{base} base"] if base != STORED else []))


def methods_of(cells: Sequence[Figures]) -> list[Method]:
    """The methods from no technique to all: those that a report compares."""
    places = [place for stair in staircase(cells) for place in (stair.before, stair.after)]
    return list(dict.fromkeys(method_of(cells[place]) for place in places or [0]))


def sweep(methods: Iterable[Method], learning_rate: float, seed: int) -> list[Trial]:
    """Every method at each of its rates."""
    return [
        Trial(*method, float(f"{factor * middle:.3g}"), seed)
        for method in methods
        for middle in [learning_rate * (OF_LORA if method[1] == "lora" else 1)]
        for factor in SWEEP
    ]


def more_seeds(trials: Sequence[Figures], seeds: Iterable[int]) -> list[Trial]:
    """Every method at its best rate with further seeds."""
    return [
        Trial(*accuracy.method, accuracy.learning_rate, seed)
        for accuracy in accuracies(trials)
        for seed in seeds
    ]


def accuracies(trials: Sequence[Mapping[str, Any]]) -> list[Accuracy]:
    """Of each method that ended one training at least.

    The best rate is that of the least held-out loss with the first seed, which all rates have.
    """
    found = []
    for method in dict.fromkeys(map(method_of, trials)):
        of_it = [i for i, trial in enumerate(trials) if method_of(trial) == method]
        swept = [i for i in of_it if trials[i]["seed"] == trials[of_it[0]]["seed"]]
        ended = [i for i in swept if "eval_loss" in trials[i]]
        if ended:
            best = trials[min(ended, key=lambda i: trials[i]["eval_loss"])]["learning_rate"]
            rates = [trials[i]["learning_rate"] for i in swept]
            at_best = [i for i in of_it if trials[i]["learning_rate"] == best]
            places = [i for i in at_best if "eval_loss" in trials[i]]
            found.append(Accuracy(method, best, places, best in (min(rates), max(rates))))
    return found


def method_of(figures: Mapping[str, Any]) -> Method:
    """Of a trial, or of a cell."""
    return figures["precision"], figures["tune"], figures.get("base", STORED)


def mean_and_range(trials: Sequence[Mapping[str, Any]], accuracy: Accuracy) -> tuple[float, float]:
    """Of the held-out loss over the seeds."""
    losses = [trials[place]["eval_loss"] for place in accuracy.places]
    return statistics.mean(losses), max(losses) - min(losses)


def train_trial(
    trial: Trial, *, cells: Sequence[Figures], shared: Training, children: Children
) -> Figures:
    """One training, cut and recomputed as was fastest among the cells; held-out loss at its end."""
    method = (trial.precision, trial.tune, trial.base)
    ended = [
        cell
        for cell in cells
        if method_of(cell) == method and "step_seconds" in cell and not cell["reference"]
    ]
    if not ended:
        return {"failed": "none of its cells ended"}
    fastest = min(ended, key=lambda cell: cell["step_seconds"])
    cell = Cell(**{field.name: fastest[field.name] for field in fields(Cell)})
    shared = replace(shared, learning_rate=trial.learning_rate, seed=trial.seed)
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        done = children.run("train.lora", train_flags(cell, shared, run))
        if failed := out_of_memory(done):
            return {"failed": failed}
        if done.code and any(word in done.errors for word in DIVERGED):
            return {"failed": "diverged"}
        check(done, cell)
        lines = RunFolder(run).read_metrics().values
    steps = steps_of(lines, shared)
    (*_, eval_loss) = (line["eval_loss"] for line in lines if "eval_loss" in line)
    return {
        "eval_loss": eval_loss,
        "steps": len(steps),
        "tokens": sum(line["tokens"] for line in steps),
    }
