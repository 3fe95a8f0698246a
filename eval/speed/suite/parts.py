"""What `python -m eval.speed suite` measures: a list of parts, each of a few child processes.

ceilings                    bytes copied and operations of matmuls a second
train-4x4096-none           tokens/s, planned and measured peak memory, time by class of kernel
generate-1, -unmerged       decoding, with the adapters merged and beside the weights
peer-train-..., peer-generate-...    the same with `transformers` and `peft`
repeat, repeat-deterministic         20 steps in two processes; the first one starts cold
start                       `jllama train` on the bundled sample to its first step
devices                     where there are several cards: each mesh, and a process for each
plans                       what `jllama plan` says of all of them, without a card
"""

import json
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from eval.speed.peft_training import Job as TrainingJob
from eval.speed.side import Adapters
from eval.speed.side import Job as GenerationJob
from eval.speed.suite.bench import Bench
from eval.speed.suite.devices import devices
from eval.speed.suite.settings import Setting, Sizes
from jllama import bundled
from jllama.cli.card import PLAN_EXTRA
from jllama.config import PRESETS
from jllama.folders.run import RunFolder
from jllama.machine import available_cores
from jllama.names import linear_names

PEER = ("torch", "transformers", "peft")


class Measure(Protocol):
    """Runs children and gives the figures of a part."""

    def __call__(self, bench: Bench) -> dict[str, Any]: ...


class Part(NamedTuple):
    """One file of figures.

    Attributes:
        needs: packages without which the part is skipped.
        device: whether it measures one; a plan does not.
    """

    name: str
    measures: str
    run: Measure
    needs: tuple[str, ...] = ()
    device: bool = True


def parts(sizes: Sizes) -> Iterator[Part]:
    """All parts, the most telling first."""
    yield Part(
        "ceilings", "bytes copied and operations of matmuls a second", partial(ceilings, sizes)
    )
    for setting in sizes.training:
        words = f"training {setting.model}, {setting.name}: time and memory"
        yield Part(f"train-{setting.name}", words, partial(train, sizes, setting))
    kinds: tuple[tuple[str, Adapters], ...] = (("", "merged"), ("-unmerged", "unmerged"))
    for batch in sizes.batches:
        for suffix, adapters in kinds:
            yield Part(
                f"generate-{batch}{suffix}",
                f"decoding {batch} together, adapters {adapters}",
                partial(generate, sizes, batch, "jllama", adapters),
            )
    for setting in shapes(sizes):
        for suffix, checkpointing in (("-checkpointed", True), ("", False)):
            yield Part(
                f"peer-train-{setting.shape}{suffix}",
                f"the same rows with transformers and peft{', checkpointed' * checkpointing}",
                partial(train_peer, sizes, setting, checkpointing),
                PEER,
            )
    for batch in sizes.batches:
        yield Part(
            f"peer-generate-{batch}",
            f"decoding {batch} together with transformers, the faster of its caches",
            partial(generate, sizes, batch, "transformers", "none"),
            PEER[:2],
        )
    for flags in sizes.repeated_with:
        yield Part(
            "repeat-deterministic" if flags else "repeat",
            f"20 steps in two processes: bit-equal? start cold and warm {flags}".rstrip(),
            partial(repeat, sizes, flags),
        )
    words = "`jllama train` on the bundled sample to its first step, cold and warm"
    yield Part("start", words, start, PEER[:1])
    words = "several cards: the step on every mesh, and the command in a process for each"
    yield Part("devices", words, partial(devices, sizes), PLAN_EXTRA)
    words = "memory and speed that are planned for all of these"
    yield Part("plans", words, partial(plans, sizes), PLAN_EXTRA, device=False)


def shapes(sizes: Sizes) -> Iterator[Setting]:
    """A setting of each shape of rows: what the peer trains, which has no packing."""
    plain = [setting for setting in sizes.training if not setting.packing]
    yield from {setting.shape: setting for setting in plain}.values()


def ceilings(sizes: Sizes, bench: Bench) -> dict[str, Any]:
    job = {"numbers": sizes.copied, "size": sizes.matmul}
    return bench.answer("eval.speed.ceilings", job)


