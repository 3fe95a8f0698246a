"""`python -m train.lora`: fine-tunes a LLaMA with LoRA, into a run folder.

config.yaml     the resolved settings; `--config` reads them back
run.json        command, versions, hashes of base and data
metrics.jsonl   one line per optimizer step, evaluation and epoch
state/          adapters, moments, accumulator and step (Orbax)
adapter/        the result: a PEFT adapter
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from rich.text import Text

import jllama
from jllama.adapter import load_adapter, read_lora_config, save_adapter
from jllama.checkpoint import (
    abstract_model,
    load_model,
    manifest_sha256,
    read_config,
    write_json,
)
from jllama.cli import Progress, run_command
from jllama.config import PRESETS, LlamaConfig, LoraConfig
from jllama.errors import InputError
from jllama.lora import attach, split
from jllama.model import Llama
from jllama.tokenizer import Tokenizer, load_tokenizer
from train.config import LATEST, TrainConfig, read_defaults, write_config
from train.data import Batches, Example, hold_out, make_examples, read_rows
from train.metrics import Metrics
from train.optimizer import count, learning_rate_schedule, make_optimizer
from train.state import Checkpoints
from train.step import TrainState, eval_step, initial_state, train_step

console = Console()


def train(config: TrainConfig) -> None:
    """One run, from the model folder to the adapter folder."""
    if config.dry_run:
        dry_run(config)
        return
    config = with_sample(config)
    llama, lora = read_config(config.model), lora_config(config)
    tokenizer = load_tokenizer(config.model)
    show_settings(config, llama, lora)
    training, held_out = load_examples(config, tokenizer)
    batches, evaluation = plan_batches(config, training, held_out)
    steps = min(config.max_steps or len(batches.windows), len(batches.windows))
    show_plan(config, batches, training, held_out, steps)
    show_row(training[0], tokenizer)

    run = new_run_folder(config)
    write_config(dataclasses.replace(config, output_dir=str(run)), run / "config.yaml")
    write_json(run / "run.json", provenance(config))

    model = load_model(config.model, config.precision, remat=config.remat, ffn_bias=config.ffn_bias)
    if config.init_adapter:
        load_adapter(model, config.init_adapter)
    else:
        attach(model, lora, jax.random.key(config.seed))
    losses = fit(config, model, batches, evaluation, steps, run)
    check_moved(model)
    passport = {
        "prompt_style": config.prompt_style,
        "base_manifest_sha256": manifest_sha256(config.model),
    }
    save_adapter(run / "adapter", model, lora, config.model, passport)
    show_end(run, losses)


def fit(
    config: TrainConfig,
    model: Llama,
    batches: Batches,
    evaluation: Batches | None,
    steps: int,
    run: Path,
) -> list[float]:
    """The loop; leaves the trained adapters in `model` and returns each epoch's average loss."""
    graphdef, adapters, base = split(model)
    schedule = learning_rate_schedule(
        config.lr_scheduler, config.learning_rate, config.warmup_ratio, steps
    )
    optimizer = make_optimizer(
        {"adapters": adapters, "base": base},
        schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        accumulation=config.gradient_accumulation_steps,
    )
    state = initial_state(adapters, base, optimizer)
    key = jax.random.key(config.seed)
    metrics, checkpoints = Metrics(run), Checkpoints(run / "state")
    losses: list[float] = []

    def evaluate(step: int, state: TrainState) -> None:
        if evaluation is not None:
            loss, tokens = evaluation_loss(state.adapters, base, evaluation, graphdef)
            metrics.write({"step": step, "eval_loss": loss, "eval_tokens": tokens})
            console.print(f"step {step}: held-out loss {loss:.4f}")
            metrics.restart_clock()

    evaluate(0, state)
    metrics.restart_clock()
    with Progress("train", steps, "steps") as progress:
        for step, window in zip(range(1, steps + 1), batches.from_step(0), strict=False):
            state, measured = train_step(
                state, base, window, key, graphdef=graphdef, optimizer=optimizer
            )
            measured = jax.device_get(measured)
            line = metrics.step(
                step,
                float(measured.loss_sum),
                int(measured.tokens),
                grad_norm=float(measured.grad_norm),
                learning_rate=float(schedule(step - 1)),
                rows=batches.rows(step - 1),
            )
            if not np.isfinite(line["loss"]):
                raise InputError(
                    f"the loss of step {step} is {line['loss']}; lower --learning-rate or train "
                    f"with --precision fp32 (rows {line['rows'][:8]})"
                )
            progress.advance(f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s")
            ends_epoch = step in batches.epoch_ends or step == steps
            if ends_epoch:
                losses.append(metrics.end_epoch(step, len(losses) + 1))
                console.print(f"epoch {len(losses)}: average loss {losses[-1]:.4f}")
            if step % config.eval_steps == 0 if config.eval_steps else ends_epoch:
                evaluate(step, state)
            if ends_epoch or (config.save_steps and step % config.save_steps == 0):
                checkpoints.save(state)
                metrics.restart_clock()
    checkpoints.close()
    metrics.close()
    nnx.update(model, state.adapters)
    return losses


def evaluation_loss(adapters, base, evaluation: Batches, graphdef) -> tuple[float, int]:
    """Token-weighted cross-entropy (nats) of the held-out rows, and their supervised tokens."""
    total, tokens = 0.0, 0
    for window in evaluation.from_step(0):
        loss_sum, counted = eval_step(adapters, base, window, graphdef=graphdef)
        total, tokens = total + float(loss_sum), tokens + int(counted)
    return total / max(1, tokens), tokens


def check_moved(model: Llama) -> None:
    """An adapter whose B is still zero has learned nothing: the run has failed."""
    still = [
        name
        for name, linear in model.linears().items()
        if linear.lora is not None and not np.any(np.asarray(linear.lora.b[...]))
    ]
    if still:
        raise InputError(f"training moved nothing in {', '.join(still)}; raise --learning-rate")


def load_examples(config: TrainConfig, tokenizer: Tokenizer) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples of the data file."""
    examples = make_examples(
        read_rows(config.data),
        tokenizer,
        config.prompt_style,
        max_seq_len=config.max_seq_len,
        train_on_prompt=config.train_on_prompt,
        skip_bad_rows=config.skip_bad_rows,
        source=config.data,
    )
    if examples.truncated:
        console.print(
            f"{examples.truncated} rows are longer than {config.max_seq_len} tokens and lose "
            "their end; --max-seq-len keeps more"
        )
    for problem in examples.skipped:
        console.print(f"left out: {problem}")
    return hold_out(examples.rows, config.val_size, config.seed)


def plan_batches(
    config: TrainConfig, training: list[Example], held_out: list[Example]
) -> tuple[Batches, Batches | None]:
    """The windows of the whole run, and those of one evaluation."""
    shape: dict[str, Any] = {
        "batch": config.micro_batch_size,
        "max_seq_len": config.max_seq_len,
        "packing": config.packing,
        "seed": config.seed,
    }
    batches = Batches(
        training,
        accumulation=config.gradient_accumulation_steps,
        shuffle=config.shuffle,
        epochs=config.epochs,
        **shape,
    )
    if not held_out:
        return batches, None
    return batches, Batches(held_out, accumulation=1, shuffle=False, epochs=1, **shape)


def lora_config(config: TrainConfig) -> LoraConfig:
    """The adapter's settings: the initial adapter's own, else the flags'."""
    if not config.init_adapter:
        return config.lora
    return dataclasses.replace(read_lora_config(config.init_adapter), dropout=config.lora_dropout)


def with_sample(config: TrainConfig) -> TrainConfig:
    """Fills in the bundled sample's model and rows where the default asks for them."""
    default = TrainConfig.__dataclass_fields__["model"].default
    if config.model != default:
        if not config.data:
            raise InputError("--data FILE is missing: the rows to train on")
        return config
    if not Path(config.model).exists():
        console.print(f"{config.model} is not there yet: converting the bundled sample")
        subprocess.run([sys.executable, "-m", "convert.from_meta"], check=True)
    return dataclasses.replace(config, data=config.data or str(jllama.SAMPLE / "train.json"))


def new_run_folder(config: TrainConfig) -> Path:
    """Makes the run folder; a default one also gets the link `runs/latest`."""
    if config.output_dir:
        run = Path(config.output_dir)
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise InputError(f"{run} exists; choose another --output-dir or remove it")
        run.mkdir(parents=True, exist_ok=True)
    else:
        name = f"{Path(config.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = LATEST.parent / name
        run.mkdir(parents=True)
        link = LATEST.with_name(f".latest-{os.getpid()}")
        link.symlink_to(name)
        link.replace(LATEST)
    return run


def provenance(config: TrainConfig) -> dict:
    """Where a run comes from: what a second person needs to repeat it."""
    packages = ("jllama", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {dist: _version(dist) for dist in packages}
    return {
        "command": [sys.executable, *sys.argv],
        "versions": {"python": platform.python_version(), **found},
        "device": jax.devices()[0].device_kind,
        "base_manifest_sha256": manifest_sha256(config.model),
        "data_sha256": hashlib.sha256(Path(config.data).read_bytes()).hexdigest(),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def dry_run(config: TrainConfig) -> None:
    """Settings and counts, from shapes alone."""
    llama = PRESETS.get(config.model) or read_config(config.model)
    show_settings(config, llama, lora_config(config))
    console.print("dry run: nothing was loaded, allocated or written")


def show_settings(config: TrainConfig, llama: LlamaConfig, lora: LoraConfig) -> None:
    """Every setting, and how many parameters learn."""
    table = Table(title="settings", show_header=False, title_justify="left")
    for name, value in dataclasses.asdict(config).items():
        if value != "":
            table.add_row(name, str(value))
    console.print(table)

    for ffn_bias in sorted({config.ffn_bias, False}, reverse=True):
        sizes = dataclasses.replace(llama, ffn_bias=ffn_bias)
        _, adapters, base = split(abstract_model(sizes, config.precision, lora=lora))
        counts = count({"adapters": adapters, "base": base})
        total = sum(counts.values())
        note = " without the feed-forward biases" if config.ffn_bias and not ffn_bias else ""
        console.print(
            f"parameters: {counts['lora']:,} trainable of {total:,} "
            f"({100 * counts['lora'] / total:.2f} %){note}",
            highlight=False,
        )


def show_plan(
    config: TrainConfig,
    batches: Batches,
    training: list[Example],
    held_out: list[Example],
    steps: int,
) -> None:
    """The arithmetic of the run."""
    effective = config.micro_batch_size * config.gradient_accumulation_steps
    console.print(
        f"data: {len(training):,} rows to train on, {len(held_out):,} held out; sequences of "
        f"{batches.length} tokens, {100 * batches.padding_share():.0f} % padding\n"
        f"effective batch: {config.micro_batch_size} sequences x "
        f"{config.gradient_accumulation_steps} micro-batches = {effective}; "
        f"{steps} optimizer steps in {config.epochs} epochs",
        highlight=False,
    )


def show_row(example: Example, tokenizer: Tokenizer) -> None:
    """The first row as the model sees it; what is learned stands in ⟦ ⟧."""
    text, inside = Text(), False
    for token, learned in zip(example.ids, example.learned, strict=True):
        if learned != inside:
            text.append("⟦" if learned else "⟧", "green")
            inside = learned
        text.append(tokenizer.piece(token), "green" if learned else "dim")
    if inside:
        text.append("⟧", "green")
    learned_count = sum(example.learned)
    console.print(
        f"row {example.row}: {len(example.ids)} tokens, {learned_count} learned ⟦in brackets⟧"
    )
    console.print(text)


def show_end(run: Path, losses: Sequence[float]) -> None:
    table = Table("epoch", "average loss")
    for epoch, loss in enumerate(losses, start=1):
        table.add_row(str(epoch), f"{loss:.4f}")
    console.print(table)
    console.print(
        f"wrote {run}/: adapter/ (PEFT), state/, metrics.jsonl, config.yaml, run.json\n"
        f"next: python -m eval.prompts --run {run}",
        highlight=False,
        soft_wrap=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_command(train, TrainConfig, argv, prog="python -m train.lora", default=read_defaults)


if __name__ == "__main__":
    main()
