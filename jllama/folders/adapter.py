"""The adapter folder: a PEFT adapter, plus `jllama.json` with what PEFT has no word for.

    adapter_model.safetensors   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ...
    adapter_config.json         rank, alpha, dropout, targets
    jllama.json                 the passport: hashes of both files above, of the base model, of its
                                tokenizer and of the data; prompt style, seed, versions

PEFT adapts Hugging Face's LLaMA: the rows of B for q and k change their order on the way out and
back (`jllama.layers.to_half_rotated`).
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from jllama.config import LlamaConfig, LoraConfig
from jllama.errors import InputError
from jllama.folders.files import room_for, whole_folder
from jllama.folders.json_files import read_json, write_json
from jllama.folders.manifest import (
    file_sha256,
    manifest_sha256,
    read_manifest,
    read_sealed,
    write_sealed,
)
from jllama.folders.tensors import save_tensors
from jllama.layers import Linear, to_half_rotated, to_interleaved
from jllama.lora import adapted_linears, attach
from jllama.model import Llama, map_named, named_arrays
from jllama.names import HF_LINEARS, peft_name
from jllama.text.tokenizer import FILE_NAME as TOKENIZER

WEIGHTS, PEFT_CONFIG, PASSPORT = "adapter_model.safetensors", "adapter_config.json", "jllama.json"


def row_lengths(linear: Linear) -> np.ndarray:
    """|W| of every output `[O]`, fp32."""
    return np.sqrt(np.asarray(linear.weight.squared_lengths(jnp.float32)))


def save_adapter(
    path: str | Path, model: Llama, lora: LoraConfig, base_name: str, passport: Mapping[str, Any]
) -> None:
    """Writes the model's adapters as a PEFT folder.

    Args:
        base_name: where a reader finds the base model.
        passport: becomes `jllama.json`, together with the settings and the files' hashes.
    """
    linears, tensors = adapted_linears(model), {}
    for name, stored in named_arrays(nnx.state(model, nnx.LoRAParam)).items():
        linear, _, part = name.partition(".lora.")
        array = np.asarray(stored)
        if part == "magnitude":
            array = array + row_lengths(linears[linear])
        heads = model.config.rotary_heads(linear)
        if part != "a" and heads:
            array = to_half_rotated(array, heads)
        tensors[peft_name(name)] = array
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": [HF_LINEARS[name] for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    with room_for(size, Path(path)), whole_folder(path) as folder:
        save_tensors(folder / WEIGHTS, tensors, {"format": "pt"}, hashed=False)
        write_json(folder / PEFT_CONFIG, config)
        files = {name: file_sha256(folder / name) for name in (WEIGHTS, PEFT_CONFIG)}
        settings = {**dataclasses.asdict(lora), "scale": lora.scale}
        write_passport(folder, {**passport, "lora": settings, "files": files})


def write_passport(folder: Path, passport: Mapping[str, Any]) -> None:
    """Writes `jllama.json` beside an adapter or a model that was tuned."""
    write_sealed(folder / PASSPORT, passport)


def read_passport(path: str | Path) -> dict[str, Any]:
    """What `jllama.json` says; empty for an adapter from another tool."""
    file = Path(path) / PASSPORT
    return read_sealed(file, "copy the adapter again") if file.is_file() else {}


def check_base(adapter: str | Path, model: str | Path, *, force: bool = False) -> None:
    """Refuses an adapter whose passport names another base model, or another tokenizer.

    Raises:
        InputError: which base it wants; not with `force`.
    """
    passport = read_passport(adapter)
    found = {
        "base_manifest_sha256": ("manifest", manifest_sha256(model)),
        "tokenizer_sha256": ("tokenizer", read_manifest(model)["files"].get(TOKENIZER)),
    }
    for key, (what, sha256) in found.items():
        wanted = passport.get(key, sha256)
        if wanted != sha256 and not force:
            name = read_json(Path(adapter) / PEFT_CONFIG).get("base_model_name_or_path")
            raise InputError(
                f"{adapter} was trained on {name} ({what} {str(wanted)[:12]}), but the {what} of "
                f"{model} is {str(sha256)[:12]}; give the right --model, or --force"
            )


def load_adapter(model: Llama, path: str | Path) -> Llama:
    """Attaches a PEFT adapter folder to a model, in place; returns the model.

    Raises:
        InputError: if it is no LoRA adapter, uses what jllama has not, does not fit the model, or
            is damaged.
    """
    lora, tensors = read_adapter(path, model.config)
    put_adapter(model, lora, tensors)
    return model


def read_adapter(path: str | Path, config: LlamaConfig) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """A PEFT folder's settings and arrays, under our names and in Meta's order of rows.

    layers.0.attention.wq.lora.a `[R, in]`, .b `[out, R]`, and DoRA's .magnitude `[out]` as PEFT
    has it: the whole length of a row.

    Raises:
        InputError: as for `load_adapter`.
    """
    path = Path(path)
    lora = read_lora_config(path)
    file = path / WEIGHTS
    try:
        stored = safetensors.numpy.load_file(file)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; expected a PEFT adapter folder") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"{file}: damaged ({error}); copy the adapter again") from error
    expected = lora.shapes(config)
    keys = {peft_name(name): name for name in expected}
    tensors, problems = {}, []
    for key, name in keys.items():
        found = stored.get(key)
        if found is None or found.shape != expected[name]:
            shape = "nothing" if found is None else found.shape
            problems.append(f"{key}: expected {expected[name]}, found {shape}")
            continue
        linear, _, part = name.partition(".lora.")
        heads = config.rotary_heads(linear)
        tensors[name] = to_interleaved(found, heads) if part != "a" and heads else found
    problems += [f"{key}: unknown tensor" for key in sorted(stored.keys() - keys.keys())]
    if problems:
        raise InputError(
            f"{file} does not fit this model; load it on its own base\n  " + "\n  ".join(problems)
        )
    bad = [peft_name(name) for name, array in tensors.items() if not _is_finite(array)]
    if bad:
        raise InputError(f"{file}: {', '.join(bad[:3])} ({len(bad)} in all) hold NaN or infinity")
    return lora, tensors


def _is_finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array.astype(np.float32)).all())


def put_adapter(model: Llama, lora: LoraConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Attaches the arrays of `read_adapter` to a model, in place of any adapter it has."""
    for linear in model.linears().values():
        linear.lora = None
    attach(model, lora, jax.random.key(0))
    linears = adapted_linears(model)

    def fill(name, _):
        linear, _, part = name.partition(".lora.")
        array = tensors[name].astype(np.float32)
        return jnp.asarray(array - row_lengths(linears[linear]) if part == "magnitude" else array)

    nnx.update(model, map_named(fill, nnx.state(model, nnx.LoRAParam)))


