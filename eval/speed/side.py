"""One side of `python -m eval.speed generate`, alone in its process: a job in, figures out.

    python -m eval.speed.side JOB.json     {"side": "jllama", "folder": "models/sample", ...}

What only one side needs is imported by that side: its process holds nothing of the other.
"""

import functools
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jllama.machine import process_memory_mib

STREAMED = 2**26  # numbers negated in place to measure bandwidth: 256 MiB, more than any cache


@dataclass(frozen=True)
class Job:
    """What one side has to do; every side gets the same but for its name and folder.

    Attributes:
        folder: of the model, in the form that this side reads.
        prompts: ids `[B, T]`, all of one length.
        output: JSON file for the figures.
    """

    side: str
    folder: str
    precision: str
    prompts: list[list[int]]
    new_tokens: int
    threads: int
    repeats: int
    output: str


class Opened(NamedTuple):
    """A loaded model, warmed up.

    Attributes:
        generate: new tokens asked for -> the new ids of every prompt, greedy.
        streamer: makes a call that reads and writes `STREAMED` fp32 numbers on the model's device.
        weights: bytes that a decoded token reads: all but the table of embeddings, of which it
            reads one row (a tied table is read whole, as the head).
        facts: what else to write down.
    """

    generate: Callable[[int], list[list[int]]]
    streamer: Callable[[], Callable[[], Any]]
    weights: int
    facts: dict[str, Any]


def limit_threads(threads: int) -> None:
    """Ties this process, and every thread it starts from now on, to so many cores."""
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def measure(job: Job, opened: Opened) -> dict[str, Any]:
    """Medians of the repeats: a call for one token and one for all; the difference is decoding.

    The bandwidth is measured last, for its buffers would count as peak memory.
    """
    firsts, rests, ids = [], [], opened.generate(job.new_tokens)
    for _ in range(job.repeats):
        firsts.append(seconds(opened.generate, 1))
        rests.append(seconds(opened.generate, job.new_tokens) - firsts[-1])
    peak = process_memory_mib()
    stream = opened.streamer()
    stream()
    bandwidth = 2 * 4 * STREAMED / statistics.median(seconds(stream) for _ in range(5))
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
    from jllama.machine import use_private_compilation_cache

    use_private_compilation_cache()
    model = jllama.load_model(job.folder, job.precision)  # type: ignore[arg-type]
    greedy = jllama.Sampling(temperature=0.0)

    def generate(new_tokens: int) -> list[list[int]]:
        return jllama.generate(model, job.prompts, new_tokens, greedy)

    def streamer() -> Callable[[], Any]:
        # In place, or the time would be that of the system's handing out new memory.
        negative = jax.jit(jnp.negative, donate_argnums=0)
        held = [jnp.ones(STREAMED, jnp.float32)]
        return lambda: held.append(negative(held.pop()).block_until_ready())

    warm_up(generate, job)
    config = model.config
    read = config.parameter_count - (0 if config.tied else config.vocab_size * config.dim)
    return Opened(
        generate,
        streamer,
        read * jnp.dtype(jllama.config.PRECISIONS[job.precision]).itemsize,  # type: ignore[index]
        {
            "platform": jax.default_backend(),
            "versions": {"jax": jax.__version__, "flax": flax.__version__},
        },
    )


def open_transformers(job: Job) -> Opened:
    """`LlamaForCausalLM.generate`, with the cache that is the faster here."""
    # By name, for torch is imported nowhere outside convert/ (tests/test_layout.py).
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    torch.set_num_threads(job.threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM.from_pretrained(
        job.folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[job.precision]
    ).eval()
    model.generation_config.eos_token_id = None  # neither side stops early
    prompts = torch.tensor(job.prompts)

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

    tried = {}
    for cache in ("dynamic", "static"):
        generate = functools.partial(generate_with, cache)
        warm_up(generate, job)
        tried[cache] = min(seconds(generate, job.new_tokens) for _ in range(2))
    cache = min(tried, key=lambda name: tried[name])

    def streamer() -> Callable[[], Any]:
        return torch.ones(STREAMED).neg_

    tables = () if model.config.tie_word_embeddings else ("model.embed_tokens.weight",)
    return Opened(
        functools.partial(generate_with, cache),
        streamer,
        sum(x.nbytes for name, x in model.named_parameters() if name not in tables),
        {
            "platform": "cpu",
            "cache": cache,
            "seconds_of_each_cache": tried,
            "versions": {
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            },
        },
    )


SIDES = {"jllama": open_jllama, "transformers": open_transformers}


def warm_up(generate: Callable[[int], Any], job: Job) -> None:
    """Both calls that are timed later: everything is compiled and allocated once."""
    generate(1)
    generate(job.new_tokens)


def seconds(call: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def main(path: str) -> None:
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    limit_threads(job.threads)
    figures = measure(job, SIDES[job.side](job))
    figures["versions"] |= {"python": sys.version.split()[0], "numpy": np.__version__}
    Path(job.output).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
