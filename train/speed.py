"""`python -m train.speed`: how fast the training step is, on weights that need not exist.

    python -m train.speed --model llama-2-7b --micro-batch-size 4 --max-seq-len 4096 --remat none

A preset's name is a model of random weights, made on the device; a folder is loaded. The step is
the one that `train.lora` runs, fed as there: the metrics of a step are fetched while the next runs.
Every row is full and all of it is learned; with `--packing` a row holds documents of 300 tokens.
"""

import hashlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh

from jllama.cli.command import run_command
from jllama.cli.terminal import console, show_table
from jllama.config import PRESETS, LoraConfig, MeshChoice, Precision, Remat
from jllama.errors import AtLeast0, AtLeast1, InputError, Positive, Share, SomeOf, checked
from jllama.folders.json_files import write_json
from jllama.folders.load import load_model, random_model
from jllama.folders.model import model_sizes
from jllama.lora import attach
from jllama.machine import measured_here, peak_memory_mib, use_cores
from jllama.model import Llama
from jllama.names import LINEAR_CHOICES
from jllama.sharding import make_mesh, mesh_shape, whole
from train.data.documents import evenly, lay_out, stacked
from train.optimizer import learning_rate_schedule, make_optimizer, split_learned
from train.profile import profile
from train.step import Programs, StepMetrics, TrainState, Window, deal, initial_state

DOCUMENT = 300  # tokens of each in a packed row


