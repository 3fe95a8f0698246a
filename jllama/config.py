"""What a LLaMA is, in numbers: sizes, the adapter's settings and the precisions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp

from jllama.errors import InputError

MAX_LAYERS = 1000  # of any LLaMA, with much room; a file that states a billion is an attack


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary embedding.

    Wavelengths above `original_context / low_frequency_factor` are slowed `factor` times, those
    below `original_context / high_frequency_factor` stay, and the ones between are blended.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of one model; complete, checked once, and the same for every family."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    ffn_bias: bool = False
    max_seq_len: int = 4096

    def __post_init__(self):
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size")
        if wrong := [f"{name} {getattr(self, name)}" for name in sizes if getattr(self, name) < 1]:
            raise InputError(f"{', '.join(wrong)}; expected at least 1")
        if self.n_layers > MAX_LAYERS:
            raise InputError(f"n_layers {self.n_layers}, expected at most {MAX_LAYERS}")
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
    def parameter_count(self) -> int:
        """Closed formula of the number of base weights; tied matrices count once."""
        kv_dim = self.n_kv_heads * self.head_dim
        attention = 2 * self.dim * self.dim + 2 * kv_dim * self.dim
        feed_forward = 3 * self.dim * self.hidden_dim
        biases = 2 * self.hidden_dim + self.dim if self.ffn_bias else 0
        block = attention + feed_forward + biases + 2 * self.dim
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.dim
        return self.n_layers * block + embeddings + self.dim


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """`[out, in]` of the seven linears of a block, by Meta's names."""
    kv_dim = config.n_kv_heads * config.head_dim
    return {
        "wq": (config.dim, config.dim),
        "wk": (kv_dim, config.dim),
        "wv": (kv_dim, config.dim),
        "wo": (config.dim, config.dim),
        "w1": (config.hidden_dim, config.dim),
        "w2": (config.dim, config.hidden_dim),
        "w3": (config.hidden_dim, config.dim),
    }


def hidden_size(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Meta's rule for the feed-forward width.

    dim 4096, multiple_of 256            ->  11008  (7B)
    dim 8192, multiple_of 4096, x 1.3    ->  28672  (70B)
    """
    hidden = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


def config_from_meta(params: Mapping[str, Any], vocab_size: int, *, tied: bool) -> LlamaConfig:
    """Meta's `params.json` as a config; the vocabulary's size comes from the tensors.

    Raises:
        InputError: if a field is missing.
    """
    params = params.get("model", params)
    missing = [name for name in ("dim", "n_layers", "n_heads", "norm_eps") if name not in params]
    if missing:
        raise InputError(f"params.json lacks {', '.join(missing)}")
    theta = float(params.get("rope_theta", 10000.0))
    scaling = None
    if params.get("use_scaled_rope", False):
        # Meta's code has factor 8 everywhere; the published 3.2 configs (the tied ones) say 32.
        scaling = RopeScaling(factor=float(params.get("rope_scaling_factor", 32 if tied else 8)))
    return LlamaConfig(
        dim=params["dim"],
        n_layers=params["n_layers"],
        n_heads=params["n_heads"],
        n_kv_heads=params.get("n_kv_heads") or params["n_heads"],
        hidden_dim=hidden_size(
            params["dim"], params.get("multiple_of", 256), params.get("ffn_dim_multiplier")
        ),
        vocab_size=vocab_size,
        norm_eps=params["norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        tied=tied,
        max_seq_len=params.get("max_seq_len") or _context_length(theta, scaling, params),
    )


def _context_length(theta: float, scaling: RopeScaling | None, params: Mapping[str, Any]) -> int:
    """The trained context, which Meta's files do not state: told apart by what differs."""
    if scaling is not None:
        return 131072
    if theta > 10000:
        return 8192
    return 2048 if params["norm_eps"] == 1e-6 else 4096


# Field order: dim, layers, heads, kv heads, hidden, vocabulary. Sources: Meta's params.json files.
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

# Meta's name of a block's part, or of a linear -> the name that Hugging Face and PEFT give it.
HF_PARTS: Mapping[str, str] = MappingProxyType({"attention": "self_attn", "feed_forward": "mlp"})
HF_LINEARS: Mapping[str, str] = MappingProxyType(
    {
        "wq": "q_proj",
        "wk": "k_proj",
        "wv": "v_proj",
        "wo": "o_proj",
        "w1": "gate_proj",
        "w2": "down_proj",
        "w3": "up_proj",
    }
)


def linear_names(text: str) -> tuple[str, ...]:
    """The linears a user named, in Meta's names and order.

    "wq,wv" -> ("wq", "wv");  "q_proj,v_proj" -> ("wq", "wv");  "all" -> all seven

    Raises:
        InputError: if a name is unknown or none is given.
    """
    asked = [name.strip() for name in text.split(",") if name.strip()]
    if asked == ["all"]:
        return tuple(HF_LINEARS)
    meta = {hf: meta for meta, hf in HF_LINEARS.items()}
    named = {meta.get(name, name) for name in asked}
    unknown = sorted(named - set(HF_LINEARS))
    if unknown or not named:
        raise InputError(
            f"unknown linear {', '.join(unknown) or '(none given)'}; choose from "
            f"{', '.join(HF_LINEARS)} (or q_proj, ..., or all)"
        )
    return tuple(name for name in HF_LINEARS if name in named)


@dataclass(frozen=True)
class LoraConfig:
    """Rank, scale, input dropout and the linears that get an adapter.

    The scale is alpha / rank, with rsLoRA alpha / sqrt(rank) (Kalajdzievski, 2023). DoRA (Liu et
    al., 2024) adds a learned magnitude for every output.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("wq", "wv")
    rslora: bool = False
    dora: bool = False

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise InputError(f"LoRA rank {self.rank}, alpha {self.alpha}; expected >= 1 and > 0")
        object.__setattr__(self, "targets", linear_names(",".join(self.targets)))
        if not 0 <= self.dropout < 1:
            raise InputError(f"LoRA dropout {self.dropout} is outside [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def parameter_count(self, config: LlamaConfig) -> int:
        """Closed formula: rank * (in + out) for every adapted linear, with DoRA + out."""
        shapes = [linear_shapes(config)[name] for name in self.targets]
        return config.n_layers * sum(
            self.rank * (outs + ins) + (outs if self.dora else 0) for outs, ins in shapes
        )


PrecisionName = Literal["bf16", "fp32"]

# The dtype of the frozen weights and of the network's activations. Adapters, optimizer moments,
# norm statistics, softmax and loss are fp32 in both.
PRECISIONS: Mapping[str, Any] = MappingProxyType({"bf16": jnp.bfloat16, "fp32": jnp.float32})
