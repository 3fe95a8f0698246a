"""`python -m eval.ablate`: what each of four techniques saves and costs, in every combination.

    python -m eval.ablate                                            # trained here
    python -m eval.ablate --gpu a100-40gb --model llama-2-7b         # planned for a GPU

The techniques are precision, gradient accumulation, remat, and LoRA. Every cell takes the same
sequences in an optimizer step, so that all learn the same: `--accumulation 1,8` is one micro-batch
of 8 and eight of 1. Memory then falls because the micro-batch does. What accumulating itself costs
is told by two more cells, references: one micro-batch of 1 alone, with LoRA and with full tuning.

Measured, a cell is a run of `train.lora` in a process of its own, repeated: its peak memory (of the
device; on a CPU of the process, with what compiling took), the planned memory of its compiled step,
the median time of its steps without the first, which compiles, and the loss of its last step. No
dropout, no packing, the same for all. On a CPU two cells run at a time, each on half of the cores.
Running out of memory is a result. How well a method learns so few steps cannot tell: accuracy.py
trains each longer, at its own best rate.

Planned, a cell is what `train.plan` says of it: memory by class, what is free on the card (below 0
it does not fit), operations per token and the bound on tokens per second. LoRA as in `train.plan`.

    runs/ablation/
      ablation.json   kind, date, command, device, versions, settings, hashes of base and data
      cells.jsonl     {"precision": "bf16", "accumulation": 8, "remat": "ffn", "tune": "lora",
                       "micro_batch_size": 1, "reference": false, "peak_memory_mib": ..., ...}
      accuracy.jsonl  {"precision": "bf16", "tune": "lora", "learning_rate": 0.01, "seed": 0,
                       "eval_loss": ..., ...}

A line is written when it ends; the same command goes on with those that are missing.
"""

import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

from eval.ablate.accuracy import methods_of, more_seeds, sweep, train_trial
from eval.ablate.cells import (
    STORED,
    Figures,
    Training,
    grid,
    halves,
    plan_cell,
    run_cells,
    train_cell,
)
from eval.ablate.store import CELLS, TRIALS, append, opened
from eval.ablate.table import show
from jllama import bundled
from jllama.cli import children
from jllama.cli.command import run_command
from jllama.cli.terminal import Progress, command_line, console
from jllama.config import PRESETS, BaseChoice, LoraConfig, Precision, Remat
from jllama.errors import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    InputError,
    NotNegative,
    Positive,
    Seed,
    SomeOf,
    checked,
)
from jllama.folders.manifest import file_sha256, manifest_sha256
from jllama.folders.model import read_config
from jllama.folders.run import LATEST
from jllama.machine import AnyCase, GpuName, measured_here
from jllama.text.row_file import read_rows

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PACKAGES = ("jllama", "jax", "jaxlib", "flax", "optax")
PLAN_PACKAGES = ("jax-cuda13-plugin", "nvidia-cudnn-cu13")
# The settings that make an ablation what it is; one with others needs another folder.
BOTH = ("model", "precision", "accumulation", "remat", "tune", "sequences", "max_seq_len")
ONLY_MEASURED = (
    "data", "steps", "repeats", "accuracy_steps", "seeds", "val_size", "learning_rate", "seed",
)  # fmt: skip

LIST = tyro.conf.arg(metavar="LIST")


