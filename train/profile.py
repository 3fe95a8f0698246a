"""Where the time of a step goes, measured: the kernels of JAX's profiler, by the plan's classes."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from train.plan.hlo import read_program
from train.plan.roofline import Roofline

# Kernels of libraries carry names of their own; cuDNN's attention is a product of matrices, too.
_LIBRARIES = {
    "attention": re.compile(r"cudnn|fmha|sdpa|flash", re.IGNORECASE),
    "matmuls": re.compile(r"gemm|nvjet|xmma|cutlass|cublas", re.IGNORECASE),
    "copies": re.compile(r"memcpy|memset", re.IGNORECASE),
}


def profile(step: Callable[[], Any], text: str, steps: int = 2) -> dict[str, Any]:
    """Microseconds of one step by class of kernel, and how many kernels it launches.

    Args:
        step: runs a step and waits for it.
        text: of the compiled step, as XLA prints it.
    """
    with tempfile.TemporaryDirectory() as place:
        with jax.profiler.trace(place):
            for _ in range(steps):
                step()
        kinds = {kernel.name: kernel.kind for kernel in Roofline(read_program(text)).kernels()}
        time: dict[str, float] = defaultdict(float)
        launches = 0
        for file in Path(place).rglob("*.xplane.pb"):
            planes = jax.profiler.ProfileData.from_file(str(file)).planes
            for kind, nanoseconds in launched(planes, kinds):
                time[kind] += nanoseconds / 1000 / steps
                launches += 1
    return {"time_us_by_class": dict(time), "kernels": launches // steps}


def launched(planes: Any, kinds: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    """The class of every kernel that ran, and its nanoseconds.

    On a card all that its streams ran; on a CPU the instructions of `kinds`, the kernels of the
    program, for what calls others is an event, too.
    """
    planes = list(planes)
    cards = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    by_kernel = {_as_kernel(name): kind for name, kind in kinds.items()}
    for plane in cards or planes:
        for line in plane.lines:
            if cards and not line.name.startswith("Stream"):
                continue  # the same again, summed by module or by step
            for event in line.events:
                instruction = dict(event.stats).get("hlo_op", "")
                known = kinds.get(instruction) or by_kernel.get(_as_kernel(event.name))
                if cards or (known and event.name == instruction):
                    yield known or of_library(event.name), event.duration_ns


def of_library(name: str) -> str:
    """The class of a kernel that is none of XLA's own."""
    return next((kind for kind, names in _LIBRARIES.items() if names.search(name)), "other")


def _as_kernel(name: str) -> str:
    """An instruction as XLA names its kernel: loop_add_fusion.3 -> loop_add_fusion_3"""
    return re.sub(r"[^A-Za-z0-9_]", "_", name)
