"""What a LLaMA is, in numbers: sizes and shapes, the adapter's settings, precisions, remats."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
from pydantic import Field

from jllama.errors import AtLeast1, InputError, Positive, Share, SizesOf, SomeOf, checked
from jllama.names import EMBEDDINGS, HF_LINEARS, LINEAR_CHOICES, NORM, OUTPUT, linear_names

MAX_LAYERS = 1000  # of any LLaMA, with much room; a file that states a billion is an attack

# The dtype of activations. Adapters, optimizer moments, norm statistics, softmax and loss are fp32
# in both. A frozen weight is stored in the same dtype, unless its own type says otherwise
# (`jllama.layers.Weight`).
Precision = Literal["bf16", "fp32"]
PRECISIONS: Mapping[str, Any] = MappingProxyType(
    {"bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32)}
)

# How a frozen linear of a block is stored: as the model folder has it, or in codes
# (`jllama.quantize`).
Format = Literal["int8", "int4", "nf4"]
BaseChoice = Literal["stored", "int8", "int4", "nf4"]  # what a user names
BaseSkip = Annotated[str, SomeOf((*LINEAR_CHOICES, "none"))]
GROUP = 64  # inputs that share a scale (int4), weights that share an absmax (nf4)
NESTED = 256  # absmax of nf4 that share an absmax

# How several devices are used (`jllama.sharding`).
MESH_AXES = SizesOf(("data", "fsdp", "tensor"))
MeshChoice = Annotated[str, MESH_AXES]  # what a user names

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


@checked
class Base:
    """In what format the linears of the blocks are held, where they are not as they were found."""

    format: Format
    skip: tuple[str, ...] = ()  # linears that stay as they are
    double: bool = True  # nf4: whether the absmax are in 8 bits, too

    def __post_init__(self):
        skip = linear_names(",".join(self.skip)) if self.skip else ()
        object.__setattr__(self, "skip", skip)
        if self.format != "nf4" and not self.double:
            raise InputError(f"{self.format} has no double quantisation to leave out")

    @property
    def entry(self) -> dict[str, Any]:
        """As JSON: {"format": "int4", "skip": ["w2"], "double": true}."""
        return {"format": self.format, "skip": list(self.skip), "double": self.double}

    @classmethod
    def of(cls, entry: Mapping[str, Any] | None) -> "Base | None":
        """The inverse of `entry`; None of None."""
        return None if entry is None else cls(**{**entry, "skip": tuple(entry["skip"])})

    @property
    def words(self) -> str:
        """`nf4 without double quantisation, but for w2`."""
        single = " without double quantisation" if not self.double else ""
        return self.format + single + (f", but for {', '.join(self.skip)}" if self.skip else "")

    def holds(self, name: str) -> bool:
        """Whether the weight `layers.0.attention.wq.weight` is in codes."""
        linear = name.removesuffix(".weight").rpartition(".")[2]
        return linear in HF_LINEARS and linear not in self.skip

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
        """The arrays of a matrix `[out, in]` on disk: name -> shape, dtype.

        Two 4-bit codes are a byte there; in memory they are `[out, in]`.
        """
        rows, width = shape
        if self.format == "int8":
            return {"codes": (shape, "int8"), "scale": ((rows,), "float32")}
        packed = (-(-rows * width // 2),), "uint8"
        if self.format == "int4":
            return {"codes": packed, "scale": ((rows, -(-width // GROUP)), "bfloat16")}
        blocks = -(-rows * width // GROUP)
        if not self.double:
            return {"codes": packed, "absmax": ((blocks,), "float32")}
        nested = {"nested_absmax": ((-(-blocks // NESTED),), "float32"),
                  "nested_offset": ((), "float32")}  # fmt: skip
        return {"codes": packed, "absmax": ((blocks,), "uint8"), **nested}

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Of a matrix `[out, in]` in codes, on disk and in a GPU's memory."""
        parts = self.parts(shape).values()
        return sum(math.prod(part) * np.dtype(dtype).itemsize for part, dtype in parts)


def asked_base(base: BaseChoice, skip: str = "none") -> Base | None:
    """What `--base` and `--base-skip` ask for; None for a model as it is stored.

    Raises:
        InputError: if linears are to be left out of no format.
    """
    if base == "stored":
        if skip != "none":
            raise InputError(f"base_skip {skip}, which needs base int8, int4 or nf4")
        return None
    return Base(base, () if skip == "none" else tuple(skip.split(",")))


def weight_bytes(config: LlamaConfig, precision: Precision, base: Base | None = None) -> int:
    """Bytes of the base weights in memory."""
    itemsize = PRECISIONS[precision].itemsize
    size = config.parameter_count * itemsize
    for block in tensor_shapes(config).values():
        for name, shape in block.items():
            if base is not None and base.holds(name):
                size += base.bytes(shape) - math.prod(shape) * itemsize
    return size


def stored_shapes(config: LlamaConfig, base: Base | None) -> dict[str, dict[str, tuple[int, ...]]]:
    """`tensor_shapes` as a model folder of a base holds them.

    int4: layers.0.attention.wq.weight  ->  ....wq.weight.codes, ....wq.weight.scale
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for block, shapes in tensor_shapes(config).items():
        found[block] = {}
        for name, shape in shapes.items():
            if base is not None and base.holds(name):
                parts = base.parts(shape).items()
                found[block] |= {f"{name}.{part}": size for part, (size, _) in parts}
            else:
                found[block][name] = shape
    return found


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
