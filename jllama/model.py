"""The LLaMA network, with Meta's names: its module tree is Meta's state dict.

The alphabet of every shape in this project:

    B batch    T query time    S key time    D model      N heads    K kv heads    G = N/K
    H head     F hidden        V vocabulary  L layers     R rank     P = H/2 rotary pairs
"""

from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jllama.attention import (
    Documents,
    Implementation,
    LayerCache,
    cached_attention,
    causal_attention,
    make_cache,
)
from jllama.config import LlamaConfig, Remat, linear_shapes
from jllama.layers import (
    Embedding,
    Linear,
    RMSNorm,
    Rotation,
    Weight,
    matmul_precision,
    rotary_frequencies,
    rotate,
    rotation,
    swiglu,
    together,
)
from jllama.sharding import dealt, one_after_another

_ATTENTION = "attention"  # the name under which a policy knows attention's result


def _cudnn(primitive, *_: Any, **__: Any) -> bool:
    """Its result with the statistics that its backward pass wants, which have no name."""
    return primitive.name.startswith("dot_product_attention_fwd")


_both = jax.checkpoint_policies.save_from_both_policies
_POLICIES = {
    "dots": _both(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        _both(jax.checkpoint_policies.save_only_these_names(_ATTENTION), _cudnn),
    ),
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "block": None,
}

Cache = list[LayerCache]


class Attention(nnx.Module):
    """Grouped-query attention: N query heads share K key and value heads."""

    def __init__(self, config: LlamaConfig, implementation: Implementation, **init):
        shapes = linear_shapes(config)
        self.wq = Linear(shapes["wq"], **init)
        self.wk = Linear(shapes["wk"], **init)
        self.wv = Linear(shapes["wv"], **init)
        self.wo = Linear(shapes["wo"], **init)
        self.head_dim = config.head_dim
        self.implementation = implementation

    def __call__(self, x: Float[Array, "B T D"], rotary: Rotation, documents, key):
        query, keys, values = self._project(x, rotary, key)
        seen = causal_attention(query, keys, values, documents, self.implementation)
        seen = checkpoint_name(seen, _ATTENTION)
        return self.wo(_joined(seen), _at(key, 1))

    def prefill(self, x: Float[Array, "B T D"], rotary: Rotation, slots: int):
        """Attends as without a cache, and makes one of the keys and values."""
        query, keys, values = self._project(x, rotary, None)
        seen = causal_attention(query, keys, values, None, self.implementation)
        cache = make_cache(keys, values, slots, self.implementation)
        return self.wo(_joined(seen)), cache

    def decode(self, x: Float[Array, "B 1 D"], rotary: Rotation, positions, cache: LayerCache):
        """Attends to the cache, with the new keys and values in it."""
        query, key, value = self._project(x, rotary, None)
        seen, cache = cached_attention(query, key, value, positions, cache, self.implementation)
        return self.wo(_joined(seen)), cache

    def _project(self, x, rotary, key):
        def heads(y):
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        query, keys, values = map(heads, together((self.wq, self.wk, self.wv), x, _at(key, 0)))
        return rotate(query, rotary), rotate(keys, rotary), values


class FeedForward(nnx.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig, **init):
        shapes = linear_shapes(config)
        self.w1 = Linear(shapes["w1"], bias=config.ffn_bias, **init)
        self.w2 = Linear(shapes["w2"], bias=config.ffn_bias, **init)
        self.w3 = Linear(shapes["w3"], bias=config.ffn_bias, **init)

    def __call__(self, x: Float[Array, "B T D"], key: Key[Array, "4"] | None = None):
        gate, up = together((self.w1, self.w3), x, _at(key, 2))
        return self.w2(swiglu(gate, up), _at(key, 3))


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(self, config: LlamaConfig, implementation: Implementation, **init):
        self.attention = Attention(config, implementation, **init)
        self.feed_forward = FeedForward(config, **init)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, dtype=init["dtype"])
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, dtype=init["dtype"])

    def __call__(self, x: Float[Array, "B T D"], rotary: Rotation, documents, key, remat: Remat):
        x = x + self.attention(self.attention_norm(x), rotary, documents, key)
        feed = jax.checkpoint(Block._feed) if remat == "ffn" else Block._feed
        return x + feed(self, x, key)

    def prefill(self, x: Float[Array, "B T D"], rotary: Rotation, slots: int):
        seen, cache = self.attention.prefill(self.attention_norm(x), rotary, slots)
        x = x + seen
        return x + self._feed(x, None), cache

    def decode(self, x: Float[Array, "B 1 D"], rotary: Rotation, positions, cache: LayerCache):
        seen, cache = self.attention.decode(self.attention_norm(x), rotary, positions, cache)
        x = x + seen
        return x + self._feed(x, None), cache

    def _feed(self, x, key):
        return self.feed_forward(self.ffn_norm(x), key)


