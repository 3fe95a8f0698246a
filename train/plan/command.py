"""`python -m train.plan`: memory and speed of a run, for any listed GPU, with no GPU there.

    python -m train.plan --model llama-2-7b --gpu rtx-4090 --remat block --max-seq-len 1024
    python -m train.plan --model llama-2-7b --gpu rtx-4090 --fit

The real train step is compiled for the card, from shapes alone, in a process of its own.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

import tyro

from jllama.cli.card import CONTEXT_MIB, FRACTION, FRAGMENTATION, usable_bytes
from jllama.cli.command import run_command
from jllama.cli.terminal import command_line, console, print_json, quiet_if, show_table
from jllama.config import (
    BaseChoice,
    BaseSkip,
    LoraConfig,
    MeshChoice,
    Precision,
    Remat,
    asked_base,
)
from jllama.decode.generate import CHUNK
from jllama.errors import AtLeast1, InputError, NotNegative, Positive, Share, SomeOf, checked
from jllama.folders.model import base_of, model_sizes
from jllama.machine import AnyCase, GpuName
from jllama.names import LINEAR_CHOICES
from jllama.sharding import mesh_shape
from train.config import OptimizerName, Tune
from train.data.documents import evenly
from train.plan import arithmetic
from train.plan.arithmetic import Step
from train.plan.cards import Gpu, Wiring, find_gpu, present_gpu
from train.plan.compiled import Request, file_beside
from train.plan.exchange import LINK_SHARE
from train.plan.ladder import fit_card
from train.plan.planner import NO_EXTRA, Plan, make_plans, train_command

MIB = 2**20
NAMES = {"triton": "Triton's matmuls", "cublaslt": "cuBLASLt's"}


@checked
class PlanConfig:
    """Plan the memory of a run on a GPU, and bound its speed; --fit finds what fits the card."""

    model: str = "llama-2-7b"
    """A preset (llama-2-7b, llama-3-8b, ...) or a model folder."""
    gpu: Annotated[Literal[GpuName, "present"], AnyCase] = "h200"
    """The card to plan for; present is this machine's."""
    gpu_memory: Annotated[Positive | None, tyro.conf.arg(metavar="GIB")] = None
    """Memory of a card that differs from the named one's."""
    mesh: MeshChoice = ""
    """Several cards, as in train.lora: data=2,fsdp=4 (or tensor=2)."""
    link_gb: NotNegative = 0.0
    """With --mesh: GB/s one way between two cards of a machine; 0: the card's NVLink, or PCIe."""
    network_gb: Positive = 12.5
    """With --mesh: GB/s one way that each card has to other machines (12.5: 100 Gbit/s)."""
    cards_per_machine: AtLeast1 = 8
    """With --mesh: how many cards share a machine."""
    program: Annotated[Literal["train", "generate"], tyro.conf.arg(name="for")] = "train"
    """What to plan: a train step, or generation (--micro-batch-size prompts in caches of
    --max-seq-len)."""
    precision: Precision = "bf16"
    """Dtype of frozen weights and activations."""
    base: BaseChoice = "stored"
    """Format of the frozen linears, as in train.lora; a preset is stored as it was published."""
    base_skip: BaseSkip = "none"
    """With --base: linears that stay as they are."""
    remat: Remat = "block"
    """What the backward pass recomputes, as in train.lora."""
    micro_batch_size: AtLeast1 = 4
    """Sequences in one forward pass of one GPU."""
    max_seq_len: AtLeast1 = 512
    """Tokens of a sequence."""
    gradient_accumulation_steps: AtLeast1 = 4
    """Micro-batches in one optimizer step; costs no memory."""
    packing: bool = False
    """Several rows in one sequence, each attended to by itself."""
    row_tokens: AtLeast1 = 300
    """With --packing: tokens of every row."""
    tune: Tune = "lora"
    """What learns: adapters, or every weight."""
    lora_rank: AtLeast1 = 16
    """Rank R of the adapters."""
    lora_targets: Annotated[str, SomeOf(LINEAR_CHOICES)] = "wq,wv"
    """Linears that get an adapter: wq,wk,wv,wo,w1,w2,w3 (or q_proj, ...), or all."""
    lora_dropout: Share = 0.05
    """Dropout of the adapter's input."""
    dora: bool = False
    """DoRA: learn the length of every row of the weights, too."""
    ffn_bias: bool = False
    """Feed-forward biases, as the original report counted them."""
    optimizer: OptimizerName = "adamw"
    """Optimizer, whose moments take memory."""
    fit: bool = False
    """Which remat, micro-batch and length fit the card, and which is predicted fastest."""
    hlo: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Also write the compiled step's text, to be read: FILE with Triton's matmuls, and beside it
    one with cuBLASLt's."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self):
        if self.fit and (self.program == "generate" or self.mesh):
            raise InputError("--fit plans training on one GPU; drop --for generate and --mesh")
        base = asked_base(self.base, self.base_skip)
        if self.tune == "full" and base:
            raise InputError(f"--tune full and --base {self.base}, which cannot learn")
        if self.tune == "full" and (self.dora or self.ffn_bias):
            raise InputError(
                "--tune full has no adapters and stores no biases; drop --dora, --ffn-bias"
            )

    @property
    def step(self) -> Step:
        """The step that these settings describe."""
        targets = tuple(self.lora_targets.split(","))
        lora = LoraConfig(
            self.lora_rank, dropout=self.lora_dropout, targets=targets, dora=self.dora
        )
        return Step(
            replace(model_sizes(self.model), ffn_bias=self.ffn_bias),
            lora if self.tune == "lora" else None,
            self.precision,
            self.remat,
            self.micro_batch_size,
            self.max_seq_len,
            self.gradient_accumulation_steps,
            self.optimizer,
            evenly(self.row_tokens, self.max_seq_len) if self.packing else (),
            mesh_shape(self.mesh),
            base_of(self.model, asked_base(self.base, self.base_skip)),
        )


