"""Meta's params.json: read and checked on the way in, written on the way out."""

import itertools
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.rules import COUNT, FLAG, NUMBER, Rule, broken
from jllama.config import LinearScaling, LlamaConfig, RopeScaling
from jllama.errors import InputError
from jllama.folders.json_files import read_json

PARAMS = "params.json"

# null counts as absent.
_FIELDS: Mapping[str, Rule] = {
    "dim": COUNT,
    "n_layers": COUNT,
    "n_heads": COUNT,
    "norm_eps": NUMBER,
    "n_kv_heads": COUNT,
    "multiple_of": COUNT,
    "max_seq_len": COUNT,
    "ffn_dim_multiplier": NUMBER,
    "rope_theta": NUMBER,
    "rope_scaling_factor": NUMBER,
    "use_scaled_rope": FLAG,
    "vocab_size": ("an integer", lambda x: type(x) is int),  # -1: take it from the tensors
}
_REQUIRED = ("dim", "n_layers", "n_heads", "norm_eps")


def read_params(file: Path) -> dict[str, Any]:
    """The fields of a params.json, taken out of `"model"` where newer files nest them.

    Raises:
        InputError: if the file or fields are missing or of a wrong kind; all are listed.
    """
    content = read_json(file)
    nested = content.get("model", content)
    if not isinstance(nested, dict):
        raise InputError(
            f'{file}: "model" is {reprlib.repr(nested)}, expected an object with dim, ...'
        )
    params = {name: value for name, value in nested.items() if value is not None}
    problems = broken(params, _FIELDS, _REQUIRED)
    if problems:
        raise InputError(
            f"{file} is not Meta's params.json; copy it again beside the weights\n  "
            + "\n  ".join(problems)
        )
    return params


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


def meta_params(config: LlamaConfig) -> dict[str, Any]:
    """The params.json of a config, as small as Meta's own.

    `max_seq_len` and `rope_scaling_factor`, which Meta's files do not have, are written only
    where they differ from what a reader of Meta's files must assume.

    Raises:
        InputError: if Meta's format has no words for the config.
    """
    if config.query_dim != config.dim:
        raise InputError(
            f"head size {config.head_dim}, and dim {config.dim} / {config.n_heads} heads is "
            f"{config.dim / config.n_heads:g}: Meta's format has no word for it; use to-hf or "
            "to-gguf"
        )
    params: dict[str, Any] = {"dim": config.dim, "n_layers": config.n_layers}
    params["n_heads"] = config.n_heads
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    params |= {"vocab_size": config.vocab_size, **hidden_rule(config.dim, config.hidden_dim)}
    params["norm_eps"] = config.norm_eps
    if config.rope_theta != 10000:
        params["rope_theta"] = config.rope_theta
    scaling = config.rope_scaling
    if isinstance(scaling, LinearScaling):
        raise InputError(
            f"positions divided by {scaling.factor:g}: Meta's format has no word for it; use to-hf "
            "or to-gguf"
        )
    if scaling is not None:
        if scaling != RopeScaling(scaling.factor):
            raise InputError(f"{scaling}: Meta's params.json can state the factor alone")
        params["use_scaled_rope"] = True
    assumed = config_from_meta(params, config.vocab_size, tied=config.tied)
    if scaling is not None and scaling != assumed.rope_scaling:
        params["rope_scaling_factor"] = scaling.factor
    if config.max_seq_len != assumed.max_seq_len:
        params["max_seq_len"] = config.max_seq_len
    return params


def hidden_rule(dim: int, hidden: int) -> dict[str, Any]:
    """`multiple_of` and, where needed, `ffn_dim_multiplier` for which Meta's rule gives `hidden`.

    dim 4096, hidden 11008  ->  {"multiple_of": 256}
    dim 4096, hidden 14336  ->  {"multiple_of": 256, "ffn_dim_multiplier": 1.3}
    """
    published = itertools.product((256, 1024, 4096), (None, 1.3, 1.5))
    exact = (hidden + 0.5) / hidden_size(dim, 1, None)  # Meta's int() cuts the half off again
    for multiple, factor in [*published, (4, None), (1, None), (1, exact)]:
        if hidden_size(dim, multiple, factor) == hidden:
            rule: dict[str, Any] = {"multiple_of": multiple}
            return rule if factor is None else rule | {"ffn_dim_multiplier": factor}
    raise InputError(f"hidden size {hidden} of dim {dim} does not follow from Meta's rule")
