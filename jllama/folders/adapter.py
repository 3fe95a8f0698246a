"""The adapter folder: a PEFT adapter, plus `jllama.json` with what PEFT has no word for.

    adapter_model.safetensors   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ...
                                (of older versions adapter_model.bin)
    adapter_config.json         rank, alpha, dropout, targets (peft_config.py)
    jllama.json                 the passport: hashes of both files above, of the base model, of its
                                tokenizer and of the data; prompt style, seed, versions
    chat_template.jinja         the prompt style, for whoever serves the adapter

PEFT adapts Hugging Face's LLaMA: the rows of B for q and k change their order on the way out and
back (`jllama.layers.to_half_rotated`).
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from jllama.config import LlamaConfig, LoraConfig
from jllama.errors import InputError
from jllama.folders.files import room_for, whole_folder
from jllama.folders.json_files import listed, read_json, read_text, write_json, write_whole
from jllama.folders.manifest import (
    BaseEntry,
    check_fields,
    file_sha256,
    manifest_sha256,
    read_sealed,
    write_sealed,
)
from jllama.folders.peft_config import PEFT_CONFIG, lora_settings, peft_settings
from jllama.folders.pickled import map_pickled
from jllama.folders.tensors import is_finite, map_tensors, save_tensors
from jllama.layers import Linear, to_half_rotated, to_interleaved
from jllama.lora import adapted_linears, attach
from jllama.model import Llama, map_named, named_arrays
from jllama.names import HF_LINEARS, peft_name
from jllama.sharding import on_host
from jllama.text.hf_files import TEMPLATE
from jllama.text.prompt import PromptStyle
from jllama.text.style_template import style_template
from jllama.text.tokenizer import Tokenizer, tokenizer_sha256

WEIGHTS, _OLDER_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
PASSPORT = "jllama.json"


class Passport(TypedDict, total=False):
    """jllama.json, without its own hash. One beside a tuned model has neither lora nor files."""

    prompt_style: PromptStyle
    seed: int
    epochs: int
    turns: int  # most questions in a row
    base_manifest_sha256: str
    base: BaseEntry  # the format that its linears were held in, where that is not the folder's
    tokenizer_sha256: str
    data_sha256: str
    versions: dict[str, str]
    lora: dict[str, Any]  # LoraConfig, and its scale
    files: dict[str, str]  # sha256 of PEFT's


_DECLARED: TypeAdapter[Any] = TypeAdapter(Passport)


def weights_file(adapter: str | Path) -> Path:
    """Where an adapter's tensors are: in safetensors, or in what older versions of PEFT wrote."""
    file, older = Path(adapter) / WEIGHTS, Path(adapter) / _OLDER_WEIGHTS
    return older if older.exists() and not file.exists() else file


def row_lengths(linear: Linear) -> np.ndarray:
    """|W| of every output `[O]`, fp32."""
    return np.sqrt(on_host(linear.weight.squared_lengths(jnp.float32)))


def save_adapter(
    path: str | Path,
    model: Llama,
    lora: LoraConfig,
    base_name: str,
    passport: Mapping[str, Any],
    template: str | None = None,
) -> None:
    """Writes the model's adapters as a PEFT folder; of several processes the first one does.

    Args:
        base_name: where a reader finds the base model.
        passport: becomes `jllama.json`, together with the settings and the files' hashes.
        template: the prompt style as a chat template, if there is one.

    Raises:
        InputError: if a value is not finite, the folder exists or the disk is full.
    """
    linears, tensors = adapted_linears(model), {}
    for name, stored in named_arrays(nnx.state(model, nnx.LoRAParam)).items():
        linear, _, part = name.partition(".lora.")
        array = on_host(stored)
        if part == "magnitude":
            array = array + row_lengths(linears[linear])
        heads = model.config.rotary_heads(linear)
        if part != "a" and heads:
            array = to_half_rotated(array, heads)
        tensors[peft_name(name)] = array
    if jax.process_index():
        return
    size = sum(tensor.nbytes for tensor in tensors.values())
    with room_for(size, Path(path)), whole_folder(path) as folder:
        save_tensors(folder / WEIGHTS, tensors, {"format": "pt"}, hashed=False)
        write_json(folder / PEFT_CONFIG, peft_settings(lora, base_name))
        if template is not None:
            write_whole(folder / TEMPLATE, template)
        files = {file.name: file_sha256(file) for file in sorted(folder.iterdir())}
        settings = {**dataclasses.asdict(lora), "scale": lora.scale}
        write_passport(folder, {**passport, "lora": settings, "files": files})


def write_passport(folder: Path, passport: Mapping[str, Any]) -> None:
    """Writes `jllama.json` beside an adapter or a model that was tuned."""
    write_sealed(folder / PASSPORT, passport)


def read_passport(path: str | Path) -> dict[str, Any]:
    """What `jllama.json` says; empty for an adapter from another tool.

    Raises:
        InputError: if it is damaged.
    """
    file, advice = Path(path) / PASSPORT, "copy the adapter again"
    if not file.exists():
        return {}
    content: Any = read_sealed(file, advice)
    check_fields(content, _DECLARED, file, advice)
    return content


