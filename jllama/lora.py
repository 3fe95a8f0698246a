"""LoRA: make, apply, scale and merge (Hu et al., 2021), with PEFT's initialisation.

    y = x W^T + scale * dropout(x) A^T B^T

and DoRA (Liu et al., 2024), which learns the length of each row of W + scale * B A apart from its
direction:

    y' = y * (|W| + magnitude) / |W + scale * B A|

The base is never renamed: `layers.0.attention.wq.weight` is there with and without an adapter,
which adds `layers.0.attention.wq.lora.a`, `.b` and, for DoRA, `.magnitude`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, UInt

from jllama.config import LoraConfig
from jllama.layers import Linear, Matrix, Weight
from jllama.model import Llama, map_named


class Lora(nnx.Module):
    """A `[R, in]` and B `[out, R]`, both fp32: bf16 would round small updates away.

    `magnitude` `[out]` is what DoRA adds to the base's row lengths, 0 at first. (PEFT stores the
    sum; the difference makes an adapter of scale 0 the base model, bit for bit.)
    """

    def __init__(
        self, in_features: int, out_features: int, config: LoraConfig, key: Key[Array, ""]
    ):
        bound = 1 / math.sqrt(in_features)  # kaiming-uniform with a = sqrt(5)
        shape = (config.rank, in_features)
        self.a = nnx.LoRAParam(jax.random.uniform(key, shape, minval=-bound, maxval=bound))
        self.b = nnx.LoRAParam(jnp.zeros((out_features, config.rank)))
        self.magnitude: Any = (
            nnx.LoRAParam(jnp.zeros((out_features,))) if config.dora else nnx.data(None)
        )
        self.scale = config.scale
        self.dropout = config.dropout

    @jax.named_scope("adapters")
    def low_ranks(
        self, loras: Sequence["Lora"], x: Float[Array, "B T I"], key: Key[Array, ""] | None
    ) -> list[Float[Array, "B T R"]]:
        """x A^T of adapters with this one's settings, in x's dtype; no key, no dropout."""
        if key is not None and self.dropout > 0:
            x = dropped_out(x, self.dropout, key)
        # fp32 adapters are cast here, or they would promote the whole network.
        a = jnp.concatenate([lora.a[...] for lora in loras]).astype(x.dtype)
        return jnp.split(jnp.einsum("BTi,Ri->BTR", x, a), len(loras), axis=-1)

    @jax.named_scope("adapters")
    def added(
        self, y: Float[Array, "B T O"], low: Float[Array, "B T R"], weight: Matrix
    ) -> Float[Array, "B T O"]:
        """`y = x W^T` with the adapter's part added, where `low` is x A^T."""
        y = y + jnp.einsum("BTR,oR->BTo", low * self.scale, self.b[...].astype(y.dtype))
        if self.magnitude is None:
            return y
        return stretched(y, self.gain(weight, y.dtype))

    def gain(self, weight: Matrix, dtype: DTypeLike) -> Float[Array, " O"]:
        """DoRA's factor for every output, fp32; its denominator is held constant, as in PEFT.

        |W + s B A|^2 = |W|^2 + 2 s W A^T . B + s^2 B A A^T . B, row by row, so that no second
        matrix of W's size is ever made.
        """
        a, b, s = self.a[...], self.b[...], self.scale
        exact: dict[str, Any] = {"precision": "highest", "preferred_element_type": jnp.float32}
        base = weight.squared_lengths(dtype)
        weight_a = weight.product(a.astype(dtype), **exact).T
        b_a_a = jnp.einsum("oR,RQ->oQ", b, jnp.einsum("Ri,Qi->RQ", a, a, **exact), **exact)
        added = 2 * s * jnp.sum(weight_a * b, axis=1) + s * s * jnp.sum(b_a_a * b, axis=1)
        length = jax.lax.stop_gradient(jnp.sqrt(base + added))
        # Written as 1 + ..., it is exactly 1 for an adapter of scale 0.
        return 1 + (self.magnitude[...] + (jnp.sqrt(base) - length)) / length


def stretched(y: Float[Array, "B T O"], gain: Float[Array, " O"]) -> Float[Array, "B T O"]:
    """y times DoRA's gain, in fp32: bf16 has no 1.001."""
    return (y.astype(jnp.float32) * gain[None, None, :]).astype(y.dtype)


@jax.named_scope("dropout")
def dropped_out(
    x: Float[Array, "B T I"], rate: float, key: Key[Array, ""]
) -> Float[Array, "B T I"]:
    """x with a share `rate` of its elements 0 and the others stretched."""
    B, T, width = x.shape
    rows = jax.random.bits(key, (B, T, 1), jnp.uint32)
    columns = jnp.arange(width, dtype=jnp.uint32)[None, None, :]
    kept = mixed(rows + columns * jnp.uint32(0x9E3779B9)) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def mixed(bits: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """Murmur3's finaliser (Appleby): each bit of the result hangs on all 32 bits."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


class FixedLora(nnx.Module):
    """An adapter that learns no more: what is the same for every token is worked out once."""

    def __init__(self, lora: Lora, weight: Matrix, dtype: DTypeLike):
        self.a = nnx.Param(lora.a[...].astype(dtype))
        self.b = nnx.Param((lora.scale * lora.b[...]).astype(dtype))
        dora = lora.magnitude is not None
        self.gain = nnx.Param(lora.gain(weight, dtype)) if dora else nnx.data(None)

    @jax.named_scope("adapters")
    def low_ranks(
        self, loras: Sequence["FixedLora"], x: Float[Array, "B T I"], _key: None
    ) -> list[Float[Array, "B T R"]]:
        """As `Lora` without a key, in fp32."""
        a = jnp.concatenate([lora.a[...] for lora in loras])
        # Of W's type, XLA would join this product to that with W, and copy W to do so.
        low = jnp.einsum("BTi,Ri->BTR", x, a, preferred_element_type=jnp.float32)
        return jnp.split(low, len(loras), axis=-1)

    @jax.named_scope("adapters")
    def added(
        self, y: Float[Array, "B T O"], low: Float[Array, "B T R"], _weight: Matrix
    ) -> Float[Array, "B T O"]:
        """As `Lora`."""
        y = y + jnp.einsum("BTR,oR->BTo", low.astype(y.dtype), self.b[...])
        if self.gain is None:
            return y
        return stretched(y, self.gain[...])


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

    return map_named(lambda name, x: x if name.endswith(".a") else x * factor, adapters)


def fix(model: Llama) -> None:
    """Readies the adapters for many calls of the model that change none of its weights."""
    for linear in adapted_linears(model).values():
        linear.lora = FixedLora(linear.lora, linear.weight, model.tok_embeddings.dtype)


def merge(model: Llama) -> None:
    """Folds the adapters into the base weights and removes them.

    W + scale * B A, with DoRA stretched, is summed in fp32 and rounded once to the weight's dtype;
    a weight in codes becomes one in the network's.
    """
    for linear in adapted_linears(model).values():
        lora = linear.lora
        with jax.default_matmul_precision("highest"):
            delta = lora.scale * (lora.b[...] @ lora.a[...])
        weight = linear.weight
        dtype = weight.dtype if isinstance(weight, Weight) else model.tok_embeddings.dtype
        merged = weight.matrix(jnp.float32) + delta
        if lora.magnitude is not None:
            merged = merged * lora.gain(weight, dtype)[:, None]
        linear.weight = Weight(merged.astype(dtype))
        linear.lora = None
