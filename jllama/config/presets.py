"""The sizes of published models, by the names that `--model` and `plan` know."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jllama.config.llama import LlamaConfig, RopeScaling

# Field order: dim, layers, heads, kv heads, hidden, vocabulary. Sources: Meta's params.json files;
# `sample` is the bundled one.
_LLAMA_1: dict[str, Any] = {"norm_eps": 1e-6, "max_seq_len": 2048}
_LLAMA_3: dict[str, Any] = {"rope_theta": 500000.0, "max_seq_len": 8192}
_LLAMA_31: dict[str, Any] = {
    "rope_theta": 500000.0,
    "max_seq_len": 131072,
    "rope_scaling": RopeScaling(8.0),
}
_LLAMA_32 = _LLAMA_31 | {"rope_scaling": RopeScaling(32.0), "tied": True}

PRESETS: Mapping[str, LlamaConfig] = MappingProxyType(
    {
        "sample": LlamaConfig(128, 4, 4, 2, 344, 2048),
        "llama-7b": LlamaConfig(4096, 32, 32, 32, 11008, 32000, **_LLAMA_1),
        "llama-13b": LlamaConfig(5120, 40, 40, 40, 13824, 32000, **_LLAMA_1),
        "llama-33b": LlamaConfig(6656, 60, 52, 52, 17920, 32000, **_LLAMA_1),
        "llama-65b": LlamaConfig(8192, 80, 64, 64, 22016, 32000, max_seq_len=2048),
        "llama-2-7b": LlamaConfig(4096, 32, 32, 32, 11008, 32000),
        "llama-2-13b": LlamaConfig(5120, 40, 40, 40, 13824, 32000),
        "llama-2-70b": LlamaConfig(8192, 80, 64, 8, 28672, 32000),
        "llama-3-8b": LlamaConfig(4096, 32, 32, 8, 14336, 128256, **_LLAMA_3),
        "llama-3-70b": LlamaConfig(8192, 80, 64, 8, 28672, 128256, **_LLAMA_3),
        "llama-3.1-8b": LlamaConfig(4096, 32, 32, 8, 14336, 128256, **_LLAMA_31),
        "llama-3.1-70b": LlamaConfig(8192, 80, 64, 8, 28672, 128256, **_LLAMA_31),
        "llama-3.1-405b": LlamaConfig(16384, 126, 128, 8, 53248, 128256, **_LLAMA_31),
        "llama-3.2-1b": LlamaConfig(2048, 16, 32, 8, 8192, 128256, **_LLAMA_32),
        "llama-3.2-3b": LlamaConfig(3072, 28, 24, 8, 8192, 128256, **_LLAMA_32),
    }
)
