"""`python -m eval.speed generate`: how fast answers come, and how a peer gives them.

    python -m eval.speed generate --random 110m --peer transformers --output FILE
    python -m eval.speed generate --random 110m --peer llama.cpp --rounds 5 --output FILE

Greedy, each side in a process of its own, from the same weights, on the same card or the same
number of cores. A figure is the median of several repeats after a warm-up, and of the rounds in
which the sides take turns. Both sides also measure
the bandwidth: each negates 256 MiB (on a card 1 GiB, ten times) in place, read and written bytes
counted, and the faster is the machine's. The fraction of it that is used is bytes of weights read
per decoded token, times tokens per second and row.
"""

import base64
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from eval.speed.llama_cpp import DTYPES, check_llama_cpp
from eval.speed.peft_training import Job as TrainingJob
from eval.speed.side import Job
from eval.speed.torch_models import Device
from jllama import bundled
from jllama.cli import children
from jllama.cli.terminal import console, show_table
from jllama.config import LlamaConfig, Precision, tensor_shapes
from jllama.errors import AtLeast1, AtLeast2, InputError, checked
from jllama.folders.files import room_for, whole_folder
from jllama.folders.json_files import read_json, write_json
from jllama.folders.model import ModelWriter, read_config
from jllama.machine import available_cores, measured_here
from jllama.text.tokenizer_file import FILE_NAME

# Shown of each side: title, figure, factor, unit.
ROWS = (
    ("decoding", "decode_tokens_per_second", 1, "tokens/s"),
    ("prompt", "prompt_tokens_per_second", 1, "tokens/s"),
    ("first token", "seconds_to_first_token", 1000, "ms"),
    ("peak memory", "peak_memory_mib", 1, "MiB"),
    ("measured bandwidth", "measured_bandwidth_gb_per_second", 1, "GB/s"),
    ("used for weights", "fraction_of_bandwidth", 100, "%"),
)
RATIOS = ("decode_tokens_per_second", "prompt_tokens_per_second", "peak_memory_mib")
RandomSize = Literal["60m", "110m"]
# Fields: dim, layers, heads, kv heads, hidden, vocabulary. 110m has the sizes of tinyllamas' 110M.
RANDOM: dict[RandomSize, LlamaConfig] = {
    "60m": LlamaConfig(512, 8, 8, 8, 1376, 32000, max_seq_len=1024),
    "110m": LlamaConfig(768, 12, 12, 12, 2048, 32000, tied=True, max_seq_len=1024),
}
# A token for each byte, and one to merge: a GGUF file has to have a tokenizer, though ids go in and
# come out.
BYTES = b"".join(
    base64.b64encode(token) + b" %d\n" % rank
    for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), b"th"])
)


@checked
class GenerateSpeed:
    """Measure generation: prompt and decode tokens per second, time to first token, memory."""

    model: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DIR ...")] = (bundled.MODEL,)
    """Model folders; the bundled sample is converted where it has no folder yet."""
    random: tuple[RandomSize, ...] = ()
    """Also a random model of this size, made for the occasion."""
    precision: Precision = "fp32"
    """Dtype of weights and activations."""
    batch_size: AtLeast1 = 1
    """Prompts answered together."""
    prompt_tokens: AtLeast1 = 32
    """Length of every prompt; its ids are random."""
    new_tokens: AtLeast2 = 200
    """Length of every answer."""
    threads: AtLeast1 = 2
    """Cores of each side, unless there is a GPU."""
    peer: Literal["transformers", "llama.cpp"] | None = None
    """Also run the same weights there, and compare."""
    repeats: AtLeast1 = 5
    """Timed calls; the median counts."""
    rounds: AtLeast1 = 1
    """Times that the sides take turns, in new processes; the medians count."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """JSON file for the figures."""

    def __post_init__(self):
        if not self.model and not self.random:
            raise InputError(
                "no model to measure; name a folder with --model or a size with --random"
            )


def measure_generation(config: GenerateSpeed) -> None:
    """Measures every model and shows, and if asked writes, the figures."""
    check_cores(config.threads)
    on = device()
    if config.peer == "llama.cpp":
        check_llama_cpp(on, config.batch_size)
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, folder in folders(config, Path(place)):
            found[name] = measure_model(config, folder, Path(place), on)
            show(name, found[name])
    if config.output:
        content = {
            **measured_here("speed"),
            "load_average_before": load_average,
            "settings": asdict(config),
            "models": found,
        }
        write_json(Path(config.output), content)
        console.print(f"wrote {config.output}")


def check_cores(threads: int) -> None:
    """Refuses more than there are."""
    if threads > (cores := available_cores()):
        raise InputError(f"--threads {threads}, but this process may use {cores} cores")


def device() -> Device:
    """What JAX runs on; asked of another process, for this one is to take no GPU."""
    return "cpu" if children.run("jllama.machine", []).strip() == "cpu" else "gpu"


def folders(config: GenerateSpeed, place: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder of each model, in turn; made in `place` where there is none."""
    for name in config.model:
        yield name, bundled.model_folder(name, place)
    for size in config.random:
        yield f"random {size}", write_random(place / size, RANDOM[size], tokenizer=BYTES)


