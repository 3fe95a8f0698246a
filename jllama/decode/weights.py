"""A model's weights as the compiled functions take them, and the model made of them again."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jllama.layers import Weight, WidenedWeight
from jllama.lora import fix, scaled
from jllama.machine import free_memory_mib
from jllama.model import Llama

Weights = tuple[nnx.State, nnx.State, Float[Array, ""]]  # adapters, base, the adapters' scale


def merged(graphdef: nnx.GraphDef, weights: Weights) -> Llama:
    """The model, for use inside a compiled function; what it needs once is done here."""
    adapters, base, adapter_scale = weights
    model = nnx.merge(graphdef, scaled(adapters, adapter_scale), base)
    dtype = model.tok_embeddings.dtype
    for module in (model.tok_embeddings, model.output, *model.linears().values()):
        weight = None if module is None else module.weight
        if isinstance(weight, Weight) and weight.dtype != dtype:
            module.weight = WidenedWeight(weight[...])
    fix(model)
    return model


def widened(weights: Weights) -> Weights:
    """The same with bf16 matrices as fp32, on a CPU whose memory has room for them.

    XLA's products with bf16 matrices are slow there: with few rows they take two to three times as
    long as those with fp32, for every matrix is widened for every token.
    """
    adapters, base, adapter_scale = weights
    narrow = [x for x in jax.tree.leaves(base) if x.dtype == jnp.bfloat16]
    needed = 4 * sum(x.size for x in narrow) / 2**20
    if not narrow or jax.default_backend() != "cpu" or needed > free_memory_mib():
        return weights
    return adapters, _widen(base), adapter_scale


@jax.jit
def _widen(base: nnx.State) -> nnx.State:
    def wide(x):
        return x.astype(jnp.float32) if x.ndim > 1 and x.dtype == jnp.bfloat16 else x

    return jax.tree.map(wide, base)
