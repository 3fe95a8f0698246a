"""LoRA: make, apply, scale and merge (Hu et al., 2021), with PEFT's initialisation.

    y = x W^T + (alpha / rank) * dropout(x) A^T B^T

The base is never renamed: `layers.0.attention.wq.weight` is there with and without an adapter,
which adds `layers.0.attention.wq.lora.a` and `.b`.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from jllama.config import LoraConfig
from jllama.layers import Linear
from jllama.model import Llama, map_named


class Lora(nnx.Module):
    """A `[R, in]` and B `[out, R]`, both fp32: bf16 would round small updates away."""

    def __init__(
        self, in_features: int, out_features: int, config: LoraConfig, key: Key[Array, ""]
    ):
        bound = 1 / math.sqrt(in_features)  # kaiming-uniform with a = sqrt(5)
        shape = (config.rank, in_features)
        self.a = nnx.LoRAParam(jax.random.uniform(key, shape, minval=-bound, maxval=bound))
        self.b = nnx.LoRAParam(jnp.zeros((out_features, config.rank)))
        self.scale = config.scale
        self.dropout = config.dropout

    def __call__(self, x: Float[Array, "B T I"], key: Key[Array, ""] | None):
        """`[B, T, in]` -> `[B, T, out]`, in the network's dtype; no key, no dropout."""
        if key is not None and self.dropout > 0:
            kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), jnp.zeros_like(x))
        # fp32 adapters are cast here, or they would promote the whole network.
        low = jnp.einsum("BTi,Ri->BTR", x, self.a[...].astype(x.dtype))
        return jnp.einsum("BTR,oR->BTo", low, self.b[...].astype(x.dtype)) * self.scale


def adapted_linears(model: Llama) -> dict[str, Linear]:
    """The linears that hold an adapter, by name (`layers.0.attention.wq`)."""
    return {name: linear for name, linear in model.linears().items() if linear.lora is not None}


def attach(model: Llama, config: LoraConfig, key: Key[Array, ""]) -> None:
    """Puts a fresh adapter, which changes nothing yet (B = 0), on every target of every block."""
    for index, (name, linear) in enumerate(model.linears().items()):
        if name.rpartition(".")[2] in config.targets:
            out_features, in_features = linear.weight.shape
            linear.lora = Lora(in_features, out_features, config, jax.random.fold_in(key, index))


def split(model: Llama) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model as (structure, adapters, base), for `nnx.merge` inside a compiled function."""
    graphdef, adapters, base = nnx.split(model, nnx.LoRAParam, ...)  # type: ignore[misc]
    return graphdef, adapters, base


def scaled(adapters: nnx.State, factor: Float[Array, ""] | float) -> nnx.State:
    """Adapters with their effect multiplied: 0 is the base model, 1 the tuned one."""

    return map_named(lambda name, x: x * factor if name.endswith(".b") else x, adapters)


def merge(model: Llama) -> None:
    """Folds the adapters into the base weights and removes them.

    W + scale * B A is summed in fp32 and rounded once to the weight's dtype.
    """
    for linear in adapted_linears(model).values():
        lora = linear.lora
        with jax.default_matmul_precision("highest"):
            delta = lora.scale * (lora.b[...] @ lora.a[...])
        merged = linear.weight[...].astype(jnp.float32) + delta
        linear.weight[...] = merged.astype(linear.weight.dtype)
        linear.lora = None
