"""The machine and the process: devices, cores, memory, caches, installed versions."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import platform
import pwd
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BeforeValidator

from jllama.errors import InputError

# The cards that can be planned for; `train.plan.cards` has their sizes.
GpuName = Literal[
    "rtx-3060", "rtx-3090", "rtx-4060", "rtx-4090", "rtx-5090", "t4", "l4", "a10g", "l40s",
    "a100-40gb", "a100-80gb", "h100", "h200", "b200",
]  # fmt: skip
AnyCase = BeforeValidator(lambda name: name.lower() if isinstance(name, str) else name)

ADDRESS_SPACE_MIB = 2560  # of the smallest run: what JAX and its threads map, hardly any of it used
PACKAGES = ("jllama", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# What is written down of a card: NVIDIA's name of each fact, and ours.
GPU_FACTS = {"name": "name", "memory.total": "memory", "driver_version": "driver"}


def installed_version(distribution: str) -> str:
    """Of a package; empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python and the packages."""
    found = {name: installed_version(name) or "not installed" for name in packages}
    return {"python": platform.python_version()} | found


def measured_here(command: str, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """How every file of results begins: date, command, device, versions, and flags of JAX and XLA.

    Where there is a GPU that JAX may use, `gpu` has its name, memory and driver.

    Args:
        command: as the `jllama` script knows it.
    """
    given = sys.argv[1:]  # behind the script's own name it begins with the command's
    flags = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("JAX_", "XLA_"))}
    card = {} if os.environ.get("JAX_PLATFORMS") == "cpu" else ask_driver(*GPU_FACTS)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": ["jllama", command, *given[given[:1] == [command] :]],
        "device": f"{platform.machine()}, {processor()}, {os.cpu_count()} cores",
        **({"gpu": {GPU_FACTS[name]: value for name, value in card.items()}} if card else {}),
        "versions": versions(packages),
        "flags": flags,
    }


def ask_driver(*fields: str) -> dict[str, str]:
    """What NVIDIA's driver says of the first GPU that this process may see; {} without one.

    "name", "memory.total"  ->  {"name": "NVIDIA H200", "memory.total": "143771 MiB"}
    """
    values = [part.strip() for line in _gpus(*fields)[:1] for part in line.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def visible_gpus() -> int:
    """How many GPUs this process may see, by NVIDIA's driver."""
    return len(_gpus("index"))


def _gpus(*fields: str) -> list[str]:
    """A line for each GPU that this process may see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip(", "):
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    command += [f"--id={visible}"] if visible else []
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return said.splitlines()


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_cores(count: int) -> None:
    """Ties this process, and every thread it starts from now on, to so many cores."""
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


@functools.cache
def processor() -> str:
    """The processor's name, as far as the system tells it."""
    names = Path("/proc/cpuinfo")
    if names.is_file():
        for line in names.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def process_memory_mib(kind: str = "VmHWM") -> float:
    """Peak memory of this process (VmHWM), or what it holds now (VmRSS), with loading included.

    On Linux getrusage's figure begins with the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split(f"{kind}:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def host_memory_mib() -> int:
    """Memory and swap that this process could have at most: the machine's, or its container's.

    0 where the system does not tell it.
    """
    table = _meminfo()
    limits = [table["MemTotal"]] if table else []
    limits += [limit for limit in map(_limit_mib, _CONTAINER_LIMITS) if limit]
    return min(limits) + table.get("SwapTotal", 0) if limits else 0


def free_memory_mib() -> int:
    """Of `host_memory_mib`, what other processes leave; swap left out."""
    return min(_meminfo().get("MemAvailable", 0), host_memory_mib())


# Of cgroups, version 2 and 1.
_CONTAINER_LIMITS = (
    "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)  # fmt: skip


def _meminfo() -> dict[str, int]:
    """{"MemTotal": 24000, ...} in MiB; empty elsewhere than on Linux."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return {}
    rows = (line.replace(":", " ").split() for line in text.splitlines())
    return {name: int(kib) // 2**10 for name, kib, *_ in rows}


def _limit_mib(file: str) -> int:
    """A container's limit; 0 where there is none."""
    try:
        return int(Path(file).read_text(encoding="ascii")) // 2**20
    except (OSError, ValueError):  # "max"
        return 0


def refuse_small_address_space() -> None:
    """XLA ends a process without a word of ours where it can map no more.

    Raises:
        InputError: below what the bundled sample needs.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE_MIB * 2**20:
        raise InputError(
            f"this process may use {limit // 2**20:,} MiB of address space, and the least that "
            f"works is {ADDRESS_SPACE_MIB:,}; raise it with: ulimit -v unlimited"
        )


def peak_memory_mib() -> float:
    """Peak of the memory of the fullest device; on a CPU, of the process."""
    import jax

    known = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in known if "peak_bytes_in_use" in stats]
    return max(peaks) / 2**20 if peaks else process_memory_mib()


def user_cache(name: str) -> Path:
    """A folder in the user's cache that only the user may enter (mode 0700).

    Raises:
        OSError: if it cannot be made, or belongs to somebody else.
    """
    folder = _cache_home() / "jllama" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    folder.chmod(0o700)
    return folder


def _cache_home() -> Path:
    """By the XDG specification: a variable that is empty or relative is as if it were not set."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named
    home = os.environ.get("HOME", "")
    if not home:
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            raise FileNotFoundError("this user has no home directory") from None
    return Path(home) / ".cache"


def use_cpu() -> None:
    """Takes no GPU from others."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def pass_over_absent_gpu() -> None:
    """Keeps JAX's CUDA plugin, which the `plan` extra brings, quiet where there is no driver."""
    drivers = ("/dev/nvidiactl", "/dev/dxg")  # Linux, and Windows' subsystem for it
    if importlib.util.find_spec("jax_cuda13_plugin") and not any(map(os.path.exists, drivers)):
        import jax

        if jax.config.jax_platforms is None:  # type: ignore[attr-defined]
            use_cpu()


def use_private_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache; private, for they are executable code.

    What cannot be read there or written is compiled again, without a warning.
    """
    import jax

    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    with contextlib.suppress(OSError):
        jax.config.update("jax_compilation_cache_dir", str(user_cache("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # small steps, too


if __name__ == "__main__":  # the device of a process that would rather not open it
    pass_over_absent_gpu()
    import jax

    print(jax.devices()[0].device_kind)
