"""bitsandbytes' nf4 in Hugging Face's files, as the nf4 of a model folder.

    model.layers.0.self_attn.q_proj.weight                               uint8 [O * I / 2, 1]
                            ....weight.absmax                            fp32, or 8-bit codes
                            ....weight.quant_map                         fp32 [16]
                            ....weight.quant_state.bitsandbytes__nf4     JSON: sizes, nested_offset
                            ....weight.nested_absmax, .nested_quant_map  of 8-bit codes

Codes are copied. Doubly quantised absmax become the fp32 numbers that they stand for: they share
an absmax across rows, and rows of q and k change their places on the way.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jllama.config import GROUP, NESTED, Base, LlamaConfig, tensor_shapes
from jllama.errors import InputError
from jllama.layers import to_interleaved
from jllama.names import HF_LINEARS, hf_name
from jllama.quantize.formats import LEVELS

STATE = "quant_state.bitsandbytes__nf4"
_PARTS = ("absmax", "quant_map", STATE, "nested_absmax", "nested_quant_map")


def is_nf4(settings: object) -> bool:
    """Whether a `quantization_config` is that of weights which `read` reads."""
    wanted = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return (
        isinstance(settings, dict)
        and all(settings.get(name) == value for name, value in wanted.items())
        and settings.get("bnb_4bit_quant_storage", "uint8") == "uint8"
    )


def base_of_names(names: Mapping[str, Any], config: LlamaConfig) -> Base:
    """The format of a folder with these tensors.

    Raises:
        InputError: if a linear is quantised in some layers only.
    """
    layers: dict[str, list[bool]] = {}  # of each linear: in which layers it is quantised
    for block in tensor_shapes(config).values():
        for name in filter(Base("nf4").holds, block):
            linear = name.removesuffix(".weight").rpartition(".")[2]
            layers.setdefault(linear, []).append(f"{hf_name(name)}.{STATE}" in names)
    for linear, coded in layers.items():
        if any(coded) and not all(coded):
            raise InputError(
                f"{HF_LINEARS[linear]} is quantised in {sum(coded)} of {len(coded)} layers; "
                "expected all or none"
            )
    skip = tuple(linear for linear, coded in layers.items() if not all(coded))
    return Base("nf4", skip, double=False)


def expected_parts(
    name: str, shape: tuple[int, ...], found: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """What belongs to a quantised weight, by Hugging Face's name of it; the state has any size."""
    blocks = -(-shape[0] * shape[1] // GROUP)
    parts: dict[str, tuple[int, ...]] = {
        name: (-(-shape[0] * shape[1] // 2), 1),
        f"{name}.absmax": (blocks,),
        f"{name}.quant_map": (len(LEVELS),),
    }
    if f"{name}.nested_absmax" in found:
        parts |= {f"{name}.nested_absmax": (-(-blocks // NESTED),)}
        parts |= {f"{name}.nested_quant_map": (256,)}
    return parts


def read(
    name: str, shape: tuple[int, int], heads: int | None, tensor: Callable[[str], np.ndarray | None]
) -> dict[str, np.ndarray]:
    """`codes` and `absmax` of a weight in Meta's order of rows.

    Args:
        name: Hugging Face's.
        heads: of rotary pairs in its rows.
        tensor: gives a tensor of the folder, None where there is none.

    Raises:
        InputError: if the state is none of nf4 in blocks of 64, or contradicts the tensors.
    """
    parts = {part: tensor(f"{name}.{part}") for part in _PARTS}
    state = _state(name, parts[STATE])
    double = parts["nested_absmax"] is not None
    wanted = {"quant_type": "nf4", "blocksize": GROUP, "shape": list(shape)}
    wanted |= {"nested_blocksize": NESTED, "nested_dtype": "float32"} if double else {}
    wrong = [f"{key} is {state.get(key)}, expected {value}" for key, value in wanted.items()
             if state.get(key) != value]  # fmt: skip
    if not np.allclose(np.asarray(parts["quant_map"]), LEVELS, rtol=0, atol=1e-6):
        wrong.append("quant_map is not that of nf4")
    if heads and shape[1] % GROUP:
        wrong.append(f"rows of {shape[1]} weights share their absmax, so they cannot change places")
    offset = state.get("nested_offset", 0.0)
    if double and not isinstance(offset, float):
        wrong.append(f"nested_offset is {offset!r}, expected a number")
    if wrong:
        raise InputError(f"{name}: {'; '.join(wrong)}")
    absmax, codes = np.asarray(parts["absmax"]), np.asarray(tensor(name)).reshape(-1)
    if double:
        nested = np.repeat(np.asarray(parts["nested_absmax"]), NESTED)[: absmax.size]
        steps = np.asarray(parts["nested_quant_map"])[absmax]
        absmax = steps * nested + np.float32(offset)
    if heads:
        codes = to_interleaved(codes.reshape(shape[0], -1), heads).reshape(-1)
        absmax = to_interleaved(absmax.reshape(shape[0], -1), heads).reshape(-1)
    return {"codes": codes, "absmax": absmax.astype(np.float32)}


def _state(name: str, packed: np.ndarray | None) -> dict[str, Any]:
    try:
        found = json.loads(np.asarray(packed, np.uint8).tobytes())
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}.{STATE} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{name}.{STATE} is no object of JSON")
    return found
