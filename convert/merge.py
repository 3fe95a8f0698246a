"""An adapter folded into the blocks that pass, and what rounding took from it.

Base weights are stored in 16 bits, so W + scale * B A is rounded (not with `--dtype fp32`), and an
adapter that moves a weight by less than half a step does not move it at all. Three streams of probe
prompts therefore go through the blocks together: the base, the base with its adapter, and the
merged model; all in fp32, so that they differ by the weights alone.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.dtypes import cast
from jllama.cli.terminal import console
from jllama.folders.adapter import check_base, put_adapter, read_adapter
from jllama.folders.model import read_block, read_config
from jllama.layers import RMSNorm, Rotation, rotary_frequencies, rotation
from jllama.lora import adapted_linears, merge
from jllama.model import Llama, map_named, named_arrays
from jllama.text.tokenizer import load_tokenizer

_TOKENS = 32  # of each prompt
_PROMPTS = (
    "The committee met on Tuesday to discuss the new bridge across the river. After two hours of "
    "debate, most of the members agreed that the old one could not be repaired for long.",
    "To make a simple vegetable soup, first wash and chop two carrots, an onion and a leek. Then "
    "warm some oil in a large pot and let the vegetables soften for about ten minutes.",
    "Question: Why does ice float on water?\nAnswer: Because water expands when it freezes, ice "
    "is less dense than the liquid around it, and so a part of it stays above the surface.",
    'def mean(values):\n    """The arithmetic mean of a list of numbers."""\n    total = 0\n'
    "    for value in values:\n        total += value\n    return total / len(values)\n",
)


class Merge:
    """Merges block after block, in the order of `tensor_shapes`.

    Args:
        model: the base's model folder.
        adapter: a PEFT folder.
        dtype: what the merged model is rounded to; by default each tensor keeps its own.
        force: also on a base that the adapter was not trained on.

    Raises:
        InputError: if the adapter is damaged or does not fit the base.
    """

    def __init__(self, model: Path, adapter: Path, *, dtype: np.dtype | None = None, force: bool):
        check_base(adapter, model, force=force)
        self._model, self._adapter, self._dtype = model, adapter, dtype
        self._config = read_config(model)
        self._lora, self._arrays = read_adapter(adapter, self._config)
        tokenizer = load_tokenizer(model)
        rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in _PROMPTS]
        length = min(_TOKENS, *map(len, rows))
        self._tokens = np.array([row[:length] for row in rows])
        positions = jnp.broadcast_to(jnp.arange(length)[None], self._tokens.shape)
        self._rotary = rotation(positions, rotary_frequencies(self._config))
        self._streams: dict[str, Any] = {}  # who -> [B, T, D] before the next block, fp32
        self._logits: dict[str, np.ndarray] = {}
        self._weights = self._unchanged = 0

    def __call__(self, block: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The block's tensors with the adapter folded in, each rounded once."""
        if block == "embeddings":
            rows = tensors["tok_embeddings.weight"][self._tokens]
            x = jnp.asarray(rows, jnp.float32)
            rounded = jnp.asarray(self._rounded(rows), jnp.float32)
            self._streams = {"base": x, "tuned": x, "merged": rounded}
            return tensors
        if block == "head":
            self._finish(tensors)
            return tensors
        return self._merge_layer(block, tensors)

    def _merge_layer(self, block: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # What is to change its dtype is summed in fp32, which holds it exactly.
        wide = {name: x if self._dtype in (None, x.dtype) else x.astype(np.float32)
                for name, x in tensors.items()}  # fmt: skip
        base, tuned, merged = (self._layer(block, wide) for _ in range(3))
        one = dataclasses.replace(self._config, n_layers=1)
        arrays = {name: self._arrays[name.replace("layers.0", block)]
                  for name in self._lora.shapes(one)}  # fmt: skip
        for model in (tuned, merged):
            put_adapter(model, self._lora, arrays)
        linears = [name.replace("layers.0", block) for name in adapted_linears(merged)]
        merge(merged)
        if self._dtype is not None:
            nnx.update(merged, map_named(self._round, nnx.state(merged)))
        for who, model in (("base", base), ("tuned", tuned), ("merged", merged)):
            self._streams[who] = _run(*nnx.split(model), self._streams[who], self._rotary)
        found = named_arrays(nnx.state(merged))
        folded = {name: np.asarray(found[name.replace(block, "layers.0")]) for name in tensors}
        for name in linears:
            before, after = tensors[f"{name}.weight"], folded[f"{name}.weight"]
            self._weights += before.size
            if before.dtype != after.dtype:
                before, after = before.astype(np.float32), after.astype(np.float32)
            self._unchanged += int(np.count_nonzero(before == after))
        return folded

    def _rounded(self, array: np.ndarray) -> np.ndarray:
        return array if self._dtype is None else cast(array, self._dtype)

    def _round(self, _: str, array: jax.Array) -> jax.Array:
        return array.astype(self._dtype)

    def _layer(self, block: str, tensors: dict[str, np.ndarray]) -> Llama:
        """A model of this layer alone: what attaches and merges adapters works on it."""
        config = dataclasses.replace(self._config, n_layers=1, vocab_size=1, tied=True)
        dtype = next(iter(tensors.values())).dtype
        model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))

        def fill(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
            stored = tensors.get(name.replace("layers.0", block))
            return jnp.zeros(shape.shape, shape.dtype) if stored is None else jnp.asarray(stored)

        nnx.update(model, map_named(fill, nnx.state(model)))
        return model

    def _finish(self, tensors: dict[str, np.ndarray]) -> None:
        stored = tensors
        if self._config.tied:
            stored = tensors | read_block(self._model, "embeddings")
        head = stored["tok_embeddings.weight" if self._config.tied else "output.weight"]
        norm = RMSNorm(self._config.dim, self._config.norm_eps, dtype=jnp.float32)
        for who, x in self._streams.items():
            weight, table = tensors["norm.weight"], head
            if who == "merged":
                weight, table = self._rounded(weight), self._rounded(table)
            norm.weight[...] = jnp.asarray(weight, jnp.float32)
            self._logits[who] = np.asarray(norm(x)) @ table.astype(np.float32).T

    def report(self) -> dict[str, Any]:
        """What the merge changed and what rounding took, in logits over the probe prompts."""
        base, tuned, merged = (self._logits[who] for who in ("base", "tuned", "merged"))
        lost = np.abs(merged - tuned)
        return {
            "adapter": str(self._adapter),
            "probe_tokens": int(self._tokens.size),
            "share_of_weights_unchanged": self._unchanged / self._weights,
            "max_logit_difference": float(lost.max()),
            "mean_logit_difference": float(lost.mean()),
            "mean_logit_effect_of_adapter": float(np.abs(tuned - base).mean()),
            "top1_agreement": float((merged.argmax(-1) == tuned.argmax(-1)).mean()),
        }


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef: nnx.GraphDef, state: nnx.State, x: jax.Array, rotary: Rotation) -> jax.Array:
    """A one-layer model's block on a stream `[B, T, D]`."""
    block = nnx.merge(graphdef, state).layers[0]
    with jax.default_matmul_precision("highest"):
        return block(x, rotary, None, None, "none")


def show_report(report: dict[str, Any]) -> None:
    """The report in words, with a warning where half of the adapter or more is gone."""
    lost, effect = report["mean_logit_difference"], report["mean_logit_effect_of_adapter"]
    console.print(
        f"merged {report['adapter']}: {100 * report['share_of_weights_unchanged']:.1f} % of the "
        "adapted weights keep their stored value"
    )
    console.print(
        f"merged against base + adapter on {report['probe_tokens']} probe tokens: logits differ by "
        f"{lost:.2g} on average, {report['max_logit_difference']:.2g} at most (the adapter itself "
        f"moves them by {effect:.2g}); top-1 agreement {100 * report['top1_agreement']:.1f} %"
    )
    if lost > effect / 2:
        console.print(
            "warning: rounding ate the adapter: merging loses more than half of what it does. "
            "Export with --dtype fp32, or keep the adapter apart"
        )
