"""Reliability 5 and 15: a damaged file of a model or adapter folder is named, whatever the damage.

And a hand-made file with a right hash of itself is held against what its fields must be.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from random_models import GROUPED, TOKENIZER, model_folder

from jllama.config import LoraConfig
from jllama.errors import InputError
from jllama.folders.adapter import check_base, read_adapter, save_adapter
from jllama.folders.load import load_model
from jllama.folders.manifest import manifest_sha256, read_manifest, write_sealed
from jllama.folders.model import check_manifest, read_block, read_config
from jllama.lora import attach
from jllama.text.row_file import read_rows
from jllama.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A model and an adapter; tests damage a file and put it back, or damage copies."""
    root = tmp_path_factory.mktemp("good")
    folder = model_folder(root, GROUPED)
    model, lora = load_model(folder, "fp32"), LoraConfig(rank=2)
    attach(model, lora, jax.random.key(0))
    passport = {"prompt_style": "plain", "base_manifest_sha256": manifest_sha256(folder)}
    save_adapter(root / "adapter", model, lora, "models/x", passport)
    return root


@pytest.fixture
def model(good, tmp_path) -> Path:
    return Path(shutil.copytree(good / "model", tmp_path / "model"))


def read_model(root: Path) -> None:
    """What every command reads of a model folder before its weights."""
    check_manifest(root / "model", read_config(root / "model"))
    load_tokenizer(root / "model")


def read_blocks(root: Path) -> None:
    for block in ("embeddings", "layers.1"):
        read_block(root / "model", block)


def read_an_adapter(root: Path) -> None:
    check_base(root / "adapter", root / "model")
    read_adapter(root / "adapter", read_config(root / "model"))


def damages(content: bytes, count: int) -> Iterator[bytes]:
    """Bits flipped all over the content, its header first, and cuts."""
    size = len(content)
    for index in range(count):
        place = index if index < count // 4 else index * size // count
        flipped = bytearray(content)
        flipped[place] ^= 1 << index % 8
        yield bytes(flipped)
    for cut in (0, 1, 8, size // 2, size - 2):  # the last byte of JSON is a line's end
        yield content[:cut]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model/config.json", read_model),
        ("model/manifest.json", read_model),
        ("model/tokenizer.model", read_model),
        ("model/blocks/embeddings.safetensors", read_blocks),
        ("model/blocks/layers.1.safetensors", read_blocks),
        ("adapter/adapter_config.json", read_an_adapter),
        ("adapter/adapter_model.safetensors", read_an_adapter),
        ("adapter/jllama.json", read_an_adapter),
    ],
)
def test_a_flipped_bit_or_a_cut_anywhere_is_named_and_refused(name, read, good):
    file = good / name
    content = file.read_bytes()
    try:
        for damaged in damages(content, 100):
            file.write_bytes(damaged)
            with pytest.raises(InputError, match=file.name):
                read(good)
    finally:
        file.write_bytes(content)
    read(good)


def certified_anew(folder: Path, change: Callable[[dict], object]) -> None:
    content = dict(read_manifest(folder))
    change(content)
    write_sealed(folder / "manifest.json", content)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.update(files=["config.json"]), "files is ['config.json']"),
        (lambda m: m["files"].update({"config.json": 3}), "files, config.json is 3"),
        (lambda m: m.pop("tensors"), "tensors is"),
        (lambda m: m.update(tensors=[]), "tensors is []"),
        (lambda m: m["tensors"].update({"norm.weight": None}), "tensors, norm.weight is None"),
        (
            lambda m: m["tensors"]["norm.weight"].update(shape=32),
            "tensors, norm.weight, shape is 32",
        ),
        (
            lambda m: m["tensors"]["norm.weight"].update(dtype="int16"),
            "tensors, norm.weight, dtype is 'int16'",
        ),
        (lambda m: m.update(source=7), "source is 7"),
    ],
)
def test_a_manifest_whose_fields_are_of_a_wrong_kind_is_refused(change, problem, model):
    certified_anew(model, change)
    with pytest.raises(InputError) as refused:
        load_model(model)
    assert str(refused.value).startswith(f"{model / 'manifest.json'}: {problem}")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"rope_scaling": 8}, "not a jllama config"),
        ({"dim": "x"}, "dim x, expected a whole number"),
        ({"n_heads": 3}, "dim 32 is not a multiple of n_heads 3"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_config_of_a_wrong_kind_is_named(fields, problem, model):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    (model / "manifest.json").unlink()
    with pytest.raises(InputError) as refused:
        read_config(model)
    assert str(refused.value).startswith(f"{file}: ")
    assert problem in str(refused.value)


@pytest.mark.parametrize("reason", [errno.EIO, errno.EACCES])
def test_a_block_that_cannot_be_read_is_not_called_missing(reason, model, monkeypatch):
    def fail(*_):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "pread" if reason == errno.EIO else "open", fail)
    with pytest.raises(InputError) as refused:
        read_block(model, "head")
    assert f"head.safetensors: {os.strerror(reason)}" in str(refused.value)


@pytest.mark.parametrize(
    "name", ["jllama.json", "adapter_config.json", "adapter_model.safetensors"]
)
def test_a_pipe_in_place_of_an_adapters_file_ends_in_one_message(name, good, tmp_path):
    adapter = Path(shutil.copytree(good / "adapter", tmp_path / "adapter"))
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    with pytest.raises(InputError, match=rf"{name}: is a named pipe; expected"):
        read_adapter(adapter, read_config(good / "model"))


def test_a_pipe_in_place_of_data_ends_in_one_message(tmp_path):
    os.mkfifo(tmp_path / "rows.json")
    with pytest.raises(InputError, match=r"rows\.json: is a named pipe; expected"):
        read_rows(tmp_path / "rows.json")


def test_verify_lists_every_kind_of_damage(model, capsys):
    pytest.importorskip("torch")
    from convert import verify

    (model / "config.json").write_text("{}")
    (model / "tokenizer.model").write_bytes(TOKENIZER + b"\n")
    blocks = model / "blocks"
    (blocks / "embeddings.safetensors").unlink()
    os.mkfifo(blocks / "embeddings.safetensors")
    (blocks / "layers.0.safetensors").unlink()
    (blocks / "layers.1.safetensors").write_bytes(b"<html>404</html>")
    content = bytearray((blocks / "head.safetensors").read_bytes())
    content[-1] ^= 1
    (blocks / "head.safetensors").write_bytes(content)
    (blocks / "layers.9.safetensors").touch()
    with pytest.raises(SystemExit) as ended:
        verify.main([str(model)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    for words in (
        "config.json differs from manifest.json",
        "tokenizer.model differs from manifest.json",
        "embeddings.safetensors: is a named pipe; expected",
        "layers.0.safetensors: block missing",
        "layers.1.safetensors: damaged",
        "head.safetensors: output.weight differ from manifest.json",
        "layers.9.safetensors: not in manifest.json; remove it",
    ):
        assert words in said


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=50)
@hypothesis.given(data=st.data())
@pytest.mark.parametrize(
    ("name", "read"),
    [("model/manifest.json", read_model), ("adapter/jllama.json", read_an_adapter)],
)
def test_a_sealed_file_of_any_content_is_read_or_refused(name, read, good, data):
    file = good / name
    whole = file.read_bytes()
    content = json.loads(whole)
    place = content
    while isinstance(place, dict) and place:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or data.draw(st.booleans()):
            place[key] = data.draw(VALUES)
            break
        place = place[key]
    content.pop("sha256", None)
    try:
        write_sealed(file, content)
        with contextlib.suppress(InputError):
            read(good)
    finally:
        file.write_bytes(whole)
