"""`python -m eval.speed train`: how fast training is, each variant in a process of its own.

    python -m eval.speed train --compare packing --model DIR --data FILE

runs the same rows twice, padded and packed, and prints the ratio of supervised tokens per second;
the first steps, which compile, are left out.

    python -m eval.speed train --peer transformers-peft --random 60m

trains the same weights on the same random rows here and with `transformers` and `peft`, in turns,
and prints the ratio of tokens per second; docs/performance.md has what the two have in common.
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from eval.speed.generate import (
    RANDOM,
    RandomSize,
    check_cores,
    device,
    run_side,
    write_random,
)
from eval.speed.peft_training import Job
from jllama import bundled
from jllama.cli import children
from jllama.cli.terminal import console, show_table
from jllama.config import Precision
from jllama.errors import AtLeast0, AtLeast1, InputError, checked
from jllama.folders.json_files import read_json, write_json
from jllama.folders.model import read_config
from jllama.folders.run import RunFolder
from jllama.machine import measured_here

# What is compared -> the variants, each a name and its flags; the first is the reference.
COMPARISONS: dict[str, dict[str, list[str]]] = {
    "packing": {"padded": ["--no-packing"], "packed": ["--packing"]},
    "remat": {name: ["--remat", name] for name in ("none", "dots", "ffn", "block")},
    "precision": {name: ["--precision", name] for name in ("fp32", "bf16")},
}

# Figures of which the median over the turns is shown: title, factor, unit.
MEDIANS = {
    "tokens_per_second": ("training", 1, "tokens/s"),
    "step_seconds": ("step", 1000, "ms"),
    "cpu_seconds_per_step": ("CPU time of a step", 1000, "ms"),
    "peak_memory_mib": ("peak memory", 1, "MiB"),
}


@checked
class TrainSpeed:
    """Measure training speed: supervised tokens per second, as ratios from one call."""

    compare: Literal["packing", "remat", "precision"] | None = None
    """Which setting to vary; packing, unless there is a peer."""
    peer: Literal["transformers-peft"] | None = None
    """Instead, train the same weights there, on random rows without padding."""
    model: Annotated[str, tyro.conf.arg(metavar="DIR")] = bundled.MODEL
    """Model folder."""
    random: RandomSize | None = None
    """Beside a peer: a random model of this size, made for the occasion."""
    data: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Rows to train on; by default the bundled sample's."""
    precision: Precision = "fp32"
    """Dtype of weights and activations, unless compared."""
    max_seq_len: AtLeast1 = 256
    """Tokens of a sequence."""
    micro_batch_size: AtLeast1 = 4
    """Sequences in one forward pass; one micro-batch a step."""
    threads: AtLeast1 = 2
    """Beside a peer: cores of each side, unless there is a GPU."""
    repeats: AtLeast1 = 3
    """Beside a peer: turns of each side; the medians count."""
    steps: AtLeast1 = 24
    """Optimizer steps of each variant or turn."""
    warmup_steps: AtLeast0 = 4
    """First steps that are not counted."""
    skip_bad_rows: AtLeast0 = 1_000_000
    """Rows that may be left out."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """JSON file for the figures."""

    def __post_init__(self):
        if self.steps <= self.warmup_steps + 1:
            raise InputError(f"--steps {self.steps} leaves nothing after --warmup-steps")
        if self.peer and (self.compare or self.data):
            raise InputError("--peer trains on random rows; drop --compare and --data")
        if self.random and not self.peer:
            raise InputError("--random is for a comparison with a --peer")


def measure_training(config: TrainSpeed) -> None:
    """Runs every variant and shows, and if asked writes, the figures."""
    figures = compare_with_peer(config) if config.peer else compare_settings(config)
    if config.output:
        settings = asdict(config)
        write_json(Path(config.output), {**measured_here("speed"), "settings": settings, **figures})
        console.print(f"wrote {config.output}")


def compare_settings(config: TrainSpeed) -> dict[str, Any]:
    """The figures of every variant."""
    variants = COMPARISONS[config.compare or "packing"]
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
    show_table(
        [config.compare or "packing", "supervised tokens/s", "ratio", "median step", "padding"],
        rows,
    )
    return {"figures": figures}


def run_variant(config: TrainSpeed, variant: Sequence[str]) -> dict:
    """Trains in a process of its own and reads its run folder."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        flags = [
            "--model", config.model, "--data", config.data or str(bundled.ROWS),
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


def compare_with_peer(config: TrainSpeed) -> dict[str, Any]:
    """The figures of both sides, medians over their turns, and ours over theirs."""
    check_cores(config.threads)
    on = device()
    turns: dict[str, list[dict[str, Any]]] = {"jllama": [], "transformers-peft": []}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if config.random:
            folder = write_random(place / config.random, RANDOM[config.random])
        else:
            folder = bundled.model_folder(config.model, place)
        if config.max_seq_len > (context := read_config(folder).max_seq_len):
            raise InputError(f"--max-seq-len {config.max_seq_len}, but the context is {context}")
        children.run("convert.to_hf", [folder, place / "hf"])
        job = Job(
            model=str(place / "hf"),
            precision=config.precision,
            checkpointing=False,
            micro_batch_size=config.micro_batch_size,
            max_seq_len=config.max_seq_len,
            lora_targets=("wq", "wv"),
            steps=config.steps - config.warmup_steps,
            warmup_steps=config.warmup_steps,
            threads=config.threads if on == "cpu" else 0,
            device=on,
            output=str(place / "figures.json"),
        )
        for _ in range(config.repeats):
            children.run("train.speed", step_flags(job, str(folder)))
            turns["jllama"].append(read_json(Path(job.output))["figures"])
            peer = run_side("eval.speed.peft_training", job, place)
            turns["transformers-peft"].append(peer)
    figures = {side: medians(found) for side, found in turns.items()}
    ours, theirs = figures.values()
    ratio = {name: ours[name] / theirs[name] for name in MEDIANS}
    show_table(
        ["", *figures, "ratio"],
        [
            [title, *(f"{scale * x[name]:,.1f} {unit}" for x in (ours, theirs)),
             f"{ratio[name]:.2f}x"]
            for name, (title, scale, unit) in MEDIANS.items()
        ],
    )  # fmt: skip
    first, its_first = ours["first_loss"], theirs["first_loss"]
    console.print(f"loss of the first step: jllama {first:.5f}, peer {its_first:.5f}")
    return {"figures": figures, "ratio": ratio, "turns": turns}


def medians(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several turns of one side; the first loss is the same in all of them."""
    found = {name: statistics.median(turn[name] for turn in turns) for name in MEDIANS}
    return {**found, "first_loss": turns[0]["losses"][0], "platform": turns[0]["platform"]}


def step_flags(job: Job, model: str) -> list[object]:
    """The peer's job as flags of `train.speed`, without remat."""
    return [
        "--model", model, "--precision", job.precision, "--remat", "none",
        "--micro-batch-size", job.micro_batch_size, "--max-seq-len", job.max_seq_len,
        "--lora-rank", job.lora_rank, "--lora-targets", ",".join(job.lora_targets),
        "--lora-dropout", job.lora_dropout, "--learning-rate", job.learning_rate,
        "--steps", job.steps, "--warmup-steps", job.warmup_steps, "--threads", job.threads,
        "--output", job.output,
    ]  # fmt: skip
