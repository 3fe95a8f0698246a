"""`--mesh auto`: over how many devices the weights are cut, by the plans of what there is."""

from dataclasses import replace

from jllama.errors import InputError
from jllama.sharding import MeshShape
from train.plan.arithmetic import Step
from train.plan.cards import Gpu
from train.plan.compiled import Request
from train.plan.planner import Plan, can_compile, estimate, make_plans

MACHINE = 8  # cards that are linked closely enough to share products


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
        need = min(estimate(on_mesh(step, shape), gpu).peak for shape in shapes) / 2**20
        raise InputError(
            f"--mesh auto: this run fits {count} devices in no way: cut over all of them it is "
            f"estimated at {need:,.0f} MiB on each, of {gpu.room / 2**20:,.0f}"
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
        f"--mesh auto: {mesh}; of {count} devices each is {how} to take {plan.peak / 2**20:,.0f} "
        f"MiB of {gpu.room / 2**20:,.0f}{speed}"
    )
