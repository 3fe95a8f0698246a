"""Plans: what a step needs on a card, compiled in a child process, remembered, and chosen from."""

import functools
import hashlib
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from jllama.cli.card import PLAN_EXTRA, refuse_other_plugin
from jllama.cli.children import Children
from jllama.cli.terminal import Progress, command_line
from jllama.config import Remat
from jllama.decode.generate import CHUNK
from jllama.errors import InputError
from jllama.folders.json_files import write_json
from jllama.machine import installed_version, user_cache
from train.plan import arithmetic
from train.plan.arithmetic import Step
from train.plan.cards import USUAL, Gpu, Wiring
from train.plan.compiled import Program, Request

CHILDREN = 2  # compilations at a time; each takes a core and a gigabyte or two
COMPILERS = ("jax", "jaxlib", "flax", "optax", *PLAN_EXTRA)
NO_EXTRA = (
    "the packages to compile for a GPU are missing: pip install 'jllama[plan]' (from a checkout: "
    "pip install -e '.[plan]'). The figures below are a closed-form estimate"
)


@dataclass(frozen=True)
class Plan:
    """Bytes by class on one device; `compiled` tells a compiled step from an estimate."""

    step: Step
    gpu: Gpu
    classes: dict[str, int]
    compiled: bool
    program: Program = "train"
    compile_seconds: float = 0.0
    host: int = 0  # bytes in the host's memory
    time_us: Mapping[str, float] = field(default_factory=dict)  # by class; empty if not predicted
    kernels: int = 0  # launches of one call of the program
    layer_kernels: float = 0.0  # of training: those of one layer in one micro-batch
    peaks: Mapping[str, int] = field(default_factory=dict)  # of training: by who does the matmuls
    summed: bool = False  # from small models, not compiled whole
    # Of several cards, by kind: exchanges in a step, and the bytes that each card sends in them.
    exchanges: Mapping[str, float] = field(default_factory=dict)
    exchanged: Mapping[str, float] = field(default_factory=dict)

    @property
    def matmuls(self) -> str:
        """Who computes the matmuls at the peak; empty where it makes no difference that we know."""
        return max(self.peaks, key=lambda who: self.peaks[who], default="")

    @property
    def peak(self) -> int:
        return sum(self.classes.values())

    @property
    def margin(self) -> int:
        """Bytes of the card that are left out: context and fragmentation."""
        return self.gpu.memory_mib * 2**20 - self.gpu.room

    @property
    def free(self) -> int:
        """Bytes of the card beyond peak and margin; negative if it does not fit."""
        return self.gpu.room - self.peak

    @property
    def tokens(self) -> int:
        """That one call of the program works on, on all cards."""
        step = self.step
        rows = step.accumulation * step.micro_batch_size * step.mesh.rows
        return {
            "train": rows * step.max_seq_len,
            "prefill": step.micro_batch_size * (step.max_seq_len // 2),
            "decode": step.micro_batch_size * CHUNK,
        }[self.program]

    @property
    def predicted(self) -> float:
        """Tokens a second by the roofline of the compiled program; 0 if it is not predicted."""
        seconds = sum(self.time_us.values()) / 1e6
        return self.tokens / seconds if seconds else 0.0

    @property
    def hidden(self) -> float:
        """As `predicted`, if all that cards exchange were hidden behind what they compute."""
        exchange = self.time_us.get("exchange", 0.0)
        seconds = max(sum(self.time_us.values()) - exchange, exchange) / 1e6
        return self.tokens / seconds if seconds else 0.0

    @property
    def speed(self) -> float:
        """Tokens a second by which plans are compared: predicted, else at most."""
        return self.predicted or self.bound

    @property
    def speed_is(self) -> str:
        return "predicted" if self.predicted else "at most"

    @property
    def bound(self) -> float:
        """Tokens a second that this card cannot pass."""
        return arithmetic.bound_tokens_per_second(
            self.step, self.gpu.flops(self.step.precision), self.gpu.bandwidth_gb * 1e9
        )


def make_plans(
    requests: Sequence[Request], gpu: Gpu, *, present: bool = False, wiring: Wiring = USUAL
) -> list[Plan]:
    """A plan for each request, from the user's cache where the same was asked before.

    Args:
        requests: the card in them is replaced.
        gpu: whose memory counts, and whose description the step is compiled for.
        wiring: what several cards exchange by.
        present: whether it is this machine's. A card that is not described, or a CPU, then compiles
            itself, which on a card takes memory beside this process.

    Without the packages of the `plan` extra the plans are closed-form estimates.

    Raises:
        InputError: if a step cannot be compiled.
    """
    gpu.check_precision(requests[0].step.precision)
    here = present and not (gpu.described and can_compile())
    requests = [
        replace(
            request,
            gpu=None if here else gpu,
            room=gpu.room if gpu.described else 0,
            rates=gpu.rates(request.step.precision, wiring),
        )
        for request in requests
    ]
    if not here:
        refuse_other_plugin()
    if not here and not can_compile():
        return [estimate(request.step, gpu) for request in requests]
    answers = [_remembered(request) for request in requests]
    missing = [i for i, found in enumerate(answers) if found is None]
    for i, found in zip(missing, _compile([requests[i] for i in missing]), strict=True):
        answers[i] = found
        _remember(requests[i], found)
    return [
        Plan(
            request.step, gpu, found["classes"], True, request.program, found["compile_seconds"],
            found["host"], found["time_us"], found["kernels"],
            found["layer_kernels"], found["peaks"], found["summed"], found["exchanges"],
            found["exchanged"],
        )
        for request, found in zip(requests, answers, strict=True)
        if found is not None
    ]  # fmt: skip


def can_compile() -> bool:
    """Whether the `plan` extra (or a GPU's own packages) is installed."""
    return all(installed_version(name) for name in PLAN_EXTRA)


def estimate(step: Step, gpu: Gpu) -> Plan:
    """Closed formulas only; the activations and temporaries are rough."""
    classes = arithmetic.memory_classes(step) | {
        "saved_activations": arithmetic.saved_activations(step),
        "temporaries": arithmetic.working_memory(step),
    }
    return Plan(step, gpu, classes, compiled=False)


def train_command(step: Step) -> str:
    """How to train with a step."""
    words: list[object] = ["train", "--model", "DIR", "--data", "FILE"]
    words += ["--precision", step.precision, "--remat", step.remat]
    words += ["--micro-batch-size", step.micro_batch_size]
    words += ["--gradient-accumulation-steps", step.accumulation]
    words += ["--max-seq-len", step.max_seq_len]
    words += ["--mesh", step.mesh.words] if step.mesh.words else []
    words += ["--packing"] if step.documents else []
    words += ["--base", step.base.format] if step.base else []
    words += ["--base-skip", ",".join(step.base.skip)] if step.base and step.base.skip else []
    words += ["--tune", "full"] if step.lora is None else []
    return command_line(*words)


def fastest_first(steps: Sequence[Step], gpu: Gpu) -> list[Step]:
    """By the bound on this card, then by the least remat, then by the largest micro-batch."""

    def order(step: Step) -> tuple[float, int, int]:
        bound = round(estimate(step, gpu).bound)
        return -bound, get_args(Remat).index(step.remat), -step.micro_batch_size

    return sorted(steps, key=order)


def remats(step: Step) -> Iterator[Step]:
    """The step with every remat that stays on the device."""
    return (replace(step, remat=remat) for remat in get_args(Remat) if remat != "offload")


def _compile(requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Runs the children; on this machine's devices if a request's `gpu` is None."""
    if not requests:
        return []
    answers: list[dict[str, Any]] = [{} for _ in requests]
    children = Children()
    shares = [range(len(requests))[first::CHILDREN] for first in range(CHILDREN)]

    def compile_share(share: range) -> None:
        if not share:
            return
        left = iter(share)

        def heard(line: str) -> None:
            if line.startswith("{"):  # else it is a library's
                answers[next(left)] = json.loads(line)
                progress.advance()

        some = [requests[i] for i in share]
        with tempfile.TemporaryDirectory() as kernels:
            done = children.run(
                "train.plan.compiled", [], given=pickle.dumps(some),
                environment=_environment(some[0].gpu, kernels), heard=heard,
            )  # fmt: skip
        if done.code:
            raise InputError(f"the step could not be compiled: {done.reason}")

    what = "compiling " + (_name(requests[0].step) if len(requests) == 1 else "steps to plan with")
    progress = Progress("plan", len(requests), "programs", note=what)
    with progress, ThreadPoolExecutor(CHILDREN) as pool:
        try:
            for _ in pool.map(compile_share, shares):
                pass
        except BaseException:  # Ctrl-C, or the other share failed
            children.stop()
            raise
    return answers


# What no kernel is run for is compiled in half the time; the program's text is the same.
CHEAPER = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_gpu_disable_gpuasm_optimizations=true --xla_gpu_force_compilation_parallelism=1"
)


def _environment(gpu: Gpu | None, kernels: str) -> dict[str, str]:
    """Of a child.

    Args:
        gpu: that is compiled for by its description; None is this machine.
        kernels: an empty folder. The programs of a child differ in how many layers there are, and
            in a few kernels: each kernel is compiled once.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    environment = os.environ | {
        "XLA_FLAGS": flags.strip(),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_TRACEBACK_FILTERING": "off",  # its last words are the error then, not a footnote
    }
    if gpu is None:
        return environment
    return environment | {
        "JAX_PLATFORMS": "cpu",  # the plugin then asks for no driver
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
        "XLA_FLAGS": f"{flags} {CHEAPER} --xla_gpu_kernel_cache_file='{kernels}/kernels'".strip(),
    }


def _name(step: Step) -> str:
    return f"{step.remat} remat, {step.micro_batch_size} x {step.max_seq_len}"


def _cache_file(request: Request) -> Path:
    """Named by content: the request, the versions that compile it, and the code of the step."""
    platforms = "" if request.gpu else os.environ.get("JAX_PLATFORMS", "")
    content = hashlib.sha256(f"{request!r} {platforms} {_code()}".encode()).hexdigest()
    return user_cache("plans") / f"{content}.json"


@functools.cache
def _code() -> str:
    """A hash of everything but the request that a plan depends on."""
    known = [sys.version]
    known += [f"{name} {installed_version(name)}" for name in COMPILERS]
    root = Path(__file__).parents[2]
    for file in sorted([*root.glob("jllama/**/*.py"), *root.glob("train/**/*.py")]):
        known.append(hashlib.sha256(file.read_bytes()).hexdigest())
    return hashlib.sha256("\n".join(known).encode()).hexdigest()


def _remembered(request: Request) -> dict[str, Any] | None:
    if request.text:
        return None
    try:
        return json.loads(_cache_file(request).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _remember(request: Request, found: dict[str, Any]) -> None:
    try:
        file = _cache_file(request)
        new = file.with_suffix(f".{os.getpid()}")
        write_json(new, found)
        new.replace(file)
    except OSError:
        pass  # a read-only home costs the next plan a compilation