def plan(config: PlanConfig) -> None:
    """Makes and shows the plans."""
    present = config.gpu == "present"
    gpu = present_gpu() if present else find_gpu(config.gpu, config.gpu_memory)
    if config.fit:
        with quiet_if(config.json):
            ladder = fit_card(config.step, gpu, present=present)
        print_json(ladder.as_json()) if config.json else ladder.show(config.model)
        return
    programs: tuple[Any, ...] = ("train",) if config.program == "train" else ("prefill", "decode")
    requests = [
        # Prefill and decode are compiled at the same time.
        Request(
            config.step,
            program=program,
            text=config.hlo if program == "train" else file_beside(config.hlo, program),
        )
        for program in programs
    ]
    with quiet_if(config.json):
        wiring = Wiring(config.link_gb, config.network_gb, config.cards_per_machine)
        plans = make_plans(requests, gpu, present=present, wiring=wiring)
    if not plans[0].compiled and config.program == "generate":
        raise InputError(f"{NO_EXTRA.split('. ')[0]}; there is no estimate for generation")
    if config.json:
        answers = [as_json(plan, config) for plan in plans]
        print_json(answers[0] if len(answers) == 1 else answers)
        return
    if not plans[0].compiled:
        console.print(NO_EXTRA)
    for plan in plans:
        show(plan, config)


def as_json(plan: Plan, config: PlanConfig) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "peak_mib": plan.peak / MIB,
        "matmuls": plan.matmuls or None,
        "peak_mib_by_matmuls": {who: peak / MIB for who, peak in plan.peaks.items()},
        "summed": plan.summed,
        "classes_mib": {name: size / MIB for name, size in plan.classes.items()},
        "free_mib": plan.free / MIB,
        "margin_mib": plan.margin / MIB,
        "memory_fraction": plan.gpu.room / MIB / plan.gpu.memory_mib,
        "host_mib": plan.host / MIB,
        "compiled": plan.compiled,
        "program": plan.program,
        "flops_per_token": arithmetic.flops_per_token(plan.step),
        "bound_tokens_per_second": plan.bound,
        "predicted_tokens_per_second": plan.predicted or None,
        "tokens_per_second_if_exchange_is_hidden": plan.hidden or None,
        "time_us_by_class": dict(plan.time_us),
        "exchanges": dict(plan.exchanges),
        "exchanged_bytes": dict(plan.exchanged),
        "kernels": plan.kernels,
        "kernels_per_layer": plan.layer_kernels,
        "compile_seconds": plan.compile_seconds,
        "gpu": asdict(plan.gpu),
        "settings": asdict(config),
    }


