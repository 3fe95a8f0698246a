"""`python -m eval.speed train`: how fast training is, each variant in a process of its own.

    python -m eval.speed train --compare packing --model DIR --data FILE

runs the same rows twice, padded and packed, and prints the ratio of supervised tokens per second;
the first steps, which compile, are left out.
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jllama import bundled
from jllama.cli import children
from jllama.cli.terminal import console, show_table
from jllama.config import Precision
from jllama.errors import AtLeast0, AtLeast1, InputError, checked
from jllama.folders.json_files import write_json
from jllama.folders.run import RunFolder
from jllama.machine import measured_here

# What is compared -> the variants, each a name and its flags; the first is the reference.
COMPARISONS: dict[str, dict[str, list[str]]] = {
    "packing": {"padded": ["--no-packing"], "packed": ["--packing"]},
    "remat": {name: ["--remat", name] for name in ("none", "dots", "ffn", "block")},
    "precision": {name: ["--precision", name] for name in ("fp32", "bf16")},
}


@checked
class TrainSpeed:
    """Measure training speed: supervised tokens per second, as ratios from one call."""

    compare: Literal["packing", "remat", "precision"] = "packing"
    """Which setting to vary."""
    model: Annotated[str, tyro.conf.arg(metavar="DIR")] = bundled.MODEL
    """Model folder."""
    data: Annotated[str, tyro.conf.arg(metavar="FILE")] = str(bundled.ROWS)
    """Rows to train on."""
    precision: Precision = "fp32"
    """Of weights and activations, unless compared."""
    max_seq_len: AtLeast1 = 256
    """Tokens of a sequence."""
    micro_batch_size: AtLeast1 = 4
    """Sequences in one forward pass; one micro-batch a step."""
    steps: AtLeast1 = 24
    """Optimizer steps of each variant."""
    warmup_steps: AtLeast0 = 4
    """First steps that are not counted."""
    skip_bad_rows: AtLeast0 = 1_000_000
    """Rows that may be left out."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """JSON file for the figures."""

    def __post_init__(self):
        if self.steps <= self.warmup_steps + 1:
            raise InputError(f"--steps {self.steps} leaves nothing after --warmup-steps")


def measure_training(config: TrainSpeed) -> None:
    """Runs every variant and shows, and if asked writes, the figures."""
    variants = COMPARISONS[config.compare]
    figures = {name: run_variant(config, flags) for name, flags in variants.items()}
    reference = next(iter(figures.values()))["supervised_tokens_per_second"]
    rows = []
    for name, figure in figures.items():
        figure["ratio"] = figure["supervised_tokens_per_second"] / reference
        rows.append([
            name,
            f"{figure['supervised_tokens_per_second']:,.0f}",
            f"{figure['ratio']:.2f}x",
            f"{1000 * figure['median_step_seconds']:,.0f} ms",
            f"{100 * figure['padding_share']:.0f} %",
        ])  # fmt: skip
    show_table([config.compare, "supervised tokens/s", "ratio", "median step", "padding"], rows)
    if config.output:
        write_json(
            Path(config.output),
            {
                **measured_here("speed"),
                "settings": asdict(config),
                "figures": figures,
            },
        )
        console.print(f"wrote {config.output}")


def run_variant(config: TrainSpeed, variant: Sequence[str]) -> dict:
    """Trains in a process of its own and reads its run folder."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        flags = [
            "--model", config.model, "--data", config.data,
            "--precision", config.precision, "--max-seq-len", str(config.max_seq_len),
            "--micro-batch-size", str(config.micro_batch_size),
            "--gradient-accumulation-steps", "1", "--remat", "none", "--epochs", str(config.steps),
            "--max-steps", str(config.steps), "--skip-bad-rows", str(config.skip_bad_rows),
            "--output-dir", str(folder), *variant,
        ]  # fmt: skip
        children.run("train.lora", flags)
        return step_figures(RunFolder(folder).read_metrics().values, config.warmup_steps)


def step_figures(lines: Sequence[dict], warmup_steps: int) -> dict:
    """The figures of a run's metrics.jsonl; times without the first steps, which compile."""
    steps = [x for x in lines if "step_seconds" in x and x["step"] > warmup_steps]
    # Every step does the same work, so the median step stands for all; the rows in it differ.
    seconds = statistics.median(x["step_seconds"] for x in steps)
    return {
        "supervised_tokens_per_second": statistics.mean(x["tokens"] for x in steps) / seconds,
        "median_step_seconds": seconds,
        "padding_share": statistics.mean(x["padding_share"] for x in steps),
        "peak_memory_mib": max(x["peak_memory_mib"] for x in steps),
    }
