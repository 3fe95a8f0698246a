"""The loop: feeds windows to the step, and decides when to evaluate, save and stop."""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jllama.cli.terminal import command_line, console
from jllama.errors import InputError
from jllama.folders.run import RunFolder
from jllama.lora import adapted_linears
from jllama.model import Llama
from jllama.sharding import whole
from train.callbacks import Callback, Callbacks, own_callbacks
from train.config import TrainConfig
from train.optimizer import learning_rate_schedule, make_optimizer, split_learned
from train.processes.join import Processes
from train.run.metrics import Metrics, Result, read_history
from train.run.reports import Reports
from train.run.signals import Stopped, StopSignal
from train.run.state import Checkpoints
from train.step import Loss, Programs, TrainState, Window, deal, evaluate, initial_state
from train.stream import Stream

FAILED = 1000  # what a process gives where one gives a signal: a callback has raised an error


class Due(NamedTuple):
    """What happens after a step."""

    epoch_end: bool
    evaluation: bool
    save: bool


def due(config: TrainConfig, step: int, batches: Stream, steps: int) -> Due:
    """After an epoch and the last step all of it, else as the settings say."""
    ends = step in batches.epoch_ends or step == steps
    asked = step % config.eval_steps == 0 if config.eval_steps else ends
    saves = config.save_steps > 0 and step % config.save_steps == 0
    return Due(ends, asked or step == steps, ends or saves)


