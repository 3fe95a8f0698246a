"""A model's sizes, and the shapes that follow from them."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from jllama.errors import AtLeast0, AtLeast1, InputError, Positive, checked
from jllama.names import EMBEDDINGS, NORM, OUTPUT

MAX_LAYERS = 1000  # of any LLaMA, with much room; a file that states a billion is an attack


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
    kind: Literal["llama3"] = "llama3"


@checked
class LinearScaling:
    """Positions divided by `factor`: every wavelength is slowed as much (Chen et al., 2023)."""

    factor: Positive
    kind: Literal["linear"] = "linear"


def rope_scaling_of(entry: Mapping[str, Any] | None) -> RopeScaling | LinearScaling | None:
    """From JSON: {"factor": 2.0, "kind": "linear"}; older folders have no kind but Llama 3.1's.

    Raises:
        InputError: if it is neither.
    """
    if entry is None:
        return None
    return (LinearScaling if entry.get("kind") == "linear" else RopeScaling)(**entry)


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
    rope_scaling: RopeScaling | LinearScaling | None = None
    tied: bool = False
    ffn_bias: bool = False
    max_seq_len: AtLeast1 = 4096
    head_dim: AtLeast0 = 0  # as it is given, 0 for dim / n_heads; never 0 once it is made

    def __post_init__(self):
        if not self.head_dim:
            if self.dim % self.n_heads:
                raise InputError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head size {self.head_dim} is odd; rotary embedding needs pairs")

    @property
    def query_dim(self) -> int:
        """Of all heads together; in most models it is `dim`."""
        return self.n_heads * self.head_dim

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
        "wq": (config.query_dim, config.dim),
        "wk": (config.kv_dim, config.dim),
        "wv": (config.kv_dim, config.dim),
        "wo": (config.dim, config.query_dim),
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
