"""The GPUs that can be planned for: their sizes, and their description as XLA reads it.

Figures are the makers' data sheets: memory as the driver shows it, dense tensor-core rates with
fp32 accumulation, fp32 without tensor cores. They bound the speed; what of them is sustained, which
a prediction goes by, is in roofline.py.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from jllama.cli.card import memory_fraction, usable_bytes
from jllama.config import Precision
from jllama.errors import AtLeast0, AtLeast1, InputError, NotNegative, checked
from jllama.machine import ask_driver, free_memory_mib
from train.plan.exchange import LINK_SHARE, Links
from train.plan.roofline import ATTENTION_SHARE, BANDWIDTH_SHARE, MATMUL_SHARE, Rates


class Wiring(NamedTuple):
    """What cards exchange by, in GB/s one way: within a machine, and between machines."""

    link_gb: float = 0.0  # 0: as the card has it
    network_gb: float = 12.5  # of each card: 100 Gbit/s
    machine: int = 8  # cards


USUAL = Wiring()


@checked
class Gpu:
    """One card; `capability` is CUDA's compute capability (major, minor).

    Of a card that is not known, and of a CPU, all figures but these and the memory are 0.
    """

    name: str
    memory_mib: AtLeast1
    capability: tuple[int, int]
    cores: AtLeast0  # streaming multiprocessors
    clock_ghz: NotNegative
    bandwidth_gb: NotNegative  # GB/s
    l2_mib: AtLeast0
    bf16_tflops: NotNegative
    fp32_tflops: NotNegative
    link_gb: NotNegative = 0  # GB/s to another card of its machine, one way: NVLink, or PCIe
    limit_mib: AtLeast0 = 0  # what JAX may take of it; 0: all but the margin

    @property
    def described(self) -> bool:
        """Whether XLA can compile for it by its description."""
        return self.cores > 0

    @property
    def room(self) -> int:
        """Bytes for a step: without a margin, and no more than JAX may take."""
        room = usable_bytes(self.memory_mib)
        return min(room, self.limit_mib * 2**20) if self.limit_mib else room

    def check_precision(self, precision: Precision) -> None:
        """Refuses bf16 where the card has no such arithmetic."""
        if precision == "bf16" and self.capability < (8, 0):
            raise InputError(
                f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]}) has "
                "no bf16 arithmetic, which came with 8.0; use --precision fp32"
            )

    def flops(self, precision: Precision) -> float:
        """Operations a second that the data sheet promises."""
        return 1e12 * (self.bf16_tflops if precision == "bf16" else self.fp32_tflops)

    def rates(self, precision: Precision, wiring: Wiring = USUAL) -> Rates | None:
        """What of the data sheet is sustained; None for a card whose sheet is not known."""
        if not self.flops(precision) or not self.bandwidth_gb:
            return None
        matmul = MATMUL_SHARE * self.flops(precision)
        return Rates(
            matmul=matmul,
            attention=ATTENTION_SHARE * matmul,
            vector=1e12 * self.fp32_tflops / 2,  # the sheet counts a multiply-add as two
            bandwidth=BANDWIDTH_SHARE * 1e9 * self.bandwidth_gb,
            links=Links(
                LINK_SHARE * 1e9 * (wiring.link_gb or self.link_gb),
                LINK_SHARE * 1e9 * wiring.network_gb,
                wiring.machine,
            ),
        )


_KNOWN = (
    Gpu("rtx-3060", 12288, (8, 6), 28, 1.777, 360, 3, 25.5, 12.7, 32),
    Gpu("rtx-3090", 24576, (8, 6), 82, 1.695, 936, 6, 71, 35.6, 32),
    Gpu("rtx-4060", 8188, (8, 9), 24, 2.460, 272, 24, 30.2, 15.1, 16),
    Gpu("rtx-4090", 24564, (8, 9), 128, 2.520, 1008, 72, 165, 82.6, 32),
    Gpu("rtx-5090", 32607, (12, 0), 170, 2.407, 1792, 96, 209.5, 104.8, 64),
    Gpu("t4", 15360, (7, 5), 40, 1.590, 320, 4, 0, 8.1, 16),
    Gpu("l4", 23034, (8, 9), 58, 2.040, 300, 48, 121, 30.3, 32),
    Gpu("a10g", 23028, (8, 6), 80, 1.710, 600, 6, 70, 35, 32),
    Gpu("l40s", 46068, (8, 9), 142, 2.520, 864, 96, 362, 91.6, 32),
    Gpu("a100-40gb", 40960, (8, 0), 108, 1.410, 1555, 40, 312, 19.5, 300),
    Gpu("a100-80gb", 81920, (8, 0), 108, 1.410, 2039, 40, 312, 19.5, 300),
    Gpu("h100", 81559, (9, 0), 132, 1.980, 3350, 50, 989, 67, 450),
    Gpu("h200", 143771, (9, 0), 132, 1.980, 4800, 60, 989, 67, 450),
    Gpu("b200", 183359, (10, 0), 148, 1.965, 8000, 126, 2250, 75, 900),
)
GPUS: Mapping[str, Gpu] = MappingProxyType({gpu.name: gpu for gpu in _KNOWN})

# Compute capability -> shared memory of a multiprocessor and of one block, threads, in XLA's words.
_LIMITS = {
    (7, 5): (65536, 65536, 1024),
    (8, 0): (167936, 166912, 2048),
    (8, 6): (102400, 101376, 1536),
    (8, 9): (102400, 101376, 1536),
    (9, 0): (233472, 232448, 2048),
    (10, 0): (233472, 232448, 2048),
    (12, 0): (102400, 101376, 1536),
}


def find_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """A known card, or one with another amount of memory.

    Raises:
        InputError: with the choices, if the name is unknown.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise InputError(f"unknown GPU {name!r}; choose from {', '.join(GPUS)} (or present)")
    if memory_gib is None:
        return gpu
    return replace(
        gpu, name=f"{gpu.name} with {memory_gib:g} GiB", memory_mib=int(memory_gib * 1024)
    )