@checked
class AblateConfig:
    """Measure what each technique saves and costs; with --gpu plan it for a card.

    Without arguments trains the bundled sample in all 24 combinations.
    """

    model: Annotated[str, tyro.conf.arg(metavar="DIR")] = bundled.MODEL
    """Model folder; with --gpu also a preset such as llama-2-7b."""
    data: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Rows to train on; by default the sample's, for the sample."""
    output: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Folder for the results; by default runs/ablation, with --gpu runs/ablation-planned."""
    gpu: Annotated[Literal[GpuName, ""], AnyCase] = ""
    """Plan for this card instead of training."""
    precision: Annotated[str, SomeOf(get_args(Precision)), LIST] = "fp32,bf16"
    """Precisions, by commas."""
    accumulation: Annotated[str, LIST] = "1,8"
    """Micro-batches into which a step's --sequences are cut."""
    remat: Annotated[str, SomeOf(get_args(Remat)), LIST] = "none,ffn,block"
    """What the backward pass recomputes: none, dots, offload, ffn, block."""
    tune: Annotated[str, SomeOf(("full", "lora")), LIST] = "full,lora"
    """What learns."""
    base: Annotated[str, SomeOf(get_args(BaseChoice)), LIST] = STORED
    """Formats of the frozen linears: stored, int8, int4, nf4; with LoRA only."""
    sequences: AtLeast1 = 8
    """Sequences in an optimizer step, the same in every combination."""
    max_seq_len: AtLeast0 = 0
    """Tokens of a sequence; 0 takes 64, with --gpu 512."""
    steps: AtLeast2 = 6
    """Optimizer steps of each combination; the first is not timed."""
    repeats: AtLeast1 = 2
    """Runs of each combination; the median counts, and a difference must pass their spread."""
    accuracy_steps: AtLeast0 = 60
    """Optimizer steps in which methods are compared by what they learn; 0 compares none."""
    seeds: AtLeast1 = 3
    """Trainings of each method at its best rate."""
    val_size: NotNegative = 32
    """Rows held out to compare methods, as in train.lora."""
    learning_rate: Positive = 1e-3
    """Rate of full tuning; LoRA's is ten times that. A third and three times it are tried, too."""
    seed: Seed = 0
    """Seed of adapters, order and held-out rows; the first of --seeds."""

    def __post_init__(self):
        wrong, counts = [], self.axes["accumulation"]
        if len(set(counts)) < len(counts) or not all(map(self._divides, counts)):
            wrong.append(
                f"--accumulation {self.accumulation}, expected whole numbers that divide "
                f"--sequences {self.sequences}, each once"
            )
        if self.gpu and self.data:
            wrong.append("--data with --gpu, which plans and reads no rows")
        if not self.gpu and not self.data and self.model != bundled.MODEL:
            wrong.append("--data FILE is missing: the rows to train on")
        if not self.val_size and self.accuracy_steps and not self.gpu:
            wrong.append("--val-size 0 leaves no rows to compare methods on; --accuracy-steps 0 "
                         "compares none")  # fmt: skip
        if wrong:
            raise InputError("; ".join(wrong))

    def _divides(self, count: str) -> bool:
        return count.isdecimal() and int(count) > 0 and self.sequences % int(count) == 0

    @property
    def axes(self) -> dict[str, list[str]]:
        """{"precision": ["fp32", "bf16"], ...}."""
        names = ("precision", "accumulation", "remat", "tune", "base")
        return {name: getattr(self, name).split(",") for name in names}

    @property
    def folder(self) -> Path:
        return Path(self.output or ("runs/ablation-planned" if self.gpu else "runs/ablation"))

    @property
    def length(self) -> int:
        return self.max_seq_len or (512 if self.gpu else 64)

    @property
    def rows(self) -> str:
        return self.data or str(bundled.ROWS)

    @property
    def settings(self) -> dict[str, Any]:
        """What an ablation's figures depend on."""
        names = [*BOTH, *(["gpu"] if self.gpu else ONLY_MEASURED)]
        names += ["base"] if self.base != STORED else []
        return {name: getattr(self, name) for name in names} | {"max_seq_len": self.length}


def ablate(config: AblateConfig) -> None:
    """Runs the cells and trials that are missing, and shows all with what follows from them."""
    cells = grid(config.axes, config.sequences)
    with tempfile.TemporaryDirectory() as place:
        model = str(bundled.model_folder(config.model, Path(place)))
        kind = "" if config.gpu else device()
        places = [None, None] if config.gpu else halves() if kind == "cpu" else [None]
        with opened(config.folder, describe(config, model, kind, len(places))) as known:
            found = complete(config, CELLS, cells, known, measure_of(config, model), places)
            trials: list[Figures] = []
            if config.accuracy_steps and not config.gpu:
                shared = replace(
                    training(config, model, config.accuracy_steps), val_size=config.val_size
                )
                measure = functools.partial(train_trial, cells=found, shared=shared)
                rates = sweep(methods_of(found), config.learning_rate, config.seed)
                trials = complete(config, TRIALS, rates, known, measure, places)
                seeds = range(config.seed + 1, config.seed + config.seeds)
                trials += complete(
                    config, TRIALS, more_seeds(trials, seeds), known, measure, places
                )
    show(found, trials)
    console.print(
        f"wrote {config.folder}/: ablation.json, {CELLS}{f', {TRIALS}' if trials else ''}\n"
        "next: " + command_line("report", "--run", LATEST, "--ablation", config.folder)
    )


