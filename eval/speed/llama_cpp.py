"""llama.cpp as a side of `python -m eval.speed generate`, out of the package `xllamacpp`.

Its server runs inside the process and is asked over HTTP, a request for a call: a prompt's ids go
in, the new ids come out together at the end. Decoding is timed as on the other sides; what
llama.cpp itself says of it stands beside, so that the requests' own cost can be seen.
"""

import importlib
import importlib.util
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jllama.errors import InputError
from jllama.machine import installed_version

DTYPES = {"fp32": "f32", "bf16": "bf16"}  # of the GGUF file, by precision


def check_llama_cpp(device: str, batch_size: int) -> None:
    """Refuses what this side cannot do, before anything is measured."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise InputError(
            "--peer llama.cpp needs xllamacpp, which is not installed: pip install xllamacpp"
        )
    if device != "cpu":
        raise InputError("--peer llama.cpp runs on a CPU; set JAX_PLATFORMS=cpu to compare there")
    if batch_size > 1:
        raise InputError(f"--peer llama.cpp answers one prompt at a time, not {batch_size}")


class Server:
    """A GGUF file, loaded and warm.

    Args:
        context: tokens of a prompt and its answer together.
        exact: keys and values in fp32; else in llama.cpp's own choice, F16.
    """

    def __init__(self, file: Path, context: int, threads: int, *, exact: bool):
        peer: Any = importlib.import_module("xllamacpp")
        params = peer.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = 0
        if exact:
            params.cache_type_k = params.cache_type_v = peer.ggml_type.GGML_TYPE_F32
        self._server = peer.Server(params)
        self.told: dict[str, float] = {}

    def generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The likeliest new ids; no end token is among them."""
        asked = {
            "prompt": prompt, "n_predict": new_tokens, "temperature": 0.0, "ignore_eos": True,
            "samplers": ["temperature"], "cache_prompt": False, "return_tokens": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self._server.listening_address}/completion",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            said = json.load(answer)
        self.told = said["timings"]
        return said["tokens"]


def weight_bytes(file: Path) -> int:
    """What a decoded token reads: all but a table of embeddings that is not the head, too."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    table = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    return sum(sizes.values()) - table


def streamer(numbers: int, passes: int) -> Callable[[], Any]:
    """A call that reads and writes so many fp32 numbers `passes` times, on one core."""
    held = np.ones(numbers, np.float32)

    def stream() -> None:
        for _ in range(passes):
            np.negative(held, out=held)

    return stream


def versions() -> dict[str, str]:
    """Of the package, and what its build of llama.cpp uses of the processor."""
    peer: Any = importlib.import_module("xllamacpp")
    return {
        "xllamacpp": installed_version("xllamacpp"),
        "llama.cpp": " ".join(peer.get_system_info().split()),
    }
