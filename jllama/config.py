"""What a LLaMA is, in numbers: sizes and shapes, the adapter's settings, precisions, remats."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
from pydantic import Field

from jllama.errors import AtLeast1, InputError, Positive, Share, checked
from jllama.names import EMBEDDINGS, NORM, OUTPUT, linear_names

MAX_LAYERS = 1000  # of any LLaMA, with much room; a file that states a billion is an attack

# The dtype of activations. Adapters, optimizer moments, norm statistics, softmax and loss are fp32
# in both. A frozen weight is stored in the same dtype, unless its own type says otherwise
# (`jllama.layers.Weight`).
Precision = Literal["bf16", "fp32"]
PRECISIONS: Mapping[str, Any] = MappingProxyType(
    {"bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32)}
)

# What is recomputed in the backward pass:
#   none     nothing
#   dots     all but the results of matmuls and of attention
#   offload  all but the results of matmuls, which wait in the host's memory
#   ffn      ffn_norm + feed_forward
#   block    whole blocks
Remat = Literal["none", "dots", "offload", "ffn", "block"]


@checked
class RopeScaling:
    """Llama 3.1's stretching of the rotary embedding.

    Wavelengths above `original_context / low_frequency_factor` are slowed `factor` times, those
    below `original_context / high_frequency_factor` stay, and the ones between are blended.
    """

    factor: Positive = 8.0
    low_frequency_factor: Positive = 1.0
    high_frequency_factor: Positive = 4.0
    original_context: AtLeast1 = 8192


@checked
class LlamaConfig:
    """The sizes of one model; complete, checked once, and the same for every family."""

    dim: AtLeast1
    n_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    n_heads: AtLeast1
    n_kv_heads: AtLeast1
    hidden_dim: AtLeast1
    vocab_size: AtLeast1
    norm_eps: Positive = 1e-5
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    ffn_bias: bool = False
    max_seq_len: AtLeast1 = 4096

    def __post_init__(self):
        if self.dim % self.n_heads:
            raise InputError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head size {self.head_dim} is odd; rotary embedding needs pairs")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def parameter_count(self) -> int:
        """The number of base weights; tied matrices count once."""
        weights = sum(
            math.prod(shape) for block in tensor_shapes(self).values() for shape in block.values()
        )
        biases = self.n_layers * (2 * self.hidden_dim + self.dim)
        return weights + (biases if self.ffn_bias else 0)

    def rotary_heads(self, linear: str) -> int | None:
        """Of how many heads the rows of `layers.0.attention.wq` are rotary pairs; None for none."""
        return {"wq": self.n_heads, "wk": self.n_kv_heads}.get(linear.rpartition(".")[2])


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """`[out, in]` of the seven linears of a block, by Meta's names."""
    return {
        "wq": (config.dim, config.dim),
        "wk": (config.kv_dim, config.dim),
        "wv": (config.kv_dim, config.dim),
        "wo": (config.dim, config.dim),
        "w1": (config.hidden_dim, config.dim),
        "w2": (config.dim, config.hidden_dim),
        "w3": (config.hidden_dim, config.dim),
    }


def tensor_shapes(config: LlamaConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """What a model folder holds: block -> tensor -> shape, in Meta's names.

    Biases are not listed: no published file has any.
    """
    linears = linear_shapes(config)
    layer: dict[str, tuple[int, ...]] = {
        **{f"attention.{name}": linears[name] for name in ("wq", "wk", "wv", "wo")},
        **{f"feed_forward.{name}": linears[name] for name in ("w1", "w2", "w3")},
        "attention_norm": (config.dim,),
        "ffn_norm": (config.dim,),
    }
    table = (config.vocab_size, config.dim)
    head: dict[str, tuple[int, ...]] = {NORM: (config.dim,)}
    if not config.tied:
        head[OUTPUT] = table
    blocks: dict[str, dict[str, tuple[int, ...]]] = {"embeddings": {EMBEDDINGS: table}}
    for index in range(config.n_layers):
        blocks[f"layers.{index}"] = {
            f"layers.{index}.{name}.weight": shape for name, shape in layer.items()
        }
    return blocks | {"head": head}


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
        "llama-3.2-1b": LlamaConfig(2048, 16, 32, 8, 8192, 128256, **_LLAMA_32),
        "llama-3.2-3b": LlamaConfig(3072, 28, 24, 8, 8192, 128256, **_LLAMA_32),
    }
)


@checked
class LoraConfig:
    """Rank, scale, input dropout and the linears that get an adapter.

    The scale is alpha / rank, with rsLoRA alpha / sqrt(rank) (Kalajdzievski, 2023). DoRA (Liu et
    al., 2024) adds a learned magnitude for every output.
    """

    rank: AtLeast1 = 16
    alpha: Positive = 32.0
    dropout: Share = 0.05
    targets: tuple[str, ...] = ("wq", "wv")
    rslora: bool = False
    dora: bool = False

    def __post_init__(self):
        object.__setattr__(self, "targets", linear_names(",".join(self.targets)))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def shapes(self, config: LlamaConfig) -> dict[str, tuple[int, ...]]:
        """The adapter's arrays by name: `layers.0.attention.wq.lora.a` `[R, in]`, `.b` `[out, R]`.

        DoRA adds `.magnitude` `[out]`.
        """
        found: dict[str, tuple[int, ...]] = {}
        for block in tensor_shapes(config).values():
            for tensor, shape in block.items():
                linear = tensor.removesuffix(".weight")
                if linear.rpartition(".")[2] in self.targets:
                    outs, ins = shape
                    found |= {f"{linear}.lora.a": (self.rank, ins)}
                    found |= {f"{linear}.lora.b": (outs, self.rank)}
                    found |= {f"{linear}.lora.magnitude": (outs,)} if self.dora else {}
        return found

    def parameter_count(self, config: LlamaConfig) -> int:
        """rank * (in + out) for every adapted linear, with DoRA + out."""
        return sum(math.prod(shape) for shape in self.shapes(config).values())
