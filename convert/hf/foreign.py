"""Models of other kinds, and weights in other forms: refused in a line, with what is built here."""

import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from convert.hf.bitsandbytes import is_nf4
from jllama.errors import InputError

_BUILT = "built here are LLaMA, and Mistral without a sliding window"
# Language models; others of the same family end in another head, or in none.
_ARCHITECTURES = ("llamaforcausallm", "mistralforcausallm")  # once LLaMAForCausalLM


def refuse_foreign(config: Mapping[str, Any], file: Path, families: Collection[str]) -> None:
    """Refuses a config.json that is of another kind of model, or of weights in an unknown form.

    Args:
        families: the `model_type` of those that are built here.

    Raises:
        InputError: what it is, in one line.
    """
    family, names = config.get("model_type"), config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else None
    called = f" ({_shown(architecture)})" if isinstance(architecture, str) else ""
    if family is None and {"dim", "n_layers"} <= config.keys():
        raise InputError(f"{file.parent}: is a model folder already, and needs no conversion")
    if family is None:
        raise InputError(f"{file}: no model_type, so it is not said what this model is; {_BUILT}")
    if not isinstance(family, str) or family not in families:
        raise InputError(f"{file}: model_type is {_shown(family)}{called}; {_BUILT}")
    if architecture is not None and str(architecture).lower() not in _ARCHITECTURES:
        raise InputError(
            f"{file}: its architecture is {_shown(architecture)}, expected LlamaForCausalLM or "
            f"MistralForCausalLM, which continue a text; of those {_BUILT}"
        )
    settings = config.get("quantization_config")
    if settings is not None and not is_nf4(settings):
        raise InputError(
            f"{file}: these weights are quantised in another way{_method(settings)} than to "
            "bitsandbytes' nf4, which is read here; give the model that they were made of, which "
            "--base stores in 8 or 4 bits"
        )


def _method(settings: Any) -> str:
    """` ('awq')`, where it is said."""
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return f" ({_shown(method)})" if isinstance(method, str) else ""


def _shown(value: Any) -> str:
    return repr(value[:80]) if isinstance(value, str) else reprlib.repr(value)
