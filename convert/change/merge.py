"""An adapter folded into the blocks that pass, and what rounding took from it.

Base weights are stored in 16 bits, so W + scale * B A is rounded (not with `--dtype fp32`), and an
adapter that moves a weight by less than half a step does not move it at all. Three streams of probe
prompts therefore go through the blocks together: the base, the base with its adapter, and the
merged model; all in fp32, so that they differ by the weights alone.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.change.probe import Probe
from convert.dtypes import cast
from jllama.cli.terminal import console
from jllama.folders.adapter import check_base, put_adapter, read_adapter
from jllama.folders.model import read_block
from jllama.lora import adapted_linears, merge
from jllama.model import named_arrays
from jllama.names import EMBEDDINGS, NORM, OUTPUT


class Merge:
    """Merges block after block, in the order of `tensor_shapes`.

    Args:
        model: the base's model folder.
        adapter: a PEFT folder.
        dtypes: what each tensor of the merged model is rounded to.
        force: also on a base that the adapter was not trained on.

    Raises:
        InputError: if the adapter is damaged or does not fit the base.
    """

    def __init__(self, model: Path, adapter: Path, dtypes: Mapping[str, np.dtype], *, force: bool):
        check_base(adapter, model, force=force)
        self._model, self._adapter, self._dtypes = model, adapter, dtypes
        self._probe = Probe(model)
        self._config = self._probe.config
        self._lora, self._arrays = read_adapter(adapter, self._config)
        self._logits: dict[str, np.ndarray] = {}
        self._weights = self._unchanged = 0

    def __call__(
        self,
        block: str,
        tensors: dict[str, np.ndarray],
        original: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """The block's tensors with the adapter folded in, each rounded once.

        Args:
            original: the tensors before they were quantised, where they are known.
        """
        if block == "embeddings":
            rows = tensors[EMBEDDINGS][self._probe.tokens]
            x = jnp.asarray(rows, jnp.float32)
            rounded = jnp.asarray(cast(rows, self._dtypes[EMBEDDINGS]), jnp.float32)
            self._probe.streams = {"base": x, "tuned": x, "merged": rounded}
            self._probe.streams |= {"original": x} if original is not None else {}
            return tensors
        if block == "head":
            self._finish(tensors)
            return tensors
        if original is not None:
            wide = {name: x.astype(np.float32) for name, x in original.items()}
            self._probe.run("original", self._probe.layer(block, wide))
        return self._merge_layer(block, tensors)

    def _merge_layer(self, block: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # What is to change its dtype is summed in fp32, which holds it exactly.
        wide = {name: x if self._dtypes[name] == x.dtype else x.astype(np.float32)
                for name, x in tensors.items()}  # fmt: skip
        one = dataclasses.replace(self._config, n_layers=1)
        arrays = {name: self._arrays[name.replace("layers.0", block)]
                  for name in self._lora.shapes(one)}  # fmt: skip
        model = self._probe.layer(block, wide)  # one at a time: each is a copy of the block
        self._probe.run("base", model)
        put_adapter(model, self._lora, arrays)
        linears = [name.replace("layers.0", block) for name in adapted_linears(model)]
        self._probe.run("tuned", model)
        merge(model)
        found = named_arrays(nnx.state(model))
        folded = dict(tensors)
        for name in (f"{linear}.weight" for linear in linears):
            folded[name] = np.asarray(found[name.replace(block, "layers.0")])
        folded = {name: cast(x, self._dtypes[name]) for name, x in folded.items()}
        del model, found
        self._probe.run("merged", self._probe.layer(block, folded))
        for name in linears:
            before, after = tensors[f"{name}.weight"], folded[f"{name}.weight"]
            self._weights += before.size
            if before.dtype != after.dtype:
                before, after = before.astype(np.float32), after.astype(np.float32)
            self._unchanged += int(np.count_nonzero(before == after))
        return folded

    def _finish(self, tensors: dict[str, np.ndarray]) -> None:
        stored = tensors
        if self._config.tied:
            stored = tensors | read_block(self._model, "embeddings")
        output = EMBEDDINGS if self._config.tied else OUTPUT
        for who in self._probe.streams:
            norm, head = (
                cast(stored[name], self._dtypes[name]) if who == "merged" else stored[name]
                for name in (NORM, output)
            )
            self._logits[who] = self._probe.logits(who, norm, head)

    def report(self) -> dict[str, Any]:
        """What the merge changed and what rounding took, in logits over the probe prompts."""
        base, tuned, merged = (self._logits[who] for who in ("base", "tuned", "merged"))
        lost = np.abs(merged - tuned)
        found: dict[str, Any] = {}
        if "original" in self._logits:
            moved = np.abs(base - self._logits["original"])
            found["mean_logit_difference_by_quantisation"] = float(moved.mean())
        return found | {
            "adapter": str(self._adapter),
            "probe_tokens": int(self._probe.tokens.size),
            "share_of_weights_unchanged": self._unchanged / self._weights,
            "max_logit_difference": float(lost.max()),
            "mean_logit_difference": float(lost.mean()),
            "mean_logit_effect_of_adapter": float(np.abs(tuned - base).mean()),
            "top1_agreement": float((merged.argmax(-1) == tuned.argmax(-1)).mean()),
        }


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
    if (by_codes := report.get("mean_logit_difference_by_quantisation")) is not None:
        console.print(
            f"the adapter was trained on a quantised base: that moves the base's logits by "
            f"{by_codes:.2g} on average, and is in what was written"
        )
    if lost > effect / 2:
        console.print(
            "warning: rounding ate the adapter: merging loses more than half of what it does. "
            "Export with --dtype fp32 (to-gguf: f32), or keep the adapter apart"
        )