def fit(
    config: TrainConfig,
    model: Llama,
    batches: Stream,
    held_out: Stream | None,
    steps: int,
    warmup: int,
    run: RunFolder,
    save_best: Callable[[], None],
    mesh: Mesh,
    processes: Processes,
    callbacks: Sequence[Callback] = (),
    loss: Loss | None = None,
) -> Result:
    """Trains from the newest saved state on, and leaves what was learned in `model`.

    Args:
        steps: optimizer steps of the whole run.
        warmup: of them, those in which the learning rate rises.
        mesh: the devices that the model lies on.
        processes: that train this run.
        save_best: called when `model` holds what gave the lowest held-out loss so far.
        callbacks: the caller's, beside the run's own.
        loss: the caller's, instead of the cross-entropy of the targets; of held-out rows, too.

    Raises:
        Stopped: if a signal ended the run; what a callback raises, when the state is saved.
        InputError: if steps in a row have no finite gradient, no state has a finite loss, or
            training moved nothing.
    """
    graphdef, learned, frozen = split_learned(model, config.tune)
    schedule = learning_rate_schedule(config.lr_scheduler, config.learning_rate, warmup, steps)
    optimizer = make_optimizer(
        {"learned": learned, "frozen": frozen},
        schedule,
        name=config.optimizer,
        b_rate_ratio=config.lora_plus_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        accumulation=config.gradient_accumulation_steps,
    )
    every = jax.jit(jax.vmap(lambda step: jnp.asarray(schedule(step))))
    rates = np.asarray(every(np.arange(steps)))
    programs = Programs(graphdef, optimizer, mesh, loss)
    key = jax.jit(jax.random.key, out_shardings=whole(mesh))(config.seed)
    state = initial_state(learned, frozen, optimizer, mesh)
    del learned
    nnx.update(model, state.learned)  # or the bf16 originals of fp32 masters would stay allocated

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = Checkpoints(run.state, config.save_total_limit)
        stack.callback(checkpoints.close)
        if saved := checkpoints.restore(state):
            state = saved
            console.print(f"resumed after step {int(state.step)}")
        start = step = int(state.step)
        stopped = 0  # by which signal
        processes.agree(lambda: {"resumed after step": start})
        evaluated = [s for s in range(1, start + 1) if due(config, s, batches, steps).evaluation]
        evaluated = [0, *evaluated] if start and held_out is not None else []
        kept = read_history(run, start, evaluated)
        told = Callbacks(own_callbacks(config, run, steps, start, kept), callbacks)
        stack.enter_context(told)
        metrics = Metrics(told, kept, processes.peak_memory_mib)
        stop = stack.enter_context(StopSignal())
        reports = Reports(metrics, batches, rates, programs)

        def dealt(window: Window, doing: str, compiled: bool) -> Window:
            processes.mark(doing, step=compiled)
            return deal(window, mesh)

        def evaluate_now() -> None:
            if held_out is not None:
                doing = f"the evaluation after step {step}", len(metrics.eval_losses) > 0
                rows = (dealt(window, *doing) for window in held_out.from_step(0))
                measured = evaluate(state.learned, frozen, rows, graphdef, loss)
                if metrics.evaluation(step, *measured):
                    nnx.update(model, state.learned)
                    save_best()

        def stopping() -> int:
            return processes.common(FAILED if told.error else stop.number, mesh)

        def is_over() -> bool:
            return step == steps or 0 < config.patience <= metrics.evaluations_since_best

        if start == 0:
            evaluate_now()
        metrics.restart_clock()
        windows = () if is_over() or told.error else batches.from_step(start, steps)
        for step, window in enumerate(windows, start=start + 1):
            rows = dealt(window, f"step {step}", programs.has(window))
            state, measured = programs(state, frozen, rows, key)
            reports.add(step, measured)
            stopped = stopping()
            after = due(config, step, batches, steps)
            if not (any(after) or stopped):
                continue
            reports.catch_up()
            if after.epoch_end:
                metrics.end_epoch(step)
            if after.evaluation:
                evaluate_now()
            stopped = stopped or stopping()
            ends = stopped or is_over()
            if (after.save or ends) and metrics.skipped_in_a_row == 0:
                processes.mark(f"the save after step {step}")
                if processes.number == 0:
                    on_disk(run.metrics)  # what is saved next counts on its lines
                checkpoints.save(state)
                told.on_save(step, run.state / str(step))
            if ends or told.error:
                break
            metrics.restart_clock()
        if is_over() and metrics.skipped_in_a_row and not told.error:
            # Its loss was finite. If it still is, the rows after it are to blame, not the weights.
            window = deal(batches.window(max(0, step - metrics.skipped_in_a_row - 1)), mesh)
            states = itertools.chain([state], checkpoints.newest_first(state))
            state = first_finite(states, lambda s: programs(s, frozen, window, key)[1].loss_sum)
            learned_until = min(int(state.step), step - metrics.skipped_in_a_row)
            console.print(
                f"the last {metrics.skipped_in_a_row} steps had no finite gradient and changed "
                f"nothing; the result is what was learned up to step {learned_until}"
            )
    more = command_line("train", "--resume", run.path)
    if told.error:
        if step:
            console.print(f"a callback failed after step {step}; continue with: {more}")
        raise told.error
    if stopped and not is_over():
        words = f"stopped after step {step}; continue with: {more}"
        console.print(f"{signal.Signals(stopped).name}: {words}")
        processes.finish()
        raise Stopped(words, stopped)
    if step < steps:
        console.print(f"stopped after step {step}: no better for {config.patience} evaluations")
    nnx.update(model, state.learned)
    check_moved(model)
    return metrics.result()


def on_disk(file: Path) -> None:
    """Has all that was written to a file on the disk."""
    with file.open("rb") as written:
        os.fsync(written.fileno())


def first_finite(
    states: Iterable[TrainState], loss: Callable[[TrainState], jax.Array]
) -> TrainState:
    """The first state with a finite loss.

    Args:
        loss: takes, and may donate, a copy of a state.

    Raises:
        InputError: if there is none.
    """
    for state in states:
        if np.isfinite(loss(jax.tree.map(jnp.copy, state))):
            return state
    raise InputError(
        "training diverged: no saved state has a finite loss, and none is written as a result. "
        "Lower --learning-rate, or train with --precision fp32"
    )


def check_moved(model: Llama) -> None:
    """An adapter whose B is still zero has learned nothing: the run has failed."""
    still = [
        name
        for name, linear in adapted_linears(model).items()
        if not np.any(np.asarray(linear.lora.b[...]))
    ]
    if still:
        raise InputError(f"training moved nothing in {', '.join(still)}; raise --learning-rate")
