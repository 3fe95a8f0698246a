"""Hugging Face's config.json: read and checked on the way in, written on the way out."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.hf.bitsandbytes import is_nf4
from convert.rules import COUNT, FLAG, NUMBER, Rule, broken
from jllama.config import LlamaConfig, RopeScaling
from jllama.errors import InputError
from jllama.folders.json_files import read_json

_OBJECT: Rule = ("an object", lambda x: isinstance(x, dict))


def _only(value: object) -> Rule:
    return f"{value!r}, all that is built here", lambda x: x == value


# null counts as absent.
_FIELDS: Mapping[str, Rule] = {
    "model_type": _only("llama"),
    "hidden_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT,
    "intermediate_size": COUNT,
    "vocab_size": COUNT,
    "head_dim": COUNT,
    "max_position_embeddings": COUNT,
    "rms_norm_eps": NUMBER,
    "rope_theta": NUMBER,
    "rope_scaling": _OBJECT,
    "rope_parameters": _OBJECT,  # transformers 5: theta and scaling in one
    "tie_word_embeddings": FLAG,
    "attention_bias": _only(False),
    "mlp_bias": _only(False),
    "hidden_act": _only("silu"),
    "quantization_config": (
        "absent or bitsandbytes' nf4; these weights are quantised in another way",
        is_nf4,
    ),
}
_REQUIRED = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "vocab_size", "rms_norm_eps",
)  # fmt: skip
_LLAMA3_ROPE = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_context",
}


def config_from_hf(file: Path) -> LlamaConfig:
    """The config of a Hugging Face LLaMA, with transformers' own values for what is absent.

    Raises:
        InputError: if the model is none that jllama builds; everything that is wrong is listed.
    """
    content = {name: value for name, value in read_json(file).items() if value is not None}
    problems = broken(content, _FIELDS, _REQUIRED)
    if not problems:
        rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
        problems = _rope_problems(rope)
        heads = content["num_attention_heads"]
        head_dim = content.get("head_dim", content["hidden_size"] // heads)
        if head_dim * heads != content["hidden_size"]:
            problems.append(
                f"head_dim is {head_dim}, expected hidden_size {content['hidden_size']} / {heads}"
            )
    if problems:
        raise InputError(f"{file} is of no LLaMA that can be converted\n  " + "\n  ".join(problems))
    scaled = _rope_kind(rope) == "llama3"
    return LlamaConfig(
        dim=content["hidden_size"],
        n_layers=content["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=content.get("num_key_value_heads", heads),
        hidden_dim=content["intermediate_size"],
        vocab_size=content["vocab_size"],
        norm_eps=float(content["rms_norm_eps"]),
        rope_theta=float(rope.get("rope_theta", content.get("rope_theta", 10000.0))),
        rope_scaling=RopeScaling(**{ours: rope[theirs] for theirs, ours in _LLAMA3_ROPE.items()})
        if scaled
        else None,
        tied=content.get("tie_word_embeddings", False),
        max_seq_len=content.get("max_position_embeddings", 2048),
    )


def _rope_kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _rope_problems(rope: Mapping[str, Any]) -> list[str]:
    kind = _rope_kind(rope)
    if kind == "default":
        rules: dict[str, Rule] = {}
    elif kind == "llama3":
        rules = dict.fromkeys(_LLAMA3_ROPE, NUMBER)
        rules["original_max_position_embeddings"] = COUNT
    else:
        return [f"rope_type is {reprlib.repr(kind)}, expected 'default' or 'llama3'"]
    if "rope_theta" in rope:
        rules["rope_theta"] = NUMBER
    return [f"rope {problem}" for problem in broken(rope, rules, rules)]


def hf_config(
    config: LlamaConfig, dtype: str, bos_id: int | None, eos_ids: tuple[int, ...]
) -> dict[str, Any]:
    """config.json as transformers, vLLM and llama.cpp read it.

    Args:
        dtype: of the stored tensors: float16, bfloat16 or float32.
        bos_id: None where there is no tokenizer.
        eos_ids: the tokens that end an answer.
    """
    scaling = config.rope_scaling
    rope = scaling and {
        "rope_type": "llama3",
        **{theirs: getattr(scaling, ours) for theirs, ours in _LLAMA3_ROPE.items()},
    }
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
        "rope_scaling": rope,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids) or None,
        "pad_token_id": None,
    }
