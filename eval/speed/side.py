"""One side of `python -m eval.speed generate`, alone in its process: a job in, figures out.

    python -m eval.speed.side JOB.json     {"side": "jllama", "model": "models/sample", ...}

What only one side needs is imported by that side: its process holds nothing of the other.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from eval.speed import torch_models
from eval.speed.torch_models import Device
from jllama.folders.json_files import read_json, write_json
from jllama.machine import use_cores

# fp32 numbers negated in place to measure bandwidth, and how often in a row: 256 MiB, more than
# any cache; on a card 1 GiB ten times, for one pass is over before it can be timed.
STREAMED: dict[Device, tuple[int, int]] = {"cpu": (2**26, 1), "gpu": (2**28, 10)}
Adapters = Literal["none", "unmerged", "merged"]


@dataclass(frozen=True)
class Job:
    """What one side has to do; every side gets the same but for its name and model.

    Attributes:
        model: folder in the form that this side reads, or a preset, whose weights are then random.
        prompts: ids `[B, T]`, all of one length.
        threads: cores to run on; 0 takes all.
        device: that JAX runs on, and the peer too.
        output: JSON file for the figures.
        adapters: of rank 16 on wq and wv, beside the weights or folded into them.
    """

    side: str
    model: str
    precision: str
    prompts: list[list[int]]
    new_tokens: int
    threads: int
    repeats: int
    device: Device
    output: str
    adapters: Adapters = "none"


class Opened(NamedTuple):
    """A loaded model, warmed up.

    Attributes:
        generate: new tokens asked for -> the new ids of every prompt, greedy.
        streamer: makes a call that reads and writes what `STREAMED` says on the model's device.
        peak: MiB of the card's memory, on a CPU of the process, used so far at most.
        weights: bytes that a decoded token reads: all but the table of embeddings, of which it
            reads one row (a tied table is read whole, as the head).
        facts: what else to write down.
    """

    generate: Callable[[int], list[list[int]]]
    streamer: Callable[[int, int], Callable[[], Any]]
    peak: Callable[[], float]
    weights: int
    facts: dict[str, Any]


def measure(job: Job, opened: Opened) -> dict[str, Any]:
    """Medians of the repeats: a call for one token and one for all; the difference is decoding.

    The bandwidth is measured last, for its buffers would count as peak memory.
    """
    firsts, rests, ids = [], [], opened.generate(job.new_tokens)
    for _ in range(job.repeats):
        firsts.append(seconds(opened.generate, 1))
        rests.append(seconds(opened.generate, job.new_tokens) - firsts[-1])
    peak = opened.peak()
    numbers, passes = STREAMED[job.device]
    stream = opened.streamer(numbers, passes)
    stream()
    streaming = statistics.median(seconds(stream) for _ in range(5))
    bandwidth = 2 * 4 * numbers * passes / streaming
    first, rest, rows = statistics.median(firsts), statistics.median(rests), len(job.prompts)
    return {
        "decode_tokens_per_second": rows * (job.new_tokens - 1) / rest,
        "prompt_tokens_per_second": rows * len(job.prompts[0]) / first,
        "seconds_to_first_token": first,
        "peak_memory_mib": peak,
        "weight_bytes_per_token": opened.weights,
        "measured_bandwidth_gb_per_second": bandwidth / 1e9,
        "repeats": {"seconds_to_first_token": firsts, "seconds_of_decoding": rests},
        **opened.facts,
        "ids": ids,
    }


def open_jllama(job: Job) -> Opened:
    """`jllama.generate`, as a user calls it."""
    import flax
    import jax
    import jax.numpy as jnp

    import jllama
    from eval.speed.ceilings import streamer
    from jllama.config import PRECISIONS, PRESETS, LoraConfig
    from jllama.folders.load import random_model
    from jllama.lora import adapted_linears, attach, merge
    from jllama.machine import (
        pass_over_absent_gpu,
        peak_memory_mib,
        use_private_compilation_cache,
    )

    pass_over_absent_gpu()
    use_private_compilation_cache()
    precision: Any = job.precision
    if job.model in PRESETS:
        model = random_model(PRESETS[job.model], precision)
    else:
        model = jllama.load_model(job.model, precision)
    if job.adapters != "none":
        attach(model, LoraConfig(), jax.random.key(0))
        for linear in adapted_linears(model).values():
            linear.lora.b[...] = jnp.full_like(linear.lora.b[...], 1e-3)  # B = 0 adds nothing
    if job.adapters == "merged":
        merge(model)
    greedy = jllama.Sampling(temperature=0.0)

    def generate(new_tokens: int) -> list[list[int]]:
        return jllama.generate(model, job.prompts, new_tokens, greedy)

    warm_up(generate, job)
    config = model.config
    read = config.parameter_count - (0 if config.tied else config.vocab_size * config.dim)
    return Opened(
        generate,
        streamer,
        peak_memory_mib,
        read * jnp.dtype(PRECISIONS[precision]).itemsize,
        {
            "platform": jax.default_backend(),
            "adapters": job.adapters,
            "versions": {"jax": jax.__version__, "flax": flax.__version__},
        },
    )


def open_transformers(job: Job) -> Opened:
    """`LlamaForCausalLM.generate`, with the cache that is the faster here.

    On a card `generate` compiles the step by itself where the cache is static.
    """
    torch, _ = torch_models.open_torch(job.device, job.threads)
    model = torch_models.load(job.model, job.precision, job.device).eval()
    model.generation_config.eos_token_id = None  # neither side stops early
    prompts = torch.tensor(job.prompts, device=torch_models.place(job.device))

    def generate_with(cache: str, new_tokens: int) -> list[list[int]]:
        with torch.inference_mode():
            ids = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                pad_token_id=0,
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                cache_implementation=cache,
            )
        return ids[:, prompts.shape[1] :].tolist()

    tried: dict[str, float] = {}
    failed: dict[str, str] = {}
    for cache in ("dynamic", "static"):
        generate = functools.partial(generate_with, cache)
        try:
            warm_up(generate, job)
            tried[cache] = min(seconds(generate, job.new_tokens) for _ in range(2))
        except Exception as error:  # of whatever compiles it: the other cache may do
            failed[cache] = f"{type(error).__name__}: {error}"[:500]
    if not tried:
        raise RuntimeError(f"no cache works: {failed}")
    cache = min(tried, key=lambda name: tried[name])

    tables = () if model.config.tie_word_embeddings else ("model.embed_tokens.weight",)
    return Opened(
        functools.partial(generate_with, cache),
        functools.partial(torch_models.streamer, job.device),
        functools.partial(torch_models.peak_memory_mib, job.device),
        sum(x.nbytes for name, x in model.named_parameters() if name not in tables),
        {
            "platform": job.device,
            "cache": cache,
            "seconds_of_each_cache": tried,
            "caches_that_failed": failed,
            "versions": torch_models.versions(),
        },
    )


def open_llama_cpp(job: Job) -> Opened:
    """llama.cpp on a GGUF file."""
    from eval.speed import llama_cpp
    from jllama.machine import process_memory_mib

    (prompt,) = job.prompts
    server = llama_cpp.Server(
        Path(job.model), len(prompt) + job.new_tokens, job.threads, exact=job.precision == "fp32"
    )

    def generate(new_tokens: int) -> list[list[int]]:
        return [server.generate(prompt, new_tokens)]

    warm_up(generate, job)
    return Opened(
        generate,
        llama_cpp.streamer,
        process_memory_mib,
        llama_cpp.weight_bytes(Path(job.model)),
        {
            "platform": "cpu",
            "says_decode_tokens_per_second": server.told["predicted_per_second"],
            "versions": llama_cpp.versions(),
        },
    )


SIDES = {
    "jllama": open_jllama,
    "transformers": open_transformers,
    "llama.cpp": open_llama_cpp,
}


def warm_up(generate: Callable[[int], Any], job: Job) -> None:
    """Both calls that are timed later: everything is compiled and allocated once."""
    generate(1)
    generate(job.new_tokens)


def seconds(call: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def main(path: str) -> None:
    job = Job(**read_json(Path(path)))
    if job.threads:
        use_cores(job.threads)
    figures = measure(job, SIDES[job.side](job))
    figures["versions"] |= {"python": sys.version.split()[0], "numpy": np.__version__}
    write_json(Path(job.output), figures)


if __name__ == "__main__":
    main(sys.argv[1])
