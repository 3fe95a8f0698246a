"""The loop: feeds windows to the step, and decides when to evaluate, save and stop."""

import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jllama.cli import Progress
from jllama.errors import InputError
from jllama.lora import adapted_linears
from jllama.model import Llama
from train.config import TrainConfig
from train.data import Batches
from train.metrics import Metrics
from train.optimizer import learning_rate_schedule, make_optimizer, split_learned
from train.run import StopSignal
from train.show import console
from train.state import Checkpoints
from train.step import StepMetrics, compilations, eval_step, initial_state, train_step

SKIPPED_IN_A_ROW = 5  # steps without a finite gradient after which a run gives up


def fit(
    config: TrainConfig,
    model: Llama,
    batches: Batches,
    evaluation: Batches | None,
    steps: int,
    run: Path,
    save_best: Callable[[], None],
) -> Metrics:
    """Trains from the newest saved state on, and leaves what was learned in `model`.

    Args:
        steps: optimizer steps of the whole run.
        save_best: called when `model` holds what gave the lowest held-out loss so far.

    Raises:
        InputError: if steps in a row have no finite gradient, or training moved nothing.
    """
    graphdef, learned, frozen = split_learned(model, config.tune)
    schedule = learning_rate_schedule(
        config.lr_scheduler, config.learning_rate, config.warmup_ratio, steps
    )
    optimizer = make_optimizer(
        {"learned": learned, "frozen": frozen},
        schedule,
        name=config.optimizer,
        b_rate_ratio=config.lora_plus_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        accumulation=config.gradient_accumulation_steps,
    )
    key = jax.random.key(config.seed)
    state = initial_state(learned, frozen, optimizer)
    del learned
    nnx.update(model, state.learned)  # or the bf16 originals of fp32 masters would stay allocated
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(run / "state", config.save_total_limit))
        )
        saved = checkpoints.restore(state)
        if saved is not None:
            state = saved
            console.print(f"resumed after step {int(state.step)}")
        start = int(state.step)
        metrics = stack.enter_context(contextlib.closing(Metrics(run, start, config.wandb_project)))
        stop = stack.enter_context(StopSignal())
        progress = stack.enter_context(Progress("train", steps, "steps", start))

        def evaluate(step: int) -> None:
            if evaluation is None:
                return
            loss_sum, tokens = 0.0, 0
            for window in evaluation.from_step(0):
                more = eval_step(state.learned, frozen, window, graphdef=graphdef)
                loss_sum, tokens = loss_sum + float(more[0]), tokens + int(more[1])
            if metrics.evaluation(step, loss_sum / max(1, tokens), tokens):
                nnx.update(model, state.learned)
                save_best()

        def report(step: int, measured: StepMetrics) -> None:
            line = metrics.step(
                step,
                jax.device_get(measured),
                learning_rate=float(schedule(step - 1)),
                padding_share=batches.padding_share(step - 1),
                rows=batches.rows(step - 1),
                compilations=compilations(),
            )
            loss = "skipped" if line["skipped"] else f"loss {line['loss']:.4f}"
            progress.advance(f"{loss}  {line['tokens_per_second']:,.0f} tokens/s")
            if metrics.skipped_in_a_row == SKIPPED_IN_A_ROW:
                raise InputError(
                    f"no finite gradient in steps {step - SKIPPED_IN_A_ROW + 1} to {step} (rows "
                    f"{line['rows'][:8]}); the state before them is kept. Lower --learning-rate, "
                    "or train with --precision fp32"
                )

        if start == 0:
            evaluate(0)
        metrics.restart_clock()
        windows = batches.from_step(start)
        # A GPU's figures are fetched while the next step runs; a CPU runs a step before it returns.
        lags = jax.default_backend() != "cpu"
        waiting: tuple[int, StepMetrics] | None = None
        step = start
        for step in range(start + 1, steps + 1):
            state, measured = train_step(
                state, frozen, next(windows), key, graphdef=graphdef, optimizer=optimizer
            )
            ends_epoch = step in batches.epoch_ends or step == steps
            asked = step % config.eval_steps == 0 if config.eval_steps else ends_epoch
            evaluates = asked or step == steps
            saves = ends_epoch or (config.save_steps > 0 and step % config.save_steps == 0)
            pauses = evaluates or saves or stop.number
            if waiting is not None:
                report(*waiting)
            waiting = step, measured
            if pauses or not lags:
                report(*waiting)
                waiting = None
            if not pauses:
                continue
            if ends_epoch:
                metrics.end_epoch(step)
            if evaluates:
                evaluate(step)
            if (saves or stop.number) and metrics.skipped_in_a_row == 0:
                checkpoints.save(state)
            out_of_patience = 0 < config.patience <= metrics.evaluations_since_best
            if stop.number or out_of_patience:
                break
            metrics.restart_clock()
        if step < steps and not stop.number:
            console.print(f"stopped after step {step}: no better for {config.patience} evaluations")
    if stop.number and step < steps:
        name = signal.Signals(stop.number).name
        console.print(f"{name}: stopped after step {step}; continue with --resume {run}")
        sys.exit(128 + stop.number)
    nnx.update(model, state.learned)
    check_moved(model)
    return metrics


def check_moved(model: Llama) -> None:
    """An adapter whose B is still zero has learned nothing: the run has failed."""
    still = [
        name
        for name, linear in adapted_linears(model).items()
        if not np.any(np.asarray(linear.lora.b[...]))
    ]
    if still:
        raise InputError(f"training moved nothing in {', '.join(still)}; raise --learning-rate")
