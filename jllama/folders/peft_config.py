"""adapter_config.json: an adapter's settings in PEFT's words, written and read."""

import re
import reprlib
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jllama.config import LoraConfig
from jllama.errors import InputError, WrongFields
from jllama.folders.json_files import read_json
from jllama.names import HF_LINEARS, LINEAR_CHOICES

PEFT_CONFIG = "adapter_config.json"
_TARGETS = "target_modules"
# Our settings by PEFT's names.
_OURS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
    _TARGETS: "targets",
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}

# PEFT's values of fields that are absent, and of those that may also be null.
_ABSENT: Mapping[str, Any] = {"r": 8, "lora_alpha": 8}
_NULL: Mapping[str, Any] = {
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    _TARGETS: [HF_LINEARS["wq"], HF_LINEARS["wv"]],  # of LLaMA and Mistral
}

# Fields that would change the arithmetic, and their plain values.
_PLAIN: Mapping[str, tuple] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "alora_invocation_tokens": ([], None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    # PiSSA, OLoRA, CorDA, LoftQ and the like also change the base weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "enable_lora": ([], None),  # of the first versions, for linears that are joined
}
_OTHERS = ("lm_head", "embed_tokens")  # what else of a LLaMA PEFT adapts
_LONGEST = 10_000  # characters of a regular expression


def peft_settings(lora: LoraConfig, base_name: str) -> dict[str, Any]:
    """The content of adapter_config.json; `base_name` is what PEFT loads the base from."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        _TARGETS: [HF_LINEARS[name] for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def lora_settings(file: Path, with_tensors: Collection[str]) -> LoraConfig:
    """The settings in an adapter_config.json.

    Args:
        with_tensors: Hugging Face's names of the linears that the adapter has tensors for. They
            tell what a regular expression (or "all-linear") has matched, and what was excluded;
            none is ever run, for it may take for ever.

    Raises:
        InputError: for what LoRA, rsLoRA and DoRA are not, or with the fields that are wrong.
    """
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        found = reprlib.repr(config.get("peft_type"))
        raise InputError(f"{file}: peft_type {found}, expected 'LORA'")
    extra = [
        f"{field} {reprlib.repr(config[field])}"
        for field, plain in _PLAIN.items()
        if field in config and config[field] not in plain
    ]
    if extra:
        raise InputError(
            f"{file}: not supported here: {', '.join(extra)}; LoRA, rsLoRA and DoRA are"
        )
    said = {**_ABSENT, **config}
    said |= {field: value for field, value in _NULL.items() if said.get(field) is None}
    given = {ours: said[theirs] for theirs, ours in _OURS.items() if theirs != _TARGETS}
    words = [
        f"{_THEIRS[name]} {reprlib.repr(value)}, expected a number"
        for name, value in given.items()
        if isinstance(value, str)  # flags may be text, JSON has numbers
    ]
    if words:
        raise InputError(f"{file}: {'; '.join(words)}")
    targets = _targets(said[_TARGETS], file, with_tensors)
    if config.get("exclude_modules"):
        targets = tuple(with_tensors)
    try:
        return LoraConfig(**given, targets=targets)  # type: ignore[arg-type]
    except WrongFields as wrong:
        problems = "; ".join(f"{_THEIRS[name]} {what}" for name, what in wrong.problems)
        raise InputError(f"{file}: {problems}") from None
    except InputError as error:
        raise InputError(f"{file}: {_TARGETS}: {error}") from None


def _targets(value: Any, file: Path, with_tensors: Collection[str]) -> tuple[str, ...]:
    """Names of linears: a list of them or of the ends of their paths, or an expression for such."""
    if isinstance(value, list) and value and all(isinstance(x, str) and x for x in value):
        names = tuple(name.rpartition(".")[2] for name in value)
        # PEFT passes over names of which no LLaMA has a module, if there are others.
        return tuple(name for name in names if name in (*LINEAR_CHOICES, *_OTHERS)) or names
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST:
        raise InputError(
            f"{file}: {_TARGETS} is {reprlib.repr(value)}, expected names such as q_proj, v_proj, "
            f"or a regular expression of at most {_LONGEST:,} characters"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # of expressions that will change meaning
            re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"{file}: {_TARGETS} {reprlib.repr(value)} is no regular expression ({error})"
        ) from None
    if not with_tensors:
        raise InputError(f"{file}: {_TARGETS} {reprlib.repr(value)}, but no tensor is of a linear")
    return tuple(with_tensors)