@checked
class StepSpeed:
    """Measure the training step: tokens per second, memory, time to the first step."""

    model: str = "sample"
    """Model folder, or a preset such as llama-2-7b, whose weights are then random."""
    precision: Precision = "bf16"
    """Dtype of frozen weights and activations."""
    remat: Remat = "none"
    """What the backward pass recomputes, as in train.lora."""
    micro_batch_size: AtLeast1 = 4
    """Sequences in one forward pass."""
    max_seq_len: AtLeast1 = 512
    """Tokens of a sequence."""
    gradient_accumulation_steps: AtLeast1 = 1
    """Micro-batches in one optimizer step."""
    packing: bool = False
    """Rows of documents that do not see each other."""
    lora_rank: AtLeast1 = 16
    """Rank R of the adapters."""
    lora_targets: Annotated[str, SomeOf(LINEAR_CHOICES)] = "wq,wv"
    """Linears that get an adapter: wq,wk,wv,wo,w1,w2,w3 (or q_proj, ...), or all."""
    lora_dropout: Share = 0.05
    """Dropout of the adapter's input."""
    learning_rate: Positive = 2e-4
    """Learning rate of every step."""
    steps: AtLeast1 = 10
    """Optimizer steps that count."""
    warmup_steps: AtLeast1 = 2
    """First steps, the first of which compiles; they do not count."""
    profile: bool = False
    """Also the time of a step by class of kernel, from two more steps."""
    mesh: MeshChoice = ""
    """Devices along each axis, as in train.lora; by default one."""
    threads: AtLeast0 = 0
    """Cores to run on; 0 takes all."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """JSON file for the figures."""


def measure(config: StepSpeed) -> None:
    """Trains for some steps and shows, and if asked writes, the figures."""
    if config.threads:
        use_cores(config.threads)
    started = time.perf_counter()
    mesh = make_mesh(jax.devices(), mesh_shape(config.mesh))
    model = made_or_loaded(config, mesh)
    targets = tuple(config.lora_targets.split(","))
    lora = LoraConfig(config.lora_rank, dropout=config.lora_dropout, targets=targets)
    attach(model, lora, jax.random.key(0))
    jax.block_until_ready(jax.tree.leaves(split_learned(model, "lora")[1:]))
    figures = {"seconds_to_load": time.perf_counter() - started, **train(config, model, mesh)}
    show(figures)
    if config.output:
        content = {**measured_here("speed-step"), "settings": asdict(config), "figures": figures}
        write_json(Path(config.output), content)
        console.print(f"wrote {config.output}")


def made_or_loaded(config: StepSpeed, mesh: Mesh) -> Llama:
    """The model without adapters.

    Raises:
        InputError: if it is no folder and no preset, or if its context is too short.
    """
    context = model_sizes(config.model).max_seq_len
    if config.max_seq_len > context:
        raise InputError(
            f"--max-seq-len {config.max_seq_len}, but the context of {config.model} is {context}"
        )
    if config.model in PRESETS:
        sizes = PRESETS[config.model]
        return random_model(sizes, config.precision, remat=config.remat, mesh=mesh)
    return load_model(config.model, config.precision, remat=config.remat, mesh=mesh)


def train(config: StepSpeed, model: Llama, mesh: Mesh) -> dict[str, Any]:
    """The figures: medians over the steps that count."""
    programs, state, frozen, window = ready(config, model, mesh)
    key = jax.jit(jax.random.key, out_shardings=whole(mesh))(0)

    def step() -> StepMetrics:
        nonlocal state
        state, metrics = programs(state, frozen, window, key)
        return metrics

    losses: list[float] = []

    def fetch(metrics: StepMetrics) -> float:
        """Waits for a step; the time of its end."""
        losses.append(float(metrics.loss_sum) / int(metrics.tokens))
        return time.perf_counter()

    end = fetch(step())
    first_step_at = time.time()
    for _ in range(config.warmup_steps - 1):
        end = fetch(step())
    seconds, cpu, running = [], time.process_time(), step()
    for _ in range(config.steps - 1):
        following = step()
        before, end = end, fetch(running)
        seconds.append(end - before)
        running = following
    before, end = end, fetch(running)
    seconds.append(end - before)
    cpu = time.process_time() - cpu
    median = statistics.median(seconds)
    peak = peak_memory_mib()
    counted, learned_sha256 = list(losses), fingerprint(state.learned)
    profiled = profile(lambda: fetch(step()), programs.text(window)) if config.profile else {}
    return {
        "tokens_per_second": window.tokens.size / median,
        "step_seconds": median,
        "seconds_of_each_step": seconds,
        "cpu_seconds_per_step": cpu / config.steps,
        "compile_seconds": programs.compile_seconds,
        "first_step_at": first_step_at,  # seconds since the epoch
        "planned_mib": programs.planned_bytes / 2**20,
        "peak_memory_mib": peak,
        "peak_memory_of": "process" if jax.default_backend() == "cpu" else "device",
        "platform": jax.default_backend(),
        "losses": counted,
        "learned_sha256": learned_sha256,
        **profiled,
    }


def ready(
    config: StepSpeed, model: Llama, mesh: Mesh
) -> tuple[Programs, TrainState, nnx.State, Window]:
    """The step of a model with adapters, the arguments of its first call, and rows for all."""
    graphdef, learned, frozen = split_learned(model, "lora")
    optimizer = make_optimizer(
        {"learned": learned, "frozen": frozen},
        learning_rate_schedule("constant", config.learning_rate, 0, 1),
        weight_decay=0.01,
        max_grad_norm=1.0,
        accumulation=config.gradient_accumulation_steps,
    )
    state = initial_state(learned, frozen, optimizer, mesh)
    window = random_window(config, model.config.vocab_size)
    return Programs(graphdef, optimizer, mesh), state, frozen, deal(window, mesh)


def random_window(config: StepSpeed, vocab_size: int) -> Window:
    """Full rows of the ids that NumPy draws with seed 0; the same for whoever is compared."""
    k, T = config.gradient_accumulation_steps, config.max_seq_len
    devices = mesh_shape(config.mesh).rows
    B = devices * config.micro_batch_size
    ids = np.random.default_rng(0).integers(0, vocab_size, (k, B, T + 1), np.int32)
    mask = np.ones((k, B, T), bool)
    if not config.packing:
        return Window(ids[..., :-1], ids[..., 1:], mask)
    place = np.arange(T, dtype=np.int32)
    mask[..., place % DOCUMENT == DOCUMENT - 1] = False  # what follows is another document's
    lengths = np.bincount(place // DOCUMENT)
    documents = lay_out([lengths] * B, (B, T), evenly(DOCUMENT, T), devices)
    positions = np.ascontiguousarray(np.broadcast_to(place % DOCUMENT, mask.shape))
    return Window(ids[..., :-1], ids[..., 1:], mask, positions, stacked([documents] * k))


def fingerprint(tree: Any) -> str:
    """A hash of arrays, bit by bit."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def show(figures: dict[str, Any]) -> None:
    show_table(
        ("", ""),
        [
            ("tokens/s", f"{figures['tokens_per_second']:,.0f}"),
            ("step", f"{1000 * figures['step_seconds']:,.1f} ms"),
            ("CPU time of a step", f"{1000 * figures['cpu_seconds_per_step']:,.1f} ms"),
            ("compiling", f"{figures['compile_seconds']:,.1f} s"),
            ("planned memory", f"{figures['planned_mib']:,.0f} MiB"),
            (f"peak of the {figures['peak_memory_of']}", f"{figures['peak_memory_mib']:,.0f} MiB"),
            ("loss", f"{figures['losses'][0]:.4f} -> {figures['losses'][-1]:.4f}"),
        ],
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_command(measure, StepSpeed, argv, name="speed-step")


if __name__ == "__main__":
    main()