def measure_of(config: AblateConfig, model: str) -> Callable[..., Figures]:
    """What gives the figures of a cell."""
    measure: Callable[..., Figures]
    if config.gpu:
        measure = functools.partial(
            plan_cell, model=model, gpu=config.gpu, max_seq_len=config.length
        )
    else:
        measure = functools.partial(
            train_cell, shared=training(config, model, config.steps), repeats=config.repeats
        )
    learned = learned_parameters(config.model, model)
    return lambda cell, children: (
        measure(cell, children=children) | {"trainable_parameters": learned[cell.tune]}
    )


def training(config: AblateConfig, model: str, steps: int) -> Training:
    """Trainings of so many steps, with no rows held out."""
    return Training(
        model, config.rows, config.length, epochs(config, steps), steps, 0,
        config.learning_rate, config.seed,
    )  # fmt: skip


def complete(
    config: AblateConfig,
    file: str,
    jobs: Sequence["DataclassInstance"],
    known: Mapping[str, list[Figures]],
    measure: Callable[..., Figures],
    places: Sequence[set[int] | None],
) -> list[Figures]:
    """The figures of all jobs; those that the folder lacks are run, and each is added to it."""
    lines = known[file]
    missing = [job for job in jobs if find(job, lines) is None]
    there = len(jobs) - len(missing)
    what = {CELLS: "cells", TRIALS: "trainings"}[file]

    def ended(figures: Figures) -> None:
        append(config.folder / file, figures)
        lines.append(figures)
        progress.advance(figures.get("failed", "")[:40])

    if there and missing:
        console.print(f"{config.folder} has {there} of {len(jobs)} {what}")
    try:
        if missing:
            with Progress("ablation", len(jobs), what, there) as progress:
                run_cells(missing, measure, places, ended)
    except KeyboardInterrupt:
        done = sum(find(job, lines) is not None for job in jobs)
        console.print(
            f"{done} of {len(jobs)} {what} are in {config.folder}; the same command goes on"
        )
        raise
    return [figures for job in jobs if (figures := find(job, lines))]


def epochs(config: AblateConfig, steps: int) -> int:
    """Passes over the rows that give twice the sequences needed, for some rows may be left out."""
    rows = len(read_rows(config.rows))
    kept = rows - (config.val_size if config.val_size >= 1 else round(rows * config.val_size))
    return math.ceil(2 * steps * config.sequences / max(1, kept))


def find(job: "DataclassInstance", known: Sequence[Figures]) -> Figures | None:
    """The figures of a cell or a trial, if they are there."""
    wanted = asdict(job).items()
    with_base = ({"base": STORED} | figures for figures in known)
    return next((figures for figures in with_base if wanted <= figures.items()), None)


def learned_parameters(name: str, folder: str) -> dict[str, int]:
    """How many parameters learn, by --tune; LoRA as train.lora and train.plan have it."""
    sizes = PRESETS.get(name) or read_config(folder)
    return {"full": sizes.parameter_count, "lora": LoraConfig().parameter_count(sizes)}


def describe(config: AblateConfig, model: str, kind: str, at_a_time: int) -> dict[str, Any]:
    """ablation.json: all that two cells must share to be compared."""
    here = measured_here("ablate", [*PACKAGES, *(PLAN_PACKAGES if config.gpu else ())])
    device = f"none: compiled for {config.gpu}" if config.gpu else f"{kind} in {here['device']}"
    found: dict[str, Any] = {
        "kind": "planned" if config.gpu else "measured",
        **here,
        "device": device,
        "settings": config.settings,
    }
    if not config.gpu:
        found["cells_at_a_time"] = at_a_time  # on a CPU each has its share of the cores
        found["inputs"] = {
            "base_manifest_sha256": manifest_sha256(Path(model)),
            "data_sha256": file_sha256(Path(config.rows)),
        }
    return found


def device() -> str:
    """What JAX runs on; asked of another process, for this one is to take no GPU."""
    return children.run("jllama.machine", []).strip()


def main(argv: Sequence[str] | None = None) -> None:
    run_command(ablate, AblateConfig, argv, name="ablate")