def template_of(result: str | Path) -> Path | None:
    """The chat template that an adapter, or a tuned model, brings for the style `chat`.

    Raises:
        InputError: if it is not the one that was written with it.
    """
    path = Path(result)
    file, passport = path / TEMPLATE, read_passport(path)
    if passport.get("prompt_style", "chat") != "chat" or not file.exists():
        return None
    _check_files(path)
    return file


def style_of(adapter: str | Path, tokenizer: Tokenizer) -> str | None:
    """The chat template that an adapter was trained with, if there is one, whatever its style.

    Raises:
        InputError: as for `template_of`.
    """
    file, passport = Path(adapter) / TEMPLATE, read_passport(adapter)
    if file.exists():
        _check_files(file.parent)
        return read_text(file, "a chat template")
    style = passport.get("prompt_style")  # of an adapter without the file
    return style and style_template(style, tokenizer)


def check_base(adapter: str | Path, model: str | Path, *, force: bool = False) -> None:
    """Refuses an adapter that was trained on a different base model, or with another tokenizer.

    Raises:
        InputError: which base it wants; not with `force`.
    """
    passport = read_passport(adapter)
    found = {
        "base_manifest_sha256": ("manifest", manifest_sha256(model)),
        "tokenizer_sha256": ("tokenizer", tokenizer_sha256(model)),
    }
    for key, (what, sha256) in found.items():
        wanted = passport.get(key, sha256)
        if wanted != sha256 and not force:
            name = read_json(Path(adapter) / PEFT_CONFIG).get("base_model_name_or_path")
            raise InputError(
                f"{Path(adapter) / PASSPORT}: this adapter was trained on {name} ({what} "
                f"{str(wanted)[:12]}), but the {what} of {model} is {str(sha256)[:12]}; give the "
                "right --model, or --force"
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
    file = weights_file(path)
    stored = _mapped(file)
    expected = lora.shapes(config)
    keys = {peft_name(name): name for name in expected}
    problems, bare = _layers_without(stored, lora, config.n_layers)
    tensors = {}
    for key, name in keys.items():
        found = stored.get(key)
        if found is None and _place(key) in bare:
            continue
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
            f"{file} does not fit this model; load it on its own base\n  {listed(problems)}"
        )
    bad = [peft_name(name) for name, array in tensors.items() if not is_finite(array)]
    if bad:
        raise InputError(f"{file}: {', '.join(bad[:3])} ({len(bad)} in all) hold NaN or infinity")
    return lora, tensors


def _mapped(file: Path) -> dict[str, np.ndarray]:
    read = map_pickled if file.name == _OLDER_WEIGHTS else map_tensors
    return read(file, "the weights of a PEFT adapter", "copy the adapter again")


def _place(key: str) -> tuple[str, str]:
    """Of which linear and layer a tensor of PEFT's is; empty where it is of none.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight  ->  q_proj, 3
    """
    module, of_lora, _ = key.partition(".lora_")
    layer = re.search(r"\.layers\.(\d+)\.", module)
    linear = module.rpartition(".")[2]
    known = of_lora and layer and linear in HF_LINEARS.values()
    return (linear, layer[1]) if known and layer else ("", "")


def _layers_without(
    keys: Iterable[str], lora: LoraConfig, n_layers: int
) -> tuple[list[str], set[tuple[str, str]]]:
    """Targets that have tensors in some layers only, in words, and the layers that have none."""
    present = set(map(_place, keys))
    problems, bare = [], set()
    for linear in (HF_LINEARS[name] for name in lora.targets):
        layers = {(linear, str(layer)) for layer in range(n_layers)}
        some = sorted(int(layer) for _, layer in layers & present)
        if 0 < len(some) < n_layers:
            shown = ", ".join(map(str, some[:8])) + (", ..." if len(some) > 8 else "")
            problems.append(
                f"{linear}: adapted in layers {shown}, of {n_layers} in this model; an adapter of "
                "some layers only is not supported"
            )
            bare |= layers - present
    return problems, bare


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
    certified = read_passport(path).get("files", {})
    for name in (WEIGHTS, PEFT_CONFIG, TEMPLATE):
        file = path / name
        if name in certified and file.is_file() and file_sha256(file) != certified[name]:
            raise InputError(
                f"{file} differs from {PASSPORT}; it was changed after it was written. "
                f"Copy the adapter again, or remove {PASSPORT} if the change is meant"
            )


def read_lora_config(path: str | Path) -> LoraConfig:
    """A PEFT folder's settings; InputError for what LoRA, rsLoRA and DoRA are not.

    Where there is a passport, both of PEFT's files must be what it certifies.
    """
    path = Path(path)
    _check_files(path)
    tensors = _mapped(weights_file(path)) if (path / PEFT_CONFIG).exists() else {}
    linears = {linear for linear, _ in map(_place, tensors) if linear}
    return lora_settings(path / PEFT_CONFIG, sorted(linears))