def write_random(
    folder: Path, config: LlamaConfig, seed: int = 0, tokenizer: bytes | None = None
) -> Path:
    """A random fp32 model folder, the same for the same seed, with logits of order one."""
    draw = np.random.default_rng(seed)

    def tensor(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return draw.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)

    with room_for(4 * config.parameter_count, folder), whole_folder(folder) as partial:
        writer = ModelWriter(partial, config, f"random, seed {seed}")
        for block, shapes in tensor_shapes(config).items():
            writer.write_block(block, {name: tensor(shape) for name, shape in shapes.items()})
        writer.finish({} if tokenizer is None else {FILE_NAME: tokenizer})
    return folder


def measure_model(config: GenerateSpeed, folder: Path, place: Path, on: Device) -> dict[str, Any]:
    """The figures of each side; with a peer also whether the ids agree, and the ratios."""
    model = read_config(folder)
    length = config.prompt_tokens + config.new_tokens
    if length > model.max_seq_len:
        raise InputError(
            f"{folder}: context {model.max_seq_len}, but --prompt-tokens and --new-tokens are "
            f"{length} together; ask for less"
        )
    shape = (config.batch_size, config.prompt_tokens)
    prompts = np.random.default_rng(0).integers(0, model.vocab_size, shape).tolist()
    sides = {"jllama": folder}
    if config.peer:
        sides[config.peer] = _exported(config, folder, place)
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(config.rounds):
        for side, source in sides.items():
            job = Job(
                side=side,
                model=str(source),
                precision=config.precision,
                prompts=prompts,
                new_tokens=config.new_tokens,
                threads=config.threads if on == "cpu" else 0,
                repeats=config.repeats,
                device=on,
                output=str(place / f"{side}.json"),
            )
            rounds[side].append(run_side("eval.speed.side", job, place))
    figures = {side: medians(found) for side, found in rounds.items()}
    answers = {side: figure.pop("ids") for side, figure in figures.items()}
    bandwidth = 1e9 * max(x["measured_bandwidth_gb_per_second"] for x in figures.values())
    for figure in figures.values():
        steps = figure["decode_tokens_per_second"] / config.batch_size
        figure["fraction_of_bandwidth"] = figure["weight_bytes_per_token"] * steps / bandwidth
    found: dict[str, Any] = {"parameters": model.parameter_count, "figures": figures}
    if config.peer:
        found["ids"] = compare_ids(answers["jllama"], answers[config.peer])
        found["ratio"] = ratios(figures["jllama"], figures[config.peer])
    return found


def _exported(config: GenerateSpeed, folder: Path, place: Path) -> Path:
    """The same weights as the peer reads them."""
    out = Path(tempfile.mkdtemp(dir=place))
    if config.peer == "llama.cpp":
        more = ["--dtype", DTYPES[config.precision]]
        children.run("convert.to_gguf", [folder, out / "model.gguf", *more])
        return out / "model.gguf"
    children.run("convert.to_hf", [folder, out / "hf"])
    return out / "hf"


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure over the rounds; what is no figure is the first round's, and all are kept."""
    if len(rounds) == 1:
        return rounds[0]
    found = {
        name: statistics.median(figures[name] for figures in rounds)
        if isinstance(first, float)
        else first
        for name, first in rounds[0].items()
    }
    kept = ({name: x for name, x in figures.items() if isinstance(x, float)} for figures in rounds)
    return {**found, "rounds": list(kept)}


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Ours over theirs."""
    return {figure: ours[figure] / theirs[figure] for figure in RATIOS}


def compare_ids(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Whether two sides' answers agree, and where not, the first difference.

    [[5 6 7]], [[5 6 7]]  ->  {"equal": True}
    [[5 6 7]], [[5 8 7]]  ->  {"equal": False, "row": 0, "token": 1, "jllama": 6, "peer": 8}
    """
    for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for token, (a, b) in enumerate(zip(mine, other, strict=True)):
            if a != b:
                return {"equal": False, "row": row, "token": token, "jllama": a, "peer": b}
    return {"equal": True}


def run_side(module: str, job: Job | TrainingJob, place: Path) -> dict[str, Any]:
    """Runs one side in a process of its own and reads its figures."""
    task = place / "job.json"
    write_json(task, asdict(job))
    children.run(module, [task])
    return read_json(Path(job.output))


def show(name: str, found: dict[str, Any]) -> None:
    """A table of the sides, a line on the ids and one with the ratio."""
    figures = found["figures"]
    caches = {side: f" ({x['cache']} cache)" for side, x in figures.items() if "cache" in x}
    show_table(
        [name, *(side + caches.get(side, "") for side in figures)],
        [
            [title, *(f"{scale * x[figure]:,.1f} {unit}" for x in figures.values())]
            for title, figure, scale, unit in ROWS
        ],
    )
    if ids := found.get("ids"):
        console.print(
            "the same greedy ids"
            if ids["equal"]
            else f"ids differ first in row {ids['row']} at new token {ids['token']}: "
            f"jllama {ids['jllama']}, peer {ids['peer']}"
        )
        ratio = found["ratio"]["decode_tokens_per_second"]
        console.print(f"jllama decodes {ratio:.2f}x as fast")
        says = figures.get("llama.cpp", {}).get("says_decode_tokens_per_second")
        if says is not None:
            console.print(f"llama.cpp itself says that it decodes {says:,.1f} tokens/s")
