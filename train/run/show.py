"""What a run says on the terminal, before and after."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax

from jllama.cli.terminal import command_line, console, show_table
from jllama.config import LlamaConfig, LoraConfig, Precision
from jllama.folders.load import abstract_model
from jllama.folders.run import CONFIG, METRICS, RECORD, RunFolder
from jllama.sharding import mesh_shape
from jllama.text.rows import Examples
from train.config import TrainConfig, plain
from train.optimizer import count, split_learned
from train.plan.arithmetic import Step, memory_classes
from train.plan.auto import this_device
from train.run.metrics import Result
from train.stream import Stream


def show_settings(config: TrainConfig, llama: LlamaConfig, lora: LoraConfig | None) -> None:
    """Every setting, and how many parameters learn."""
    settings = plain(config).items()
    show_table(["", ""], [[name, str(x)] for name, x in settings if x != ""], "settings")

    for ffn_bias in sorted({config.ffn_bias, False}, reverse=True):
        sizes = dataclasses.replace(llama, ffn_bias=ffn_bias)
        counts = parameter_counts(sizes, lora, config.precision)
        note = " without the feed-forward biases" if config.ffn_bias and not ffn_bias else ""
        console.print(
            f"parameters: {counts['trainable']:,} trainable of {counts['total']:,} "
            f"({100 * counts['trainable'] / counts['total']:.2f} %){note}",
        )


@functools.cache
def parameter_counts(
    llama: LlamaConfig, lora: LoraConfig | None, precision: Precision
) -> dict[str, int]:
    """{"trainable": 8388608, "total": 6746804224}; without adapters every weight is trainable."""
    _, learned, frozen = split_learned(
        abstract_model(llama, precision, lora=lora), "lora" if lora else "full"
    )
    counts = count({"learned": learned, "frozen": frozen})
    return {"trainable": counts["learned"], "total": sum(counts.values())}


def run_facts(
    step: Step,
    batches: Stream,
    examples: tuple[Examples, Examples],
    steps: int,
    warmup: int,
) -> dict[str, Any]:
    """What is known of a run before its first step; a report takes it from run.json.

    Args:
        examples: to train on, and held out.

        {"parameters": {"trainable": 8388608, "total": 6746804224},
         "model": {"dim": 4096, ...}, "steps": 125, "warmup_steps": 4,
         "device_memory_mib": 40960,
         "memory_bytes": {"base_weights": 13476831232, "adapters": 33554432, ...},
         "data": {"rows": 200, "held_out_rows": 0, "held_out": [], "tokens": 20000,
                  "learned_tokens": 12000, "longest": 251, "cut_rows": 3, "padding_share": 0.6,
                  "turns": 1}}
    """
    training, held_out = examples
    return {
        "parameters": parameter_counts(step.model, step.lora, step.precision),
        "model": dataclasses.asdict(step.model),
        "steps": steps,
        "warmup_steps": warmup,
        "device_memory_mib": this_device().memory_mib,
        "memory_bytes": memory_classes(step),
        "data": {
            **({"windows": batches.epoch_ends[0]} if not len(training) else {}),
            "rows": len(training),
            "held_out_rows": len(held_out),
            "held_out": held_out.rows.tolist(),
            "tokens": int(training.lengths.sum()),
            "learned_tokens": int(training.learned_counts.sum()),
            "longest": int(training.lengths.max(initial=0)),
            "cut_rows": int(training.cut.sum()),
            "padding_share": batches.padding_share(),
            "turns": int(training.turns.max(initial=1)),
        },
    }


def show_plan(
    config: TrainConfig,
    batches: Stream,
    training: Examples,
    held_out: Examples,
    steps: int,
) -> None:
    """The arithmetic of the run."""
    part = f"{steps} of " if steps < len(batches) else ""
    devices = mesh_shape(config.mesh).rows
    effective = devices * config.micro_batch_size * config.gradient_accumulation_steps
    dealt = f" x {devices} devices" if devices > 1 else ""
    lengths = " or ".join(map(str, batches.lengths))
    rows, padding = f"{len(training):,} rows", f", {100 * batches.padding_share():.0f} % padding"
    if not len(training):
        rows, padding = f"{batches.epoch_ends[0]:,} given windows", ""
    console.print(
        f"data: {rows} to train on, {len(held_out):,} held out; sequences of {lengths} tokens"
        f"{padding}\n"
        f"effective batch: {config.micro_batch_size} sequences x "
        f"{config.gradient_accumulation_steps} micro-batches{dealt} = {effective}; "
        f"{part}{len(batches)} optimizer steps in {config.epochs} epochs",
    )


def without_effect(
    config: TrainConfig, llama: LlamaConfig, held_out: int, steps: int
) -> Iterator[str]:
    """What was asked for and does nothing here.

    Args:
        held_out: rows.
        steps: of all epochs.
    """
    if not held_out:
        if config.val_size:
            yield f"--val-size {config.val_size} holds out no row of so few"
        for flag, value in (("eval-steps", config.eval_steps), ("patience", config.patience)):
            if value:
                yield f"--{flag} {value} does nothing without held-out rows; give --val-size"
    if config.max_steps > steps:
        yield f"--max-steps {config.max_steps} does nothing; {config.epochs} epochs end before it"
    if config.max_seq_len > llama.max_seq_len:
        yield (
            f"--max-seq-len {config.max_seq_len} is beyond the {llama.max_seq_len} tokens that the "
            "model was trained for; what it writes there is poor"
        )


def show_end(run: RunFolder, measured: Result) -> None:
    """The loss of every epoch, what was written, the next command, and what it all cost."""
    losses = enumerate(measured.epoch_losses, start=1)
    show_table(["epoch", "average loss"], [[str(epoch), f"{loss:.4f}"] for epoch, loss in losses])
    lowest = min(measured.eval_losses, default=0.0)
    best = f"best/ (held-out loss {lowest:.4f}), " if run.best.is_dir() else ""
    of = "on the device" if jax.default_backend() == "gpu" else "for the whole Python process"
    result = "adapter/ (PEFT)" if run.result("lora").is_dir() else "model/ (every weight)"
    console.print(
        f"wrote {run.path}/: {result}, {best}state/, {METRICS}, tensorboard/, {CONFIG}, {RECORD}\n"
        f"next: {command_line('prompts', '--run', run.path)}\n"
        f"{measured.seconds:,.0f} s; peak memory {measured.peak_memory_mib:,.0f} MiB {of} "
        f"(training step alone: {measured.planned_memory_mib:,.0f} MiB planned)",
    )
