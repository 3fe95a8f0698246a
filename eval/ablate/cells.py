"""The cells of an ablation, and the figures of each: from runs, or from a plan for a GPU.

A cell is one combination of the four techniques; every cell is trained or planned in processes of
its own, so that neither memory nor compiled programs are shared.
"""

import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from eval.speed.train import step_figures
from jllama.cli.children import Children, Done
from jllama.errors import InputError
from jllama.folders.run import RunFolder

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What a child says when memory runs out: train.lora and XLA, numpy, C++.
NO_MEMORY = ("out of memory", "resource_exhausted", "memoryerror", "bad_alloc")
MEASURED = ("peak_memory_mib", "step_seconds", "tokens_per_second", "loss")
PLANNED = (
    "peak_mib", "free_mib", "margin_mib", "classes_mib", "flops_per_token",
    "bound_tokens_per_second", "compiled", "compile_seconds",
)  # fmt: skip

Figures = dict[str, Any]
STORED = "stored"  # the base of cells that do not say it: those before there were others


@dataclass(frozen=True)
class Cell:
    """One combination: `micro_batch_size` sequences in each of `accumulation` micro-batches."""

    precision: str
    accumulation: int
    remat: str
    tune: str
    micro_batch_size: int
    reference: bool = False  # the small batch that accumulation is compared with
    base: str = STORED