def train(sizes: Sizes, setting: Setting, bench: Bench) -> dict[str, Any]:
    flags = [*setting.flags, "--steps", sizes.steps, *(["--profile"] if setting.profile else [])]
    return bench.figures("train.speed", flags)


def generate(
    sizes: Sizes, batch: int, side: str, adapters: Adapters, bench: Bench
) -> dict[str, Any]:
    shape = (batch, sizes.prompt_tokens)
    vocabulary = PRESETS[sizes.generation].vocab_size
    job = GenerationJob(
        side=side,
        model=sizes.generation,
        precision="bf16",
        prompts=np.random.default_rng(0).integers(0, vocabulary, shape).tolist(),
        new_tokens=sizes.new_tokens,
        threads=0,
        repeats=3,
        device=bench.device,
        output="",
        adapters=adapters,
    )
    found = bench.answer("eval.speed.side", asdict(job))
    found.pop("ids")
    return found


def train_peer(sizes: Sizes, setting: Setting, checkpointing: bool, bench: Bench) -> dict[str, Any]:
    job = TrainingJob(
        model=setting.model,
        precision="bf16",
        checkpointing=checkpointing,
        micro_batch_size=setting.micro_batch_size,
        max_seq_len=setting.max_seq_len,
        lora_targets=linear_names(setting.targets),
        steps=sizes.steps,
        warmup_steps=2,
        threads=0,
        device=bench.device,
        output="",
    )
    return bench.answer("eval.speed.peft_training", asdict(job))


def repeat(sizes: Sizes, flags: str, bench: Bench) -> dict[str, Any]:
    """Twice the same steps, in one new cache of compiled programs: cold, then warm."""
    environment = {"XDG_CACHE_HOME": str(bench.place / "cold")}
    if flags:
        environment["XLA_FLAGS"] = f"{bench.environment.get('XLA_FLAGS', '')} {flags}".strip()
    words = [*sizes.repeated.flags, "--steps", 18]  # and two to warm up
    runs = []
    for _ in range(2):
        started = time.time()
        found = bench.figures("train.speed", words, environment)
        runs.append({"seconds_to_first_step": found["first_step_at"] - started, **found})
    cold, warm = runs
    pairs = zip(cold["losses"], warm["losses"], strict=True)
    return {
        "bit_equal": cold["learned_sha256"] == warm["learned_sha256"],
        "first_different_loss": next((n for n, (a, b) in enumerate(pairs, 1) if a != b), None),
        "cold": cold,
        "warm": warm,
    }


def start(bench: Bench) -> dict[str, Any]:
    """The whole command, as a user calls it; seconds of CPU are of all its threads to its end."""
    folder = bench.place / "sample"
    bench.child("convert.from_meta", [bundled.SAMPLE, folder])
    found = {}
    for name in ("cold", "warm"):
        run = bench.place / f"run-{name}"
        flags = ["--model", folder, "--data", bundled.ROWS, "--max-steps", 1, "--output-dir", run]
        started, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        bench.child("train.lora", flags, {"XDG_CACHE_HOME": str(bench.place / "cold")})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found[name] = {
            "seconds_to_first_step": RunFolder(run).metrics.stat().st_mtime - started,
            "seconds": time.time() - started,
            "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        }
    return found


def plans(sizes: Sizes, bench: Bench) -> dict[str, Any]:
    """The plan of every setting, by its name; `generate-1` has those of prefill and of decode."""
    asked = {f"train-{setting.name}": setting.flags for setting in sizes.training}
    slots = sizes.prompt_tokens + sizes.new_tokens
    for batch in sizes.batches:
        asked[f"generate-{batch}"] = [
            "--for", "generate", "--model", sizes.generation, "--precision", "bf16",
            "--micro-batch-size", batch, "--max-seq-len", slots,
        ]  # fmt: skip

    def plan(flags: list[object]) -> Any:
        return json.loads(bench.child("train.plan", [*flags, "--gpu", bench.gpu, "--json"]))

    with ThreadPoolExecutor(max(1, available_cores() // 2)) as pool:
        return dict(zip(asked, pool.map(plan, asked.values()), strict=True))