def present_gpu() -> Gpu:
    """The GPU that this process may see first, by its driver; no more than JAX may take of it.

    Raises:
        InputError: if there is none.
    """
    card = ask_driver("name", "memory.total", "compute_cap")
    try:
        name, memory = card["name"], int(card["memory.total"].split()[0])
        major, minor = (int(part) for part in card["compute_cap"].split("."))
    except (KeyError, ValueError, IndexError):
        raise InputError(
            f"no GPU here (nvidia-smi shows none); name one with --gpu: {', '.join(GPUS)}"
        ) from None
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    known = (gpu for gpu in _KNOWN if set(gpu.name.split("-")) <= words)
    unknown = Gpu(name, 1, (major, minor), 0, 0, 0, 0, 0, 0)
    fraction = memory_fraction()
    limit = round(fraction * memory) if fraction else 0
    return replace(next(known, unknown), name=name, memory_mib=memory, limit_mib=limit)


def cpu() -> Gpu:
    """This machine's processor: its free memory; its rates are not known."""
    return Gpu("this machine's CPU", max(1, free_memory_mib()), (8, 0), 0, 0, 0, 0, 0, 0)


def devices_of(gpu: Gpu | None, count: int) -> Any:
    """Devices to compile for: a described card's, or this machine's."""
    import jax
    from jax.experimental import topologies

    if gpu is None:
        return jax.devices()[:count]
    return topologies.get_topology_desc(
        platform="cuda", target_config=target_config(gpu), topology=f"1x1x{count}"
    ).devices


def target_config(gpu: Gpu) -> str:
    """The card as XLA's GpuTargetConfig, which stands in for the hardware when compiling."""
    shared, shared_by_block, threads = _LIMITS[gpu.capability]
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared_by_block}
  threads_per_core_limit: {threads} core_count: {gpu.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(gpu.bandwidth_gb * 1e9)} l2_cache_size: {gpu.l2_mib * 2**20}
  clock_rate_ghz: {gpu.clock_ghz} device_memory_size: {gpu.memory_mib * 2**20}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{gpu.name}"
"""
