"""`python -m train.plan.check`: predicted against measured step times, on the device that is here.

    python -m train.plan.check --output docs/results/predicted-cpu.json

Steps of several sizes, lengths and remats are compiled and timed. Two figures of the device are
fitted, the operations and the bytes that it sustains in a second; what then still differs between
the ratios of predicted to measured time is what the roofline does not know.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from jllama.cli.command import run_command
from jllama.cli.terminal import Progress, console, show_table
from jllama.config import LlamaConfig, LoraConfig, Precision
from jllama.errors import AtLeast1, checked
from jllama.folders.json_files import write_json
from jllama.folders.load import random_model
from jllama.lora import attach
from jllama.machine import measured_here
from jllama.sharding import ONE_DEVICE, make_mesh
from train.plan.arithmetic import Step
from train.plan.compiled import loss_chunks
from train.plan.hlo import read_program
from train.plan.roofline import Kernel, Rates, Roofline
from train.speed import StepSpeed, ready

SIZES = {
    "5m": LlamaConfig(256, 4, 4, 4, 688, 4096),
    "17m": LlamaConfig(512, 4, 8, 4, 1376, 4096),
    "60m": LlamaConfig(512, 12, 8, 8, 1376, 16384),
    "110m": LlamaConfig(768, 12, 12, 12, 2048, 32000),
}
# Size, remat, sequences, their length.
STEPS: tuple[tuple[str, Any, int, int], ...] = (
    ("5m", "none", 1, 128), ("5m", "none", 8, 128), ("5m", "block", 2, 512),
    ("17m", "none", 4, 256), ("17m", "dots", 4, 256), ("17m", "block", 1, 1024),
    ("60m", "none", 1, 128), ("60m", "block", 4, 256), ("60m", "ffn", 2, 512),
    ("110m", "block", 1, 256),
)  # fmt: skip


@checked
class Check:
    """Compare predicted with measured training steps, on this machine's device."""

    precision: Precision = "fp32"
    """Dtype of weights and activations."""
    settings: AtLeast1 = len(STEPS)
    """How many of the settings, from the first."""
    steps: AtLeast1 = 7
    """Timed steps of each; the median counts."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """JSON file for the figures."""


class Timed(NamedTuple):
    """A step that ran: its median time, and the kernels that its compiled text names."""

    seconds: float
    kernels: list[Kernel]


def check(config: Check) -> None:
    """Compiles, runs, fits and shows."""
    chosen = STEPS[: config.settings]
    timed = {}
    with Progress("measuring", len(chosen), "settings") as progress:
        for name, remat, batch, length in chosen:
            step = Step(SIZES[name], LoraConfig(), config.precision, remat, batch, length, 1)
            timed[f"{name}, {batch} x {length}, {remat} remat"] = run(step, config.steps)
            progress.advance()
    rates = fitted(list(timed.values()))
    rows = {name: (predicted(some, rates), some.seconds) for name, some in timed.items()}
    ratios = {name: guess / seconds for name, (guess, seconds) in rows.items()}
    show_table(
        ("step", "predicted ms", "measured ms", "ratio"),
        [
            (name, f"{1e3 * guess:,.1f}", f"{1e3 * seconds:,.1f}", f"{ratios[name]:.2f}")
            for name, (guess, seconds) in rows.items()
        ],
        f"fitted: {rates.matmul / 1e9:,.1f} GFLOP/s, {rates.bandwidth / 1e9:,.1f} GB/s",
    )
    spread = max(ratios.values()) / min(ratios.values())
    console.print(f"the largest ratio is {spread:.2f} times the smallest")
    if config.output:
        figures = {
            "gflops": rates.matmul / 1e9,
            "bandwidth_gb_per_second": rates.bandwidth / 1e9,
            "spread": spread,
            "predicted_seconds": {name: guess for name, (guess, _) in rows.items()},
            "measured_seconds": {name: seconds for name, (_, seconds) in rows.items()},
            "ratios": ratios,
        }
        here = measured_here("plan-check")
        write_json(Path(config.output), {**here, "settings": asdict(config), "figures": figures})
        console.print(f"wrote {config.output}")


def run(step: Step, count: int) -> Timed:
    """Trains a random model for some steps, after one that compiles and one that warms up."""
    model = random_model(step.model, step.precision, remat=step.remat)
    assert step.lora is not None
    attach(model, step.lora, jax.random.key(0))
    shape = StepSpeed(
        micro_batch_size=step.micro_batch_size, max_seq_len=step.max_seq_len,
        gradient_accumulation_steps=step.accumulation,
    )  # fmt: skip
    programs, state, frozen, window = ready(shape, model, make_mesh(jax.devices(), ONE_DEVICE))
    key = jax.random.key(0)
    seconds = []
    for _ in range(2 + count):
        started = time.perf_counter()
        state, metrics = programs(state, frozen, window, key)
        float(metrics.loss_sum)  # waits
        seconds.append(time.perf_counter() - started)
    kernels = Roofline(read_program(programs.text(window)), loss_chunks(step)).kernels()
    return Timed(statistics.median(seconds[2:]), list(kernels))


def predicted(timed: Timed, rates: Rates) -> float:
    """Seconds of a step by its kernels' roofline, launches left out."""
    return sum(kernel.times * kernel.seconds(rates) for kernel in timed.kernels)


def fitted(timed: Sequence[Timed]) -> Rates:
    """The rates that bring the ratios of predicted to measured time closest to each other, and 1.

    How many operations go with a byte is searched for; what both are worth follows.
    """

    def with_balance(balance: float, scale: float = 1.0) -> Rates:
        """Operations per byte, and bytes per second."""
        rate = balance * scale
        return Rates(matmul=rate, vector=rate / 2, bandwidth=scale, attention=rate, launch=0.0)

    def ratios(balance: float) -> list[float]:
        rates = with_balance(balance)
        return [predicted(some, rates) / some.seconds for some in timed]

    def spread(balance: float) -> float:
        of_each = ratios(balance)
        return max(of_each) / min(of_each)

    best = min(np.geomspace(0.1, 1000, 200).tolist(), key=spread)
    return with_balance(best, math.exp(statistics.fmean(map(math.log, ratios(best)))))


def main(argv: Sequence[str] | None = None) -> None:
    run_command(check, Check, argv, name="plan-check")


if __name__ == "__main__":
    main()
