"""`--remat auto`, `--micro-batch-size auto`, and advice when memory runs out: choices by plan."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax

from jllama.config import PRESETS, LlamaConfig, LoraConfig, Precision
from jllama.errors import InputError
from jllama.folders.model import base_of
from jllama.machine import host_memory_mib
from jllama.sharding import mesh_shape
from train.config import TrainConfig
from train.data.documents import Shapes
from train.plan.arithmetic import (
    Step,
    bound_tokens_per_second,
    memory_classes,
    widened_weights,
)
from train.plan.cards import GPUS, Gpu, cpu, present_gpu
from train.plan.compiled import Request
from train.plan.planner import Plan, estimate, fastest_first, make_plans, remats

MIB = 2**20
NOTED = 512 * MIB  # of copies
ROUGH = 1.3  # an estimate this much too high is not worth compiling


def this_device() -> Gpu:
    """The GPU that JAX uses, with what it may take of it, else the processor."""
    if jax.default_backend() != "gpu":
        return cpu()
    stats = jax.local_devices()[0].memory_stats() or {}
    gpu = present_gpu()
    return replace(gpu, limit_mib=stats.get("bytes_limit", 0) // MIB or gpu.limit_mib)


def step_of(
    config: TrainConfig,
    llama: LlamaConfig,
    lora: LoraConfig | None,
    length: int,
    documents: Shapes = (),
) -> Step:
    """The step that a run will take; `auto` is read as the least memory."""
    sequences = config.gradient_accumulation_steps
    batch = config.micro_batch_size
    return Step(
        replace(llama, ffn_bias=config.ffn_bias),
        lora,
        config.precision,
        "block" if config.remat == "auto" else config.remat,
        1 if batch == "auto" else batch,
        length,
        sequences,
        config.optimizer,
        documents,
        mesh_shape(config.mesh),
        base_of(config.model, config.asked_base),
    )


def refuse_what_cannot_fit(step: Step) -> None:
    """Refuses, by closed formulas and before anything is loaded, what no remat can make fit.

    Only what stays in memory from the first step to the last is counted, and a CPU may swap.

    Raises:
        InputError: with what the step holds, what there is, and what would fit; or if the card has
            no such precision.
    """
    if jax.default_backend() == "gpu":
        gpu = present_gpu()
        gpu.check_precision(step.precision)
        name, limit = gpu.name, gpu.memory_mib
    else:
        name, limit = "this machine's memory", host_memory_mib()
    classes = memory_classes(step)
    held = sum(classes.values())
    if not limit or held <= limit * MIB:
        return
    parts = ", ".join(f"{k.replace('_', ' ')} {v / MIB:,.0f}" for k, v in classes.items() if v)
    raise InputError(
        f"this run cannot fit {name}: it holds {held / MIB:,.0f} MiB ({parts}) of {limit:,}, "
        f"whatever --remat and --micro-batch-size are.\nWhat would fit: {_smaller(step, limit)}"
    )


def _smaller(step: Step, limit: int) -> str:
    """Changes of a step that fit in `limit` MiB, the smallest change first, or the cards."""

    def needs(other: Step) -> float:
        return sum(memory_classes(other).values()) / MIB

    adapters = LoraConfig() if step.lora is None else step.lora
    copied = _copies(replace(step, lora=adapters, precision="bf16"))
    small: Precision = "fp32" if copied else "bf16"
    changes = {f"--precision {small}": replace(step, precision=small)} if step.lora else {}
    if step.lora is None:
        changes["--tune lora"] = replace(step, lora=adapters)
        changes[f"--tune lora --precision {small}"] = replace(step, lora=adapters, precision=small)
    for name, sizes in sorted(PRESETS.items(), key=lambda preset: -preset[1].parameter_count):
        if sizes.parameter_count < step.model.parameter_count:
            words = f"a model of the size of {name} with --precision {small}"
            changes[words] = replace(step, model=sizes, lora=adapters, precision=small)
    fitting = [f"{words} ({needs(other):,.0f} MiB)" for words, other in changes.items()
               if needs(other) <= limit and needs(other) < needs(step)]  # fmt: skip
    cards = [gpu.name for gpu in GPUS.values() if needs(step) < 0.9 * gpu.memory_mib]
    if cards:
        fitting[2:] = [f"a GPU such as {cards[0]}"]
    return "; ".join(fitting) or "none of the known cards and models"


def warning_if_short(step: Step) -> str:
    """What to know before a CPU's step that is estimated at more than is free; else nothing.

    A GPU refuses what it does not have; on a CPU the system ends the process without a word.
    """
    if jax.default_backend() == "gpu":
        return ""
    least = replace(step, remat="block", micro_batch_size=1)
    needed, lowest, free = _on_cpu(step), _on_cpu(least), cpu().memory_mib
    if needed <= free:
        return ""
    return (
        f"warning: this step is estimated at {needed:,.0f} MiB, and {free:,} are free: "
        "the system may end the process without a word. The least, --remat block "
        f"--micro-batch-size 1, is estimated at {lowest:,.0f}"
    )


def cost_of_bf16(step: Step) -> str:
    """What bf16 takes on a CPU beside fp32, if that is much; else nothing."""
    if _copies(step) < NOTED:
        return ""
    return (
        "note: a CPU computes bf16 from fp32 copies of all weights: this step is estimated at "
        f"{_on_cpu(step):,.0f} MiB, and at {_on_cpu(replace(step, precision='fp32')):,.0f} with "
        "--precision fp32, which also took 0.6 times the time for a model of 1B"
    )


def _on_cpu(step: Step) -> float:
    """Estimated MiB."""
    return (estimate(step, cpu()).peak + _copies(step)) / MIB


def _copies(step: Step) -> int:
    """Bytes of fp32 copies of bf16 weights, which JAX needs on a CPU before 0.11."""
    here = jax.default_backend() == "cpu" and jax.__version_info__ < (0, 11)
    return widened_weights(step) if here else 0


def choose(
    config: TrainConfig,
    llama: LlamaConfig,
    lora: LoraConfig | None,
    length: int,
    documents: Shapes = (),
) -> tuple[TrainConfig, str]:
    """The settings without `auto`, and why: the fastest by its prediction that fits this device.

    A step's sequences stay as many as they are: `--gradient-accumulation-steps` of them with an
    automatic micro-batch, so that what is learned does not depend on the card.

    Raises:
        InputError: if nothing fits.
    """
    if "auto" not in (config.remat, config.micro_batch_size):
        return config, ""
    gpu, asked = this_device(), step_of(config, llama, lora, length, documents)
    sequences = config.gradient_accumulation_steps
    steps = list(remats(asked)) if config.remat == "auto" else [asked]
    if config.micro_batch_size == "auto":
        steps = [
            replace(step, micro_batch_size=batch, accumulation=sequences // batch)
            for step in steps
            for batch in range(1, sequences + 1)
            if sequences % batch == 0
        ]
    best: Plan | None = None
    tried: list[Plan] = []
    for step in fastest_first(steps, gpu):
        if best and not _may_be_faster(step, best):
            continue
        if estimate(step, gpu).peak > ROUGH * gpu.memory_mib * MIB:
            continue
        (plan,) = make_plans([Request(step)], gpu, present=True)
        if plan.free < 0:
            tried.append(plan)
        elif best is None or plan.speed > best.speed:
            best = plan
    if best:
        chosen = replace(
            config,
            remat=best.step.remat,
            micro_batch_size=best.step.micro_batch_size,
            gradient_accumulation_steps=best.step.accumulation,
        )
        return chosen, _reason(best, tried)
    least = min(tried, key=lambda plan: plan.peak) if tried else estimate(asked, gpu)
    raise InputError(
        f"no setting fits {gpu.name} ({gpu.memory_mib:,} MiB): the least, {_name(least)}; "
        "lower --max-seq-len, or use --precision bf16"
    )


def _may_be_faster(step: Step, best: Plan) -> bool:
    """Whether a step's operations alone leave it time to be predicted faster than another.

    Of one remat, fewer sequences at a time are never faster.
    """
    rates = best.gpu.rates(step.precision)
    if rates is None or step.remat == best.step.remat:
        return False
    return bound_tokens_per_second(step, rates.matmul, rates.bandwidth) > best.speed


def _name(plan: Plan) -> str:
    step = plan.step
    return (
        f"{step.remat} remat with micro-batches of {step.micro_batch_size} x {step.max_seq_len}, "
        f"needs {plan.peak / MIB:,.0f} MiB and a margin of {plan.margin / MIB:,.0f}"
    )


def _reason(plan: Plan, tried: Sequence[Plan]) -> str:
    step = plan.step
    faster = "; ".join(
        f"{other.step.remat} remat at {other.step.micro_batch_size} sequences would miss "
        f"{-other.free / MIB:,.0f} MiB"
        for other in tried[-2:]
    )
    speed = f", {plan.predicted:,.0f} tokens/s predicted" if plan.predicted else ""
    return (
        f"chosen for {plan.gpu.name}: {step.remat} remat, {step.micro_batch_size} sequences x "
        f"{step.accumulation} micro-batches; {plan.peak / MIB:,.0f} MiB planned, "
        f"{plan.free / MIB:,.0f} free{speed}" + (f" ({faster})" if faster else "")
    )


@contextlib.contextmanager
def out_of_memory_explained(step: Step) -> Iterator[None]:
    """Turns an allocation that failed on the device into planned alternatives.

    Raises:
        InputError: instead of XLA's RESOURCE_EXHAUSTED.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0][:200]
        try:
            advice = alternatives(step)
        except Exception as failed:  # of any kind: the reason above is what counts
            why = (str(failed).splitlines() or [type(failed).__name__])[0][:200]
            advice = f"what needs less could not be planned: {why}"
        raise InputError(f"out of memory: {reason}\n{advice}") from error


def alternatives(step: Step) -> str:
    """Settings that need less than a step, most first, with what they are planned to take."""
    gpu = this_device()
    half = max(1, step.micro_batch_size // 2)
    smaller = [replace(other, micro_batch_size=half) for other in remats(step)]
    smaller += [replace(step, remat="block"), replace(step, remat="block", micro_batch_size=1)]
    requests = [Request(other, whole=False) for other in dict.fromkeys([step, *smaller])]
    here, *others = make_plans(requests, gpu, present=True)
    less = sorted((p for p in others if p.peak < here.peak), key=lambda p: -p.peak)
    lines = [f"this step was planned at {here.peak / MIB:,.0f} MiB of {gpu.memory_mib:,}; less:"]
    lines += [
        f"  {plan.peak / MIB:>9,.0f} MiB  --remat {plan.step.remat} "
        f"--micro-batch-size {plan.step.micro_batch_size}"
        for plan in less
    ]
    return "\n".join(lines if less else ["nothing but a smaller --max-seq-len needs less"])
