"""The GPU before JAX starts: what JAX takes of its memory, and whether its plugin fits."""

import os
import re

from jllama.errors import InputError
from jllama.machine import ask_driver, installed_version

# What a process takes of a card beside what JAX allocates, and what its allocation in blocks leaves
# unused.
CONTEXT_MIB = 700  # CUDA context, cuBLAS and cuDNN workspaces
FRAGMENTATION = 0.03  # of the card's memory
# How JAX is told what share of a card to take, and its name of old; and how to take it.
FRACTION, OLD_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
ALLOCATION = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR")
JAX_FRACTION = 0.75  # of JAX, if it is not told
# What compiling for a card that is not there takes: the packages of the extra `plan`.
PLAN_EXTRA = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13")
PLUGINS = tuple(f"jax-cuda{cuda}-{part}" for cuda in (12, 13) for part in ("plugin", "pjrt"))


def usable_bytes(memory_mib: int) -> int:
    """What a program can have of a card: plans go by it, and JAX is told to take it."""
    return memory_mib * 2**20 - int((CONTEXT_MIB + FRAGMENTATION * memory_mib) * 2**20)


def memory_fraction() -> float | None:
    """The share of a card that the environment lets JAX take; None if it says nothing.

    Raises:
        InputError: if it is no number.
    """
    name = FRACTION if os.environ.get(FRACTION) else OLD_FRACTION
    if not (text := os.environ.get(name)):
        return JAX_FRACTION if any(map(os.environ.get, ALLOCATION)) else None
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not fraction > 0:
        raise InputError(f"{name}={text}, expected a number above 0, such as 0.9")
    return fraction


def prepare_gpu() -> None:
    """Before JAX starts: has it take as much of the card as plans assume, if the user says nothing.

    It would take three quarters, so a plan that fits the card could fail.

    Raises:
        InputError: if there is a card, and JAX's plugin for it is of another version than JAX.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return
    memory = ask_driver("memory.total").get("memory.total", "").partition(" ")[0]
    if memory:
        refuse_other_plugin()
    if memory_fraction() is not None:
        return
    if memory.isdecimal() and usable_bytes(int(memory)) > 0:
        os.environ[FRACTION] = repr(usable_bytes(int(memory)) / (int(memory) * 2**20))


def refuse_other_plugin() -> None:
    """JAX passes over a CUDA plugin of another version, and the GPU with it, with a mere warning.

    Raises:
        InputError: with both versions.
    """
    wanted = installed_version("jaxlib")
    for name in PLUGINS:
        found = installed_version(name)
        if found and _release(found) != _release(wanted):
            raise InputError(
                f"{name} {found} does not fit jaxlib {wanted}: JAX would not use the GPU; "
                f"run: pip install '{name}=={wanted}'"
            )


def _release(version: str) -> str:
    """The numbers that JAX compares: those of 0.10.2.post1 are 0.10.2."""
    return re.split(r"[^0-9.]", version)[0].rstrip(".")
