"""Hugging Face's config.json: read and checked on the way in, written on the way out."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.hf.foreign import refuse_foreign
from convert.rules import COUNT, FLAG, NUMBER, Rule, broken
from jllama.config import LinearScaling, LlamaConfig, RopeScaling
from jllama.errors import InputError
from jllama.folders.json_files import read_json

_OBJECT: Rule = ("an object", lambda x: isinstance(x, dict))


def _only(value: object) -> Rule:
    return f"{value!r}, all that is built here", lambda x: x == value


# null counts as absent.
_FIELDS: Mapping[str, Rule] = {
    "hidden_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT,
    "intermediate_size": COUNT,
    "vocab_size": COUNT,
    "head_dim": COUNT,
    "max_position_embeddings": COUNT,
    "sliding_window": COUNT,
    "rms_norm_eps": NUMBER,
    "rope_theta": NUMBER,
    "rope_scaling": _OBJECT,
    "rope_parameters": _OBJECT,  # transformers 5: theta and scaling in one
    "partial_rotary_factor": _only(1.0),
    "tie_word_embeddings": FLAG,
    "attention_bias": _only(False),
    "mlp_bias": _only(False),
    "hidden_act": _only("silu"),
}
_REQUIRED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "rms_norm_eps",
)  # fmt: skip
# What transformers takes where config.json says nothing; null is the user's word, and stays.
_LLAMA = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
_SILENT: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}
_LLAMA3_ROPE = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_context",
}
_ROPE_KINDS: Mapping[str, Mapping[str, Rule]] = {
    "default": {},
    "linear": {"factor": NUMBER},
    "llama3": dict.fromkeys(_LLAMA3_ROPE, NUMBER) | {"original_max_position_embeddings": COUNT},
}


def config_from_hf(file: Path) -> LlamaConfig:
    """The config of a Hugging Face LLaMA, with transformers' own values for what is absent.

    Raises:
        InputError: if the model is none that jllama builds; everything that is wrong is listed.
    """
    stated = read_json(file)
    refuse_foreign(stated, file, _SILENT)
    content: dict[str, Any] = {**_SILENT[stated["model_type"]], **stated}
    content = {name: value for name, value in content.items() if value is not None}
    problems = broken(content, _FIELDS, _REQUIRED)
    if not problems:
        rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
        problems = [*_rope_problems(rope), *_window_problems(stated, content)]
    if len(problems) == 1:
        raise InputError(f"{file}: no LLaMA that is built here: {problems[0]}")
    if problems:
        raise InputError(f"{file} is of no LLaMA that can be converted\n  " + "\n  ".join(problems))
    heads = content["num_attention_heads"]
    return LlamaConfig(
        dim=content["hidden_size"],
        n_layers=content["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=content.get("num_key_value_heads", heads),
        hidden_dim=content["intermediate_size"],
        vocab_size=content["vocab_size"],
        norm_eps=float(content["rms_norm_eps"]),
        rope_theta=float(rope.get("rope_theta", content.get("rope_theta", 10000.0))),
        rope_scaling=_rope_scaling(rope),
        tied=content.get("tie_word_embeddings", False),
        max_seq_len=content["max_position_embeddings"],
        head_dim=content.get("head_dim", 0),
    )


def _window_problems(stated: Mapping[str, Any], content: Mapping[str, Any]) -> list[str]:
    """A window that a sequence of the trained context passes."""
    window, context = content.get("sliding_window"), content["max_position_embeddings"]
    if content["model_type"] != "mistral" or window is None or window >= context:
        return []
    absent = "" if "sliding_window" in stated else "absent, which to transformers is "
    return [
        f"sliding_window is {absent}{window} of {context} positions, expected null or all of them: "
        "attention in a window is not built here"
    ]


def _rope_kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope_problems(rope: Mapping[str, Any]) -> list[str]:
    kind = _rope_kind(rope)
    if not isinstance(kind, str) or kind not in _ROPE_KINDS:
        *first, last = map(repr, _ROPE_KINDS)
        return [f"rope_type is {reprlib.repr(kind)}, expected {', '.join(first)} or {last}"]
    more = {"rope_theta": NUMBER, "partial_rotary_factor": _FIELDS["partial_rotary_factor"]}
    rules = {**_ROPE_KINDS[kind], **{name: more[name] for name in more if name in rope}}
    return [f"rope {problem}" for problem in broken(rope, rules, rules)]


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | LinearScaling | None:
    kind = _rope_kind(rope)
    if kind == "llama3":
        return RopeScaling(**{ours: rope[theirs] for theirs, ours in _LLAMA3_ROPE.items()})
    linear = kind == "linear" and rope["factor"] != 1  # by 1, nothing is scaled
    return LinearScaling(rope["factor"]) if linear else None


def _rope_in_hf(scaling: RopeScaling | LinearScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    theirs = {name: getattr(scaling, ours) for name, ours in _LLAMA3_ROPE.items()}
    return {"rope_type": "llama3", **theirs}


def hf_config(
    config: LlamaConfig, dtype: str, bos_id: int | None, eos_ids: tuple[int, ...]
) -> dict[str, Any]:
    """config.json as transformers, vLLM and llama.cpp read it.

    What came as a Mistral leaves as a LLaMA, which computes the same.

    Args:
        dtype: of the stored tensors: float16, bfloat16 or float32.
        bos_id: None where there is no tokenizer.
        eos_ids: the tokens that end an answer.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_in_hf(config.rope_scaling),
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids) or None,
        "pad_token_id": None,
    }