class Llama(nnx.Module):
    """Tokens in, fp32 logits out. Layers are a list, so no weight is sliced out of a stack."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: Remat = "none",
        attention: Implementation = "xla",
        rngs: nnx.Rngs,
    ):
        if remat not in get_args(Remat):
            raise ValueError(f"remat {remat!r}; choose from {', '.join(get_args(Remat))}")
        init: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.config = config
        self.remat = remat
        self.tok_embeddings = Embedding(config.vocab_size, config.dim, **init)
        self.layers = nnx.List([Block(config, attention, **init) for _ in range(config.n_layers)])
        self.norm = RMSNorm(config.dim, config.norm_eps, dtype=dtype)
        self.output = (
            nnx.data(None) if config.tied else Linear((config.vocab_size, config.dim), **init)
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        documents: Sequence[Documents] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every position.

        Args:
            tokens: token ids.
            positions: position of each token in its document; 0, 1, 2, ... by default.
            documents: where each document of packed rows lies; they are blind to each other. By
                default a row is one document.
            key: turns the adapters' dropout on.
        """
        return self.head(self.hidden(tokens, positions, documents, key))

    def hidden(self, tokens, positions=None, documents=None, key=None) -> Float[Array, "B T D"]:
        """The normed stream before the head; arguments as for `__call__`."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        x = dealt(self.tok_embeddings(tokens))
        rotary = rotation(positions, rotary_frequencies(self.config))
        # One draw of all keys, [L, 4]: the inputs of wq wk wv, of wo, of w1 w3 and of w2.
        with jax.named_scope("dropout"):
            keys = None if key is None else jax.random.split(key, (len(self.layers), 4))
        with jax.default_matmul_precision(matmul_precision(x.dtype)):
            for index, block in enumerate(self.layers):
                run = Block.__call__
                if self.remat in _POLICIES:
                    run = jax.checkpoint(run, static_argnums=5, policy=_POLICIES[self.remat])
                x, block = one_after_another(x, block)
                x = dealt(run(block, x, rotary, documents, _at(keys, index), self.remat))
        return self.norm(x)

    def prefill(self, tokens: Int[Array, "B T"], slots: int) -> tuple[Float[Array, "B T D"], Cache]:
        """`hidden` of prompts, and a cache of `slots` slots that holds their keys and values."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        x = self.tok_embeddings(tokens)
        rotary = rotation(positions, rotary_frequencies(self.config))
        cache = []
        with jax.default_matmul_precision(matmul_precision(x.dtype)):
            for block in self.layers:
                x, layer_cache = block.prefill(x, rotary, slots)
                cache.append(layer_cache)
        return self.norm(x), cache

    def decode(
        self, tokens: Int[Array, "B 1"], positions: Int[Array, "B 1"], cache: Cache
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """`hidden` of new tokens that see the cache, and the cache with them written in."""
        x = self.tok_embeddings(tokens)
        rotary = rotation(positions, rotary_frequencies(self.config))
        written = []
        with jax.default_matmul_precision(matmul_precision(x.dtype)):
            for block, layer_cache in zip(self.layers, cache, strict=True):
                x, layer_cache = block.decode(x, rotary, positions, layer_cache)
                written.append(layer_cache)
        return self.norm(x), written

    def head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, accumulated and kept in fp32."""
        with jax.default_matmul_precision(matmul_precision(x.dtype)):
            return self.head_weight.product(x, preferred_element_type=jnp.float32)

    @property
    def head_weight(self) -> Weight:
        """`[V, D]`; the embedding itself where the two are tied."""
        weight = self.tok_embeddings.weight if self.output is None else self.output.weight
        assert isinstance(weight, Weight)  # it is never in codes
        return weight

    def linears(self) -> dict[str, Linear]:
        """The seven linears of every block by name: what an adapter can be attached to."""
        found = {}
        for index, block in enumerate(self.layers):
            for part in ("attention", "feed_forward"):
                for name, child in vars(getattr(block, part)).items():
                    if isinstance(child, Linear):
                        found[f"layers.{index}.{part}.{name}"] = child
        return found


def map_named(function: Callable[[str, Any], Any], state: nnx.State) -> nnx.State:
    """`function(name, array)` over a state, with Meta's names (`layers.0.attention.wq.weight`)."""

    def call(path, leaf):
        return function(".".join(str(entry.key) for entry in path[:-1]), leaf)

    return jax.tree_util.tree_map_with_path(call, state)


def named_arrays(state: nnx.State) -> dict[str, Any]:
    """The arrays of a state by Meta's names."""
    found: dict[str, Any] = {}
    map_named(found.__setitem__, state)
    return found


def _joined(seen: Float[Array, "B T N H"]) -> Float[Array, "B T ..."]:
    """What all heads have seen, side by side."""
    return seen.reshape(*seen.shape[:2], -1)


def _at(keys: Key[Array, "..."] | None, index: int) -> Key[Array, "..."] | None:
    return None if keys is None else keys[index]