def grid(axes: Mapping[str, Sequence[str]], sequences: int) -> list[Cell]:
    """Every combination, each with `sequences` in a step, and the references of accumulation.

    A reference is one micro-batch of the most accumulated cell alone: what accumulation adds to it
    in memory is the cost of accumulating. There is one for each way to tune, in the last precision
    and remat.
    """
    counts = [int(count) for count in axes["accumulation"]]
    cells = [
        Cell(precision, count, remat, tune, sequences // count, base=base)
        for base in axes["base"]
        for precision in axes["precision"]
        for tune in axes["tune"]
        for remat in axes["remat"]
        for count in counts
        if tune == "lora" or base == STORED  # codes do not learn
    ]
    if max(counts) > 1:
        small = sequences // max(counts)
        cells += [
            Cell(axes["precision"][-1], 1, axes["remat"][-1], tune, small, reference=True)
            for tune in axes["tune"]
        ]
    return cells


def run_cells(
    cells: Sequence["DataclassInstance"],
    figures_of: Callable[..., Figures],
    places: Sequence[set[int] | None],
    ended: Callable[[Figures], None],
) -> None:
    """Calls `ended` with every cell and its figures, in the order in which they end.

    Args:
        figures_of: called with a cell and `children=`.
        places: one for each cell at a time: the cores that it keeps to, or None for all.
    """
    children = Children()
    free: SimpleQueue[set[int] | None] = SimpleQueue()
    for cores in places:
        free.put(cores)

    def keep_to_cores() -> None:
        """A thread's cores are those of the processes that it starts."""
        if cores := free.get():
            os.sched_setaffinity(0, cores)

    def whole(cell: "DataclassInstance") -> Figures:
        started = time.monotonic()
        found = figures_of(cell, children=children)
        return asdict(cell) | found | {"wall_seconds": time.monotonic() - started}

    with ThreadPoolExecutor(len(places), initializer=keep_to_cores) as pool:
        try:
            for future in as_completed([pool.submit(whole, cell) for cell in cells]):
                ended(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise


def halves() -> list[set[int] | None]:
    """This process's cores as two places to train; one place where there are none to share."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    half = len(cores) // 2
    return [set(cores[:half]), set(cores[half : 2 * half])] if half else [None]


@dataclass(frozen=True)
class Training:
    """What trainings of an ablation have in common."""

    model: str
    data: str
    max_seq_len: int
    epochs: int
    steps: int
    val_size: float
    learning_rate: float
    seed: int


def train_cell(cell: Cell, *, shared: Training, repeats: int, children: Children) -> Figures:
    """The median of each figure over the repeats, and the repeats' own values.

    Raises:
        InputError: if a run fails for another reason than memory.
    """
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as place:
            run = Path(place) / "run"
            done = children.run("train.lora", train_flags(cell, shared, run))
            if out_of_memory(done):
                return {"failed": out_of_memory(done)}
            check(done, cell)
            runs.append(run_figures(RunFolder(run), shared))
    values = {name: [figures[name] for figures in runs] for name in MEASURED}
    medians = {name: statistics.median(found) for name, found in values.items()}
    once = {name: runs[0][name] for name in ("planned_memory_mib", "device")}
    return medians | once | {"repeats": values}


def train_flags(cell: Cell, shared: Training, run: Path) -> list[str]:
    """How a cell is trained.

    No dropout: its masks depend on how a step is cut into micro-batches.
    """
    dropout = ["--lora-dropout", "0"] if cell.tune == "lora" else []
    return [
        "--base", cell.base, "--model", shared.model, "--data", shared.data,
        "--precision", cell.precision, "--remat", cell.remat, "--tune", cell.tune,
        "--micro-batch-size", str(cell.micro_batch_size),
        "--gradient-accumulation-steps", str(cell.accumulation),
        "--max-seq-len", str(shared.max_seq_len), "--no-packing",
        "--max-steps", str(shared.steps), "--epochs", str(shared.epochs),
        "--eval-steps", str(shared.steps), "--val-size", str(shared.val_size),
        "--learning-rate", str(shared.learning_rate), "--seed", str(shared.seed),
        "--skip-bad-rows", "1000000", "--output-dir", str(run), *dropout,
    ]  # fmt: skip


def run_figures(run: RunFolder, shared: Training) -> Figures:
    """Of one run; the first step, which compiles, is left out of the times."""
    lines = run.read_metrics().values
    last = steps_of(lines, shared)[-1]
    times = step_figures(lines, warmup_steps=1)
    return {
        "peak_memory_mib": times["peak_memory_mib"],
        "planned_memory_mib": last["planned_memory_mib"],
        "step_seconds": times["median_step_seconds"],
        "tokens_per_second": times["supervised_tokens_per_second"],
        "loss": last["loss"],
        "device": run.read_record()["device"],
    }


def steps_of(lines: Sequence[Figures], shared: Training) -> list[Figures]:
    """The steps of a run's metrics.

    Raises:
        InputError: if there were rows for fewer steps only.
    """
    steps = [line for line in lines if "step_seconds" in line]
    if len(steps) < shared.steps:
        raise InputError(
            f"there are rows for {len(steps)} steps, but {shared.steps} were asked for; give more "
            "rows"
        )
    return steps


def plan_cell(cell: Cell, *, model: str, gpu: str, max_seq_len: int, children: Children) -> Figures:
    """What `train.plan` says of a cell.

    Raises:
        InputError: if it cannot be planned.
    """
    flags = [
        "--json", "--model", model, "--gpu", gpu, "--base", cell.base,
        "--precision", cell.precision, "--remat", cell.remat, "--tune", cell.tune,
        "--micro-batch-size", str(cell.micro_batch_size),
        "--gradient-accumulation-steps", str(cell.accumulation),
        "--max-seq-len", str(max_seq_len),
    ]  # fmt: skip
    done = children.run("train.plan", flags)
    check(done, cell)
    found = json.loads(done.output)
    return {name: found[name] for name in PLANNED}


def out_of_memory(done: Done) -> str:
    """Why a process that lacked memory ended; empty of any other."""
    if done.code == -signal.SIGKILL:
        return "out of memory: the process was killed (SIGKILL), as a system does that has no more"
    lines = done.errors.strip().splitlines() if done.code else []
    said = [line for line in lines if any(word in line.lower() for word in NO_MEMORY)]
    if not said:
        return ""
    return f"out of memory: {said[-1].partition('out of memory: ')[2] or said[-1]}"[:300]


def check(done: Done, cell: Cell) -> None:
    """Refuses to go on after a failure."""
    if done.code:
        words = done.errors.strip()[-1500:] or "no message"
        raise InputError(f"the cell {name_of(asdict(cell))} failed (code {done.code}):\n{words}")


def names_bases(cells: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is more to say of their bases than that they are stored weights."""
    return any(cell.get("base", STORED) != STORED for cell in cells)


def name_of(cell: Mapping[str, Any]) -> str:
    """{"precision": "bf16", ...} -> "bf16 lora block 1 x 8", with the base if it is in codes."""
    size = f"{cell['micro_batch_size']} x {cell['accumulation']}"
    base = cell.get("base", STORED)
    words = [base] if base != STORED else []
    return " ".join([cell["precision"], cell["tune"], *words, cell["remat"], size])
