"""`python -m train.lora`: fine-tunes a LLaMA with LoRA, into a run folder."""

import contextlib
import dataclasses
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jllama
from jllama.adapter import load_adapter, read_lora_config, save_adapter
from jllama.checkpoint import load_model, manifest_sha256, read_config
from jllama.cli import Progress, run_command
from jllama.config import PRESETS, LoraConfig
from jllama.errors import InputError
from jllama.lora import adapted_linears, attach, split
from jllama.model import Llama
from jllama.tokenizer import Tokenizer, load_tokenizer
from train.config import TrainConfig, read_defaults
from train.data import Batches, Example, hold_out, make_examples, read_rows
from train.metrics import Metrics
from train.optimizer import learning_rate_schedule, make_optimizer
from train.run import StopSignal, run_folder
from train.show import console, show_end, show_plan, show_row, show_settings
from train.state import Checkpoints
from train.step import TrainState, eval_step, initial_state, train_step

SKIPPED_IN_A_ROW = 5  # steps without a finite gradient after which a run gives up


def train(config: TrainConfig) -> None:
    """One run, from the model folder to the adapter folder."""
    if config.dry_run:
        show_settings(config, PRESETS.get(config.model) or read_config(config.model), config.lora)
        console.print("dry run: nothing was loaded, allocated or written")
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

    with run_folder(config) as run:
        model = load_model(
            config.model, config.precision, remat=config.remat, ffn_bias=config.ffn_bias
        )
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
        name=config.optimizer,
        b_rate_ratio=config.lora_plus_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        accumulation=config.gradient_accumulation_steps,
    )
    key = jax.random.key(config.seed)
    state = initial_state(adapters, base, optimizer)
    resources = contextlib.ExitStack()
    checkpoints = resources.enter_context(contextlib.closing(Checkpoints(run / "state")))
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state)
        console.print(f"resumed after step {int(state.step)}")
    start = int(state.step)
    metrics = resources.enter_context(contextlib.closing(Metrics(run, start)))

    def evaluate(step: int, state: TrainState) -> None:
        if evaluation is not None:
            loss, tokens = evaluation_loss(state.adapters, base, evaluation, graphdef)
            metrics.write({"step": step, "eval_loss": loss, "eval_tokens": tokens})
            console.print(f"step {step}: held-out loss {loss:.4f}")

    if start == 0:
        evaluate(0, state)
    skipped = 0
    windows = batches.from_step(start)
    with resources, StopSignal() as stop, Progress("train", steps, "steps", start) as progress:
        metrics.restart_clock()
        for step in range(start + 1, steps + 1):
            state, measured = train_step(
                state, base, next(windows), key, graphdef=graphdef, optimizer=optimizer
            )
            measured = jax.device_get(measured)
            line = metrics.step(
                step,
                float(measured.loss_sum),
                int(measured.tokens),
                grad_norm=None if measured.skipped else float(measured.grad_norm),
                learning_rate=float(schedule(step - 1)),
                skipped=bool(measured.skipped),
                rows=batches.rows(step - 1),
            )
            loss = "skipped" if measured.skipped else f"loss {line['loss']:.4f}"
            progress.advance(f"{loss}  {line['tokens_per_second']:,.0f} tokens/s")
            skipped = skipped + 1 if measured.skipped else 0
            if skipped == SKIPPED_IN_A_ROW:
                raise InputError(
                    f"no finite gradient in steps {step - skipped + 1} to {step} (rows "
                    f"{line['rows'][:8]}); the state before them is kept. Lower --learning-rate, "
                    "or train with --precision fp32"
                )
            ends_epoch = step in batches.epoch_ends or step == steps
            if ends_epoch:
                average = metrics.end_epoch(step)
                console.print(f"epoch {len(metrics.epoch_losses)}: average loss {average:.4f}")
            if ends_epoch if config.eval_steps == 0 else step % config.eval_steps == 0:
                evaluate(step, state)
            asked = config.save_steps > 0 and step % config.save_steps == 0
            if (ends_epoch or asked or stop.number) and not skipped:
                checkpoints.save(state)
            if stop.number:
                break
            metrics.restart_clock()
    if stop.number and step < steps:
        name = signal.Signals(stop.number).name
        console.print(f"{name}: stopped after step {step}; continue with --resume {run}")
        sys.exit(128 + stop.number)
    nnx.update(model, state.adapters)
    return metrics.epoch_losses


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
        for name, linear in adapted_linears(model).items()
        if not np.any(np.asarray(linear.lora.b[...]))
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


def main(argv: Sequence[str] | None = None) -> None:
    run_command(train, TrainConfig, argv, prog="python -m train.lora", default=read_defaults)


if __name__ == "__main__":
    main()
