"""Two processes on a core each beside one on both: docs/results/processes-cpu.json.

    python docs/site/processes.py

trains the same random model on the same rows, in turns, and measures how long one, two and four
processes take to their first step.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.speed.generate import write_random
from eval.speed.train import step_figures
from jllama import bundled
from jllama.cli import children
from jllama.config import LlamaConfig
from jllama.folders.model import read_config
from jllama.folders.run import RunFolder
from jllama.machine import measured_here
from train.processes.launch import LaunchConfig, environments

FILE = Path(__file__).parents[1] / "results/processes-cpu.json"
TURNS, STEPS, WARM_UP = 3, 16, 4
ROWS = 4  # of 256 packed tokens, of all processes together
SIZE = {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "hidden_dim": 1376}


def train(model: Path, run: Path, cores: list[str], mesh: str, steps: int) -> float:
    """One run, of a process on each of `cores`; gives the seconds until its first step ended."""
    flags = [
        "--model", model, "--data", bundled.ROWS, "--output-dir", run, "--precision", "fp32",
        "--packing", "--max-seq-len", 256, "--skip-bad-rows", 1_000_000, "--epochs", steps,
        "--micro-batch-size", max(ROWS // len(cores), 1), "--gradient-accumulation-steps", 1,
        "--mesh", mesh, "--val-size", 0, "--max-steps", steps, "--save-steps", 1000,
    ]  # fmt: skip
    started = time.monotonic()
    # One that is alone is told of no others.
    told = environments(LaunchConfig(), len(cores)) if len(cores) > 1 else [{}]
    running = [
        subprocess.Popen(
            ["taskset", "-c", cores[place], *children.command("train.lora", flags)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | told[place],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for place in range(len(cores))
    ]  # fmt: skip
    lines = run / "metrics.jsonl"
    while not (lines.exists() and "step_seconds" in lines.read_text()):
        if any(process.poll() for process in running):
            break
        time.sleep(0.02)
    seconds = time.monotonic() - started
    if codes := [code for process in running if (code := process.wait())]:
        raise SystemExit(f"a process ended with {codes[0]}: {cores}")
    return seconds


def main() -> None:
    found: dict[str, list[dict[str, Any]]] = {"one process, two cores": [], "two, a core each": []}
    start: dict[str, list[float]] = {"1": [], "2": [], "4": []}
    with tempfile.TemporaryDirectory() as place:
        sample = bundled.model_folder(bundled.MODEL, Path(place))
        config = LlamaConfig(**SIZE, vocab_size=read_config(sample).vocab_size)
        words = (sample / "tokenizer.model").read_bytes()
        model = write_random(Path(place, "random"), config, tokenizer=words)
        for turn in range(TURNS):
            for name, cores in zip(found, (["0,1"], ["0", "1"]), strict=True):
                run = Path(place, f"{turn}-{len(cores)}")
                train(model, run, cores, f"data={len(cores)}", STEPS)
                lines = RunFolder(run).read_metrics().values
                found[name].append(step_figures(lines, WARM_UP))
            for count, seconds in start.items():
                run = Path(place, f"start-{turn}-{count}")
                mesh = f"data={count}"
                seconds.append(train(sample, run, ["0,1"] * int(count), mesh, 1))
            print(f"turn {turn + 1} of {TURNS}", flush=True)
    seconds = {
        name: statistics.median(turn["median_step_seconds"] for turn in turns)
        for name, turns in found.items()
    }
    one, two = seconds.values()
    content = {
        **measured_here("speed"),
        "settings": {**asdict(config), "rows": ROWS, "turns": TURNS},
        "turns": found,
        "median_step_seconds": seconds,
        "speed_of_two": one / two,
        "seconds_to_the_first_step": {n: statistics.median(x) for n, x in start.items()},
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({k: content[k] for k in list(content)[-3:]}, indent=1))


if __name__ == "__main__":
    main()
