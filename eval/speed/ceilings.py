"""What this machine can do at most: bytes copied and products of matrices, per second.

    python -m eval.speed.ceilings JOB.json    {"numbers": 268435456, "size": 8192, "output": FILE}

Every other figure is read against these two. They are JAX's, timed over several calls in a row on
random data (zeros are faster), after a warm-up.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jllama.folders.json_files import read_json, write_json
from jllama.machine import pass_over_absent_gpu

IN_A_ROW = 10  # calls between two looks at the clock: dispatching one is not measured
REPEATS = 5


def streamer(numbers: int, passes: int) -> Callable[[], Any]:
    """A call that reads and writes so many fp32 numbers on the device, `passes` times.

    In place, or the time would be that of the system's handing out new memory.
    """
    negative = jax.jit(jnp.negative, donate_argnums=0)
    held = [jnp.ones(numbers, jnp.float32)]

    def stream() -> None:
        for _ in range(passes):
            held.append(negative(held.pop()))
        held[0].block_until_ready()

    return stream


def copy_bandwidth(numbers: int) -> float:
    """Bytes read and written a second, copying so many fp32 numbers."""
    stream = streamer(numbers, IN_A_ROW)
    return 2 * 4 * numbers * IN_A_ROW / median_seconds(stream)


def matmul_rate(size: int, dtype: Any, precision: str) -> float:
    """Operations a second of a product of two square matrices."""

    @jax.jit
    def product(a, b):
        return jnp.matmul(a, b, precision=precision) / jnp.asarray(size**0.5, dtype)

    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)

    def chain() -> None:
        c = a
        for _ in range(IN_A_ROW):
            c = product(c, b)
        c.block_until_ready()

    return 2 * size**3 * IN_A_ROW / median_seconds(chain)


def median_seconds(call: Callable[[], Any]) -> float:
    """Of several calls, after one that does not count."""
    call()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main(path: str) -> None:
    pass_over_absent_gpu()
    job = read_json(Path(path))
    figures = {
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "copied_mib": 4 * job["numbers"] / 2**20,
        "copy_gb_per_second": copy_bandwidth(job["numbers"]) / 1e9,
        "matmul_size": job["size"],
        "bf16_tflops": matmul_rate(job["size"], jnp.bfloat16, "default") / 1e12,
        "fp32_tflops": matmul_rate(job["size"], jnp.float32, "highest") / 1e12,
    }
    write_json(Path(job["output"]), figures)


if __name__ == "__main__":
    main(sys.argv[1])
