"""The suite's figures as the tables of docs/performance.md."""

from pathlib import Path

from jllama.machine import PACKAGES as OURS

PACKAGES = (*OURS, "torch", "transformers", "peft", "jax-cuda13-plugin", "nvidia-cudnn-cu13")


def tables(folder: Path) -> str:
    return ""
