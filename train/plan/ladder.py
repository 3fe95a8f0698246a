"""`python -m train.plan --fit`: every remat, length and micro-batch on a card, and the best.

For `--mesh auto`: every mesh over the devices that there are, and the best.

A few small steps are compiled; memory is then linear in the layers and in the tokens of a
micro-batch. The recommended step is planned once more, as it is, before it is named.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jllama.attention import choose_implementation
from jllama.cli.terminal import console, show_table
from jllama.config import PRECISIONS
from jllama.errors import InputError
from jllama.sharding import MeshShape
from train.plan.arithmetic import Step, between
from train.plan.cards import Gpu
from train.plan.compiled import Request
from train.plan.planner import (
    NO_EXTRA,
    Plan,
    can_compile,
    estimate,
    make_plans,
    remats,
    train_command,
)

LENGTHS = (512, 1024, 2048, 4096)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
MEASURED_LENGTH, MEASURED_BATCHES = 1024, (1, 2, 8)
MIB = 2**20
MACHINE = 8  # cards that are linked closely enough to share products


@dataclass(frozen=True)
class Ladder:
    """All plans for one card, and the fastest at the length that was asked for, if one fits."""

    gpu: Gpu
    asked: Step
    plans: list[Plan]
    best: Plan | None

    def fitting(self, remat: str, length: int) -> Plan | None:
        """The largest micro-batch that fits."""
        return next(
            (
                plan
                for plan in reversed(self.plans)
                if (plan.step.remat, plan.step.max_seq_len) == (remat, length) and plan.free >= 0
            ),
            None,
        )

    def command(self) -> str:
        """How to train with the best plan, in steps of as many sequences as were asked for."""
        assert self.best is not None
        sequences = self.asked.micro_batch_size * self.asked.accumulation
        step = self.best.step
        return train_command(replace(step, accumulation=max(1, sequences // step.micro_batch_size)))

    def show(self, model: str) -> None:
        """The table, and the best."""
        how = "compiled small and extended" if self.plans[0].compiled else "estimated"
        lengths = sorted({plan.step.max_seq_len for plan in self.plans})
        rows = []
        for remat in dict.fromkeys(plan.step.remat for plan in self.plans):
            cells: list[str] = [remat]
            for length in lengths:
                plan = self.fitting(remat, length)
                speed = f"  {plan.speed:,.0f}/s" if plan and plan.speed else ""
                cells.append(
                    f"{plan.step.micro_batch_size} x  {plan.peak / MIB:,.0f}{speed}"
                    if plan
                    else "does not fit"
                )
            rows.append(cells)
        show_table(
            ["remat", *(f"{length} tokens" for length in lengths)],
            rows,
            f"{model} {self.asked.precision} on {self.gpu.name}: largest micro-batch, peak MiB, "
            f"tokens/s {self.plans[0].speed_is} ({how})",
        )
        if not self.plans[0].compiled:
            console.print(NO_EXTRA)
        if self.best is None:
            least = min(self.plans, key=lambda plan: plan.peak)
            console.print(
                f"nothing fits: the least, {least.step.remat} remat at "
                f"{least.step.micro_batch_size} x {least.step.max_seq_len}, misses "
                f"{-least.free / MIB:,.0f} MiB"
            )
            return
        best = self.best
        console.print(
            f"fastest at {best.step.max_seq_len} tokens ({best.speed:,.0f}/s {best.speed_is})"
            f"{', compiled whole' if best.compiled and not best.summed else ''}: "
            f"{best.step.remat} remat, {best.step.micro_batch_size} sequences; "
            f"peak {best.peak / MIB:,.0f} MiB, {best.free / MIB:,.0f} MiB free beyond a margin of "
            f"{best.margin / MIB:,.0f}"
        )
        console.print(f"next: {self.command()}")

    def as_json(self) -> dict:
        """What `--json` prints."""
        return {
            "gpu": self.gpu.name,
            "memory_mib": self.gpu.memory_mib,
            "compiled": self.plans[0].compiled,
            "plans": [summary(plan) for plan in self.plans],
            "best": summary(self.best) | {"command": self.command()} if self.best else None,
        }


def summary(plan: Plan) -> dict:
    """One cell of the ladder."""
    step = plan.step
    return {
        "remat": step.remat,
        "micro_batch_size": step.micro_batch_size,
        "max_seq_len": step.max_seq_len,
        "peak_mib": plan.peak / MIB,
        "matmuls": plan.matmuls or None,
        "free_mib": plan.free / MIB,
        "classes_mib": {name: size / MIB for name, size in plan.classes.items()},
        "bound_tokens_per_second": plan.bound,
        "predicted_tokens_per_second": plan.predicted or None,
    }


def fit_card(asked: Step, gpu: Gpu, *, present: bool = False) -> Ladder:
    """Plans for all combinations on one card.

    Raises:
        InputError: if the card has no such precision, or a step cannot be compiled.
    """
    gpu.check_precision(asked.precision)
    lengths = sorted({*LENGTHS, asked.max_seq_len})
    lengths = [n for n in lengths if n <= max(asked.model.max_seq_len, asked.max_seq_len)]
    cells = [
        replace(step.of_length(length), micro_batch_size=batch)
        for step in remats(asked)
        for length in lengths
        for batch in MICRO_BATCHES
    ]
    if present or can_compile():
        plans = list(extended(asked, cells, gpu, present))
    else:
        plans = [estimate(step, gpu) for step in cells]
    candidates = [
        plan for plan in plans if plan.step.max_seq_len == asked.max_seq_len and plan.free >= 0
    ]
    # Of equally fast ones the larger micro-batch: fewer, larger kernels.
    candidates.sort(key=lambda plan: (round(plan.speed), plan.step.micro_batch_size), reverse=True)
    for plan in candidates:
        if not plan.compiled:
            return Ladder(gpu, asked, plans, plan)
        (whole,) = make_plans([Request(plan.step)], gpu, present=present)
        if whole.free >= 0:
            return Ladder(gpu, asked, plans, whole)
    return Ladder(gpu, asked, plans, None)


def extended(asked: Step, cells: list[Step], gpu: Gpu, present: bool) -> Iterator[Plan]:
    """Plans for cells on the lines through three compiled micro-batches of each remat.

    The peak is the greatest of several moments, each linear in the tokens. cuDNN's attention takes
    memory for tokens alone, so one length stands for all of them; XLA's holds all pairs of tokens,
    so each length is compiled.
    """
    dtype = PRECISIONS[asked.precision]
    platform = "gpu" if gpu.bf16_tflops or present else "cpu"
    cudnn = choose_implementation(platform, dtype, asked.model.head_dim) == "cudnn"

    def measured(step: Step) -> list[Step]:
        length = MEASURED_LENGTH if cudnn else step.max_seq_len
        return [
            replace(step.of_length(length), micro_batch_size=batch) for batch in MEASURED_BATCHES
        ]

    wanted = list(dict.fromkeys(point for cell in cells for point in measured(cell)))
    plans = make_plans([Request(step, whole=False) for step in wanted], gpu, present=present)
    known = {plan.step: plan for plan in plans}
    for cell in cells:
        points = measured(cell)
        batch = cell.micro_batch_size * cell.max_seq_len / points[0].max_seq_len
        few, many = points[:2] if batch <= MEASURED_BATCHES[1] else points[1:]
        share = (batch - few.micro_batch_size) / (many.micro_batch_size - few.micro_batch_size)
        classes = between(known[few].classes, known[many].classes, share)
        times = between(known[few].time_us, known[many].time_us, share)
        # Every token attends to as many as its row has.
        times |= {"attention": times.get("attention", 0) * cell.attended / few.attended}
        yield Plan(
            cell, gpu, {name: round(size) for name, size in classes.items()}, compiled=True,
            time_us=times if sum(times.values()) else {}, kernels=known[few].kernels,
        )  # fmt: skip


def choose_mesh(step: Step, gpu: Gpu, count: int) -> tuple[MeshShape, str]:
    """The mesh over `count` devices that is fastest by its prediction and fits, and why.

    Where nothing can be compiled or predicted: the one that cuts the weights least. `tensor` takes
    as many rows at a time as its devices would have taken each.

    Raises:
        InputError: if the weights fit in no way.
    """
    cuts = [n for n in range(1, count + 1) if count % n == 0]
    shapes = [MeshShape(data=count // n, fsdp=n) for n in cuts]
    shapes += [MeshShape(data=count // n, tensor=n) for n in cuts if 1 < n <= MACHINE]
    plans = [estimate(on_mesh(step, shape), gpu) for shape in shapes]
    plans = [plan for plan in plans if plan.free >= 0]
    if not plans:
        need = min(estimate(on_mesh(step, shape), gpu).peak for shape in shapes) / MIB
        raise InputError(
            f"--mesh auto: this run fits {count} devices in no way: cut over all of them it is "
            f"estimated at {need:,.0f} MiB on each, of {gpu.room / MIB:,.0f}"
        )
    if gpu.described and can_compile() and gpu.rates(step.precision):
        plans = make_plans([Request(plan.step) for plan in plans], gpu)
        plans = [plan for plan in plans if plan.free >= 0] or plans[-1:]
    best = max(plans, key=lambda plan: plan.predicted)  # of equals the first
    return best.step.mesh, _reason(best, gpu, count)


def on_mesh(step: Step, shape: MeshShape) -> Step:
    return replace(step, mesh=shape, micro_batch_size=step.micro_batch_size * shape.tensor)


def _reason(plan: Plan, gpu: Gpu, count: int) -> str:
    how = "planned" if plan.compiled else "estimated"
    speed = f", {plan.predicted:,.0f} tokens/s predicted" if plan.predicted else ""
    mesh = plan.step.mesh.words or "data=1"
    return (
        f"--mesh auto: {mesh}; of {count} devices each is {how} to take {plan.peak / MIB:,.0f} "
        f"MiB of {gpu.room / MIB:,.0f}{speed}"
    )
