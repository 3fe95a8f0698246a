"""Meta's params.json: read and checked on the way in, written on the way out."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.rules import COUNT, FLAG, NUMBER, Rule, broken
from jllama.config import LlamaConfig, RopeScaling, config_from_meta, hidden_size
from jllama.errors import InputError
from jllama.files import read_json

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
        raise InputError(f'{file}: "model" is {nested!r}, expected an object with dim, ...')
    params = {name: value for name, value in nested.items() if value is not None}
    problems = broken(params, _FIELDS, _REQUIRED)
    if problems:
        raise InputError(
            f"{file} is not Meta's params.json; copy it again beside the weights\n  "
            + "\n  ".join(problems)
        )
    return params


def meta_params(config: LlamaConfig) -> dict[str, Any]:
    """The params.json of a config, as small as Meta's own.

    `max_seq_len` and `rope_scaling_factor`, which Meta's files do not have, are written only
    where they differ from what a reader of Meta's files must assume.

    Raises:
        InputError: if Meta's format has no words for the config.
    """
    params: dict[str, Any] = {"dim": config.dim, "n_layers": config.n_layers}
    params["n_heads"] = config.n_heads
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    params |= {"vocab_size": config.vocab_size, **hidden_rule(config.dim, config.hidden_dim)}
    params["norm_eps"] = config.norm_eps
    if config.rope_theta != 10000:
        params["rope_theta"] = config.rope_theta
    scaling = config.rope_scaling
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
