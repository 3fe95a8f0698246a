"""How long training takes to its first step on many rows, and what it holds: twice in a row.

The first start tokenises the rows, the second finds them in the cache, which is a new one. Beside
them stand two processes that do nothing but tokenise the same texts.
"""

import json
import os
import re
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jllama import bundled
from jllama.cli import children
from jllama.errors import InputError
from jllama.machine import available_cores

_PEAK = re.compile(r"peak memory ([\d,]+) MiB")


def measure_starts(file: Path, place: Path, max_seq_len: int, epochs: int) -> dict[str, Any]:
    """Figures of a file of instructions, with packing and the bundled sample.

    {"tokenizer_alone": {"wall": 60.1, "cpu": 118.3, "tokens": 137000000},
     "first_start": {"to_step_1": 80.2, "tokenised_after": 70.9, "cpu": 150.3, "peak_mib": 800},
     "second_start": ...}

    Args:
        place: an empty folder.
    """
    model = bundled.model_folder(bundled.MODEL, place)
    words = ["--model", model, "--data", file, "--max-seq-len", max_seq_len, "--epochs", epochs,
             "--packing", "--max-steps", 1, "--precision", "fp32", "--micro-batch-size", 1,
             "--gradient-accumulation-steps", 16]  # fmt: skip
    figures: dict[str, Any] = {"tokenizer_alone": _alone(file, model)}
    for name in ("first_start", "second_start"):
        figures[name] = _start([*words, "--output-dir", place / name], place / "cache")
    return figures


def _alone(file: Path, model: Path) -> dict[str, float]:
    count = available_cores()
    with ThreadPoolExecutor(count) as pool:
        said = pool.map(
            lambda number: children.run("train.data.alone", [file, model, number, count]),
            range(count),
        )
        each = [json.loads(words) for words in said]
    wall = max(one["wall"] for one in each)
    return {"wall": wall} | {name: sum(one[name] for one in each) for name in ("cpu", "tokens")}


def _start(words: list[object], cache: Path) -> dict[str, float]:
    seen: dict[str, float] = {}
    start, before = time.monotonic(), _cpu_seconds()

    def heard(line: str) -> None:
        for name, begin in (("tokenised_after", "data: "), ("to_step_1", "train 1/1 steps")):
            if line.startswith(begin):
                seen.setdefault(name, time.monotonic() - start)

    done = children.Children().run(
        "train.lora", words, environment=os.environ | {"XDG_CACHE_HOME": str(cache)}, heard=heard
    )
    peak = _PEAK.search(done.output)
    if done.code or peak is None:
        raise InputError(f"train.lora failed: {done.reason}")
    return seen | {"cpu": _cpu_seconds() - before, "peak_mib": float(peak[1].replace(",", ""))}


def _cpu_seconds() -> float:
    """Of all ended children, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