def _check_files(path: Path) -> None:
    for name, certified in read_passport(path).get("files", {}).items():
        if (path / name).is_file() and file_sha256(path / name) != certified:
            raise InputError(
                f"{path / name} differs from {PASSPORT}; it was changed after it was written. "
                f"Copy the adapter again, or remove {PASSPORT} if the change is meant"
            )


# Fields of adapter_config.json that would change the arithmetic, and their plain values.
_PLAIN: dict[str, tuple] = {
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layers_to_transform": ([], None),
    "layer_replication": ([], None),
    "alora_invocation_tokens": ([], None),
    "use_qalora": (False, None),
    # PiSSA, OLoRA, CorDA, LoftQ and the like also change the base weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def read_lora_config(path: str | Path) -> LoraConfig:
    """A PEFT folder's settings; InputError for what LoRA, rsLoRA and DoRA are not.

    Where there is a passport, both of PEFT's files must be what it certifies.
    """
    _check_files(Path(path))
    file = Path(path) / PEFT_CONFIG
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type {config.get('peft_type')!r}, expected 'LORA'")
    extra = [
        f"{field} {config[field]!r}"
        for field, plain in _PLAIN.items()
        if field in config and config[field] not in plain
    ]
    if extra:
        raise InputError(
            f"{file}: not supported here: {', '.join(extra)}; LoRA, rsLoRA and DoRA are"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise InputError(f"{file}: r {rank!r} and lora_alpha {alpha!r}, expected two numbers")
    targets = config.get("target_modules")
    if isinstance(targets, str):
        targets = [name for name in HF_LINEARS.values() if re.fullmatch(targets, name)]
    if not targets:
        raise InputError(f"{file}: no target_modules; expected names such as q_proj, v_proj")
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        dropout=config.get("lora_dropout", 0.0),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        targets=tuple(name.rpartition(".")[2] for name in targets),
    )