def show(plan: Plan, config: PlanConfig) -> None:
    """Memory by class, what is left of the card, and the bound on speed."""
    step, gpu = plan.step, plan.gpu
    how = "prompts x slots" if plan.program != "train" else f"{step.remat} remat"
    rows = [(name.replace("_", " "), size) for name, size in plan.classes.items()]
    rows += [
        ("peak", plan.peak),
        ("margin: context, fragmentation", plan.margin),
        ("free" if plan.free >= 0 else "missing", abs(plan.free)),
        (f"{gpu.name}{f', each of {step.mesh.size}' if config.mesh else ''}", gpu.memory_mib * MIB),
    ]
    show_table(
        ("memory", "MiB"),
        [(name, f"{size / MIB:,.1f}") for name, size in rows],
        f"{plan.program}, {config.model} {step.precision}, {how}, "
        f"{step.micro_batch_size} x {step.max_seq_len} "
        f"({'compiled' if plan.compiled else 'estimated'})",
    )
    if len(plan.peaks) > 1:
        peaks = [f"{peak / MIB:,.0f} with {NAMES[who]}" for who, peak in plan.peaks.items()]
        console.print(f"The peak is the larger of {' and '.join(peaks)}.")
    if plan.host:
        console.print(f"and {plan.host / MIB:,.0f} MiB of the host's memory")
    if plan.program == "train":
        flops = arithmetic.flops_per_token(step)
        console.print(f"{flops / 1e9:.2f} GFLOP per token")
        if plan.bound:
            console.print(f"upper bound: {plan.bound:,.0f} tokens/s, by the card's data sheet")
    if plan.exchanges:
        show_exchanges(plan, config)
    if plan.predicted:
        show_time(plan)
    if plan.compiled:
        how = "small models, which are extended" if plan.summed else "whole"
        console.print(f"compiled in {plan.compile_seconds:.0f} s ({how})")
    console.print(f"{_margin(gpu)}; docs/planning.md says what the figures cover.")
    if plan.free < 0:
        ladder = command_line("plan", "--model", config.model, "--gpu", config.gpu, "--fit")
        console.print(f"next: {ladder}")
    elif plan.program == "train":
        console.print(f"next: {train_command(step)}")


def _margin(gpu: Gpu) -> str:
    share = gpu.room / MIB / gpu.memory_mib
    if gpu.room < usable_bytes(gpu.memory_mib):
        return f"The margin is all but what JAX may take, {share:.3f} of the card"
    return (
        f"The margin is {CONTEXT_MIB} MiB and {100 * FRAGMENTATION:.0f} % of the card: JAX takes "
        f"{share:.3f} of it ({FRACTION})"
    )


def show_exchanges(plan: Plan, config: PlanConfig) -> None:
    """What the cards exchange in a step, and by what."""
    show_table(
        ("exchange", "times a step", "GB that each card sends"),
        [
            (kind, f"{count:,.0f}", f"{plan.exchanged[kind] / 1e9:,.3f}")
            for kind, count in plan.exchanges.items()
        ],
    )
    link = config.link_gb or plan.gpu.link_gb
    far = plan.step.mesh.size > config.cards_per_machine
    beyond = f", {config.network_gb:g} GB/s to other machines" if far else ""
    console.print(
        f"links: {link:g} GB/s to a card of the same machine{beyond}, of which "
        f"{100 * LINK_SHARE:.0f} % are assumed to be reached"
    )


def show_time(plan: Plan) -> None:
    """The predicted time by class, and the speed that it comes to."""
    whole = sum(plan.time_us.values())
    rows = sorted(plan.time_us.items(), key=lambda item: -item[1])
    shown = [(name, f"{us / 1e3:,.1f}", f"{100 * us / whole:.1f}") for name, us in rows if us]
    call = {"train": "a step", "prefill": "a prompt", "decode": f"{CHUNK} tokens"}[plan.program]
    show_table(("predicted time", f"ms for {call}", "%"), shown)
    share = f", {100 * plan.predicted / plan.bound:.0f} % of the bound" if plan.bound else ""
    console.print(
        f"predicted: {plan.predicted:,.0f} tokens/s{share if plan.program == 'train' else ''}; "
        f"{plan.kernels:,} kernels, {whole / 1e3:,.0f} ms"
    )
    if plan.exchanges:
        console.print(
            f"Nothing overlaps in it; if all exchange were hidden: {plan.hidden:,.0f} tokens/s"
        )


def main(argv: Sequence[str] | None = None) -> None:
    run_command(plan, PlanConfig, argv, name="plan")
