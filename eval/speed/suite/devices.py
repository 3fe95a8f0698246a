"""The part of the suite for several cards: one step on every mesh, and a process for each card."""

import json
from typing import Any

from eval.speed.suite.bench import Bench, NotHere
from eval.speed.suite.settings import Sizes
from jllama import bundled
from jllama.folders.run import RunFolder
from jllama.machine import visible_gpus
from jllama.sharding import MeshShape

VIRTUAL = 2  # devices that a CPU shows itself as
STEPS = 8  # of a run of the whole command


def devices(sizes: Sizes, bench: Bench) -> dict[str, Any]:
    """Measured and planned by mesh; then the whole command in one process and in several.

    Raises:
        NotHere: if there is one card.
    """
    count = visible_gpus() if bench.device == "gpu" else VIRTUAL
    if count < 2:
        raise NotHere("one card is here, and this wants two or more")
    flags = bench.environment.get("XLA_FLAGS", "")
    virtual = f"--xla_force_host_platform_device_count={count} {flags}"
    environment = {"XLA_FLAGS": virtual} if bench.device == "cpu" else {}
    steps: dict[str, Any] = {}
    for axis in ("one", *MeshShape._fields):
        mesh = "" if axis == "one" else f"{axis}={count}"
        words = [*sizes.repeated.flags, "--mesh", mesh]
        found = bench.figures("train.speed", [*words, "--steps", sizes.steps], environment)
        plan = json.loads(bench.child("train.plan", [*words, "--gpu", bench.gpu, "--json"]))
        steps[mesh or "one"] = found | {"plan": plan}
    return {"devices": count, "steps": steps, "runs": runs(count, bench, environment)}


def runs(count: int, bench: Bench, environment: dict[str, str]) -> dict[str, Any]:
    """The bundled sample's first steps, by one card, by one process and by one process a card."""
    model = bench.place / "sample"
    bench.child("convert.from_meta", [bundled.SAMPLE, model])
    flags = [
        "--model", model, "--data", bundled.ROWS, "--precision", "fp32", "--lora-dropout", 0,
        "--max-steps", STEPS,
    ]  # fmt: skip
    alone = ["--mesh", "data=1", "--micro-batch-size", 2 * count]
    dealt = ["--mesh", f"fsdp={count}", "--micro-batch-size", 2]
    launch = ["-n", count, "--", "train"]
    ways: dict[str, tuple[str, list[Any], dict[str, str]]] = {
        "one card": ("train.lora", alone, {}),
        "one process": ("train.lora", dealt, environment),
        "a process each": ("train.processes.launch", [*launch, *dealt], {}),
    }
    found: dict[str, Any] = {}
    for name, (module, words, more) in ways.items():
        run = bench.place / name
        bench.child(module, [*words, *flags, "--output-dir", run], more)
        lines = [line for line in RunFolder(run).read_metrics().values if "step_seconds" in line]
        found[name] = {
            "losses": [line["loss"] for line in lines],
            "tokens_per_second": lines[-1]["tokens_per_second"],
        }
    return found
