"""Meta's files to a model folder and back: what is certified, and what other programs say."""

import hashlib
import json
import os
import shutil
import signal
import tracemalloc
from collections import namedtuple
from pathlib import Path

import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from meta_files import random_tensors, write_meta
from random_models import BASE, GROUPED, TOKENIZER, VOCABULARY

from convert import from_meta, to_meta
from convert.from_meta import FromMeta, convert
from convert.to_meta import ToMeta, export
from jllama.errors import InputError
from jllama.folders import files
from jllama.folders.load import load_model
from jllama.folders.model import ModelWriter, read_block, read_config
from jllama.text.tokenizer import load_tokenizer

SCALED = BASE | {"n_kv_heads": 2, "rope_theta": 500000.0, "use_scaled_rope": True}


def manifest(model: Path) -> dict:
    return json.loads((model / "manifest.json").read_text())["tensors"]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def load(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_manifest_certifies_the_very_bytes_of_meta_in_their_dtype(dtype, tmp_path):
    tensors = random_tensors(BASE, dtype=dtype)
    convert(FromMeta(write_meta(tmp_path / "meta", tensors, BASE), tmp_path / "model"))
    assert manifest(tmp_path / "model") == {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(dtype).removeprefix("torch."),
            "sha256": sha256(tensor),
        }
        for name, tensor in tensors.items()
    }
    stored = read_block(tmp_path / "model", "embeddings")["tok_embeddings.weight"]
    assert stored.tobytes() == tensors["tok_embeddings.weight"].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("embeddings_by", [0, 1])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_give_the_manifest_of_the_whole(shards, embeddings_by, tied, tmp_path):
    tensors = random_tensors(BASE, tied=tied)
    copied = tensors | ({"output.weight": tensors["tok_embeddings.weight"]} if tied else {})
    src = write_meta(tmp_path / "m", copied, BASE, shards=shards, embeddings_by=embeddings_by)
    convert(FromMeta(src, tmp_path / "model"))
    found = {name: entry["sha256"] for name, entry in manifest(tmp_path / "model").items()}
    assert found == {name: sha256(tensor) for name, tensor in tensors.items()}
    assert read_config(tmp_path / "model").tied == tied


@pytest.mark.parametrize(("params", "tied"), [(BASE, False), (GROUPED, True), (SCALED, True)])
def test_round_trip_gives_back_every_byte_and_the_same_config(params, tied, tmp_path):
    tensors = random_tensors(params, dtype=torch.bfloat16, tied=tied)
    convert(FromMeta(write_meta(tmp_path / "meta", tensors, params), tmp_path / "model"))
    export(ToMeta(tmp_path / "model", tmp_path / "back"))
    export(ToMeta(tmp_path / "model", tmp_path / "twice"))
    convert(FromMeta(tmp_path / "back", tmp_path / "model2"))

    back = load(tmp_path / "back" / "consolidated.00.pth")
    if tied:
        assert torch.equal(back.pop("output.weight"), tensors["tok_embeddings.weight"])
    assert {name: sha256(tensor) for name, tensor in back.items()} == {
        name: sha256(tensor) for name, tensor in tensors.items()
    }
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == TOKENIZER
    for name in ("consolidated.00.pth", "params.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "back")) == [
        "consolidated.00.pth",
        "params.json",
        "tokenizer.model",
    ]
    assert read_config(tmp_path / "model2") == read_config(tmp_path / "model")
    assert manifest(tmp_path / "model2") == manifest(tmp_path / "model")


def test_no_more_than_two_blocks_are_ever_held(tmp_path):  # lesson 20
    params = BASE | {"dim": 128, "n_layers": 16}
    tensors = random_tensors(params)
    src = write_meta(tmp_path / "meta", tensors, params, shards=2)  # two, or nothing is joined
    block = 4 * sum(t.numel() for name, t in tensors.items() if name.startswith("layers.0."))
    tracemalloc.start()
    convert(FromMeta(src, tmp_path / "model"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert block < peak < 4 * block  # of 16: two blocks, and what Python itself allocates


def test_meta_files_without_a_name_go_to_the_models_folder(original, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    convert(FromMeta(original))
    assert read_config(tmp_path / "models" / "a").n_kv_heads == 2
    printed = capsys.readouterr().out
    assert "jllama train --model models/a" in printed
    assert "55,968 parameters, float32, 223,872 bytes" in printed


def test_the_tokenizer_is_found_one_folder_above_as_meta_ships_llama_1(meta, tmp_path):
    (meta / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    convert(FromMeta(meta, tmp_path / "model"))
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == TOKENIZER


def test_shapes_come_from_the_tensors_where_params_json_is_silent(tmp_path):  # lesson 21
    params = BASE | {"vocab_size": -1}  # as Meta wrote it, and without n_kv_heads
    convert(FromMeta(write_meta(tmp_path / "meta", random_tensors(BASE), params), tmp_path / "m"))
    config = read_config(tmp_path / "m")
    assert (config.vocab_size, config.n_kv_heads) == (VOCABULARY, BASE["n_heads"])


def test_flags_override_what_params_json_does_not_say(tmp_path):
    src = write_meta(tmp_path / "meta", random_tensors(SCALED), SCALED)
    (src / "params.json").write_text(json.dumps({"model": SCALED}))  # as newer files nest it
    convert(FromMeta(src, tmp_path / "m", rope_scaling_factor=4.0, max_seq_len=512))
    config = read_config(tmp_path / "m")
    assert (config.rope_scaling.factor, config.max_seq_len) == (4.0, 512)
    export(ToMeta(tmp_path / "m", tmp_path / "back"))
    convert(FromMeta(tmp_path / "back", tmp_path / "m2"))
    assert read_config(tmp_path / "m2") == config


@pytest.fixture
def model(original, tmp_path):
    convert(FromMeta(original, tmp_path / "model"))
    return tmp_path / "model"


def free_space(monkeypatch, *answers: int) -> None:
    remaining = list(answers)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(remaining.pop(0)))


def test_a_small_disk_is_refused_before_writing_and_says_what_is_missing(
    original, tmp_path, monkeypatch
):
    free_space(monkeypatch, 1000)
    needed = 55_968 * 4 + 16 * 2**20
    with pytest.raises(InputError, match=f"{needed - 1000:,} bytes are missing on this disk"):
        convert(FromMeta(original, tmp_path / "model"))
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_while_writing_is_named_too(original, tmp_path, monkeypatch):
    free_space(monkeypatch, 10**12, 0)

    def full(*_):
        raise ValueError("No space left on device")

    monkeypatch.setattr(ModelWriter, "write_block", full)
    with pytest.raises(InputError, match="bytes are missing on this disk"):
        convert(FromMeta(original, tmp_path / "model"))
    assert os.listdir(tmp_path) == []


def test_a_conversion_that_was_stopped_goes_on_where_it_was(
    original, tmp_path, monkeypatch, capsys
):
    def write(self, block, tensors):
        if block == "layers.1" and signals:
            os.kill(os.getpid(), signals.pop())
        write_block(self, block, tensors)
        written.append(block)

    written: list[str] = []
    signals = [signal.SIGINT]
    write_block = ModelWriter.write_block
    monkeypatch.setattr(ModelWriter, "write_block", write)
    command = [str(original), str(tmp_path / "model")]
    with pytest.raises(SystemExit) as stopped:
        from_meta.main(command)
    assert stopped.value.code == 130
    assert "converting stopped after 2 of 4 blocks; the same command" in capsys.readouterr().out
    assert os.listdir(tmp_path) == [".model.partial"]

    damaged = tmp_path / ".model.partial" / "blocks" / "embeddings.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # is written again
    from_meta.main(command)
    assert written == ["embeddings", "layers.0", "embeddings", "layers.1", "head"]
    convert(FromMeta(original, tmp_path / "at once"))
    assert contents(tmp_path / "model") == contents(tmp_path / "at once")
    assert sorted(os.listdir(tmp_path)) == ["at once", "model"]


def test_a_stopped_conversion_of_other_files_is_not_gone_on_with(meta, tmp_path):
    def stopped():
        with files.whole_folder(tmp_path / "model", {"files": []}) as folder:
            (folder / "theirs").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (tmp_path / ".model.partial" / "theirs").exists()
    convert(FromMeta(meta, tmp_path / "model"))
    assert "theirs" not in os.listdir(tmp_path / "model")


def test_two_processes_do_not_write_one_folder(original, tmp_path):
    with (
        files.whole_folder(tmp_path / "model"),
        pytest.raises(InputError, match="model is being written by another process"),
    ):
        convert(FromMeta(original, tmp_path / "model"))
    shutil.rmtree(tmp_path / "model")
    convert(FromMeta(original, tmp_path / "model"))


def test_the_commands_convert_and_export(original, tmp_path, capsys):
    from_meta.main([str(original), str(tmp_path / "model")])
    to_meta.main([str(tmp_path / "model"), str(tmp_path / "back")])
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'model'}" in printed
    assert (
        f"wrote {tmp_path / 'back'}: consolidated.00.pth, params.json, tokenizer.model" in printed
    )


@pytest.fixture(scope="module")
def expected(assets):
    return np.load(assets / "stories260K-expected.npz")


def write_bf16_llama_3(assets: Path, folder: Path) -> Path:
    """The same weights in bf16, cut as Llama 3 is."""
    tensors = load(assets / "stories260K-meta" / "consolidated.00.pth")
    tensors = {k: v.to(torch.bfloat16) for k, v in tensors.items() if k != "rope.freqs"}
    params = json.loads((assets / "stories260K-meta" / "params.json").read_text())
    write_meta(folder, tensors, params, shards=2, embeddings_by=0)
    shutil.copy(assets / "stories260K-meta" / "tokenizer.model", folder)
    return folder


# What is in the expected outputs' names -> the files
REAL = {
    "": lambda assets, _: assets / "stories260K-meta",
    "_meta_fp16_2shard": lambda assets, _: assets / "stories260K-meta-fp16-2shard",
    "_meta_bf16_2shard_l3": write_bf16_llama_3,
}


@pytest.mark.real
@pytest.mark.parametrize("suffix", REAL)
def test_real_weights_give_the_logits_and_greedy_ids_of_other_programs(
    suffix, assets, expected, tmp_path
):
    convert(FromMeta(REAL[suffix](assets, tmp_path / "meta"), tmp_path / "model"))
    model = load_model(tmp_path / "model", "fp32")
    ids = np.stack([expected[f"p{prompt}_tokens{suffix}"] for prompt in range(3)])
    graph, state = nnx.split(model)
    logits = np.asarray(jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, jnp.asarray(ids)))
    for prompt in range(3):
        given = len(expected[f"p{prompt}_prompt"])
        first16 = expected[f"p{prompt}_logits16{suffix}"]
        np.testing.assert_allclose(logits[prompt, :16], first16, rtol=0, atol=2e-5)
        # Fed its own output, greedy decoding says at every position what comes next.
        greedy = logits[prompt].argmax(axis=-1)
        assert (greedy[given - 1 : -1] == ids[prompt, given:]).all()


@pytest.mark.real
@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_tokenizers_give_the_published_ids(family, assets):
    folder = assets / "tokenizers"
    tokenizer = load_tokenizer(folder / f"{family}_tokenizer.model")
    for row in json.loads((folder / "expected.json").read_text()):
        assert tokenizer.encode(row["text"]) == row[family]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.model", "manifest.json", "blocks"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_model_folder_is_named_and_refused(model, file, damage):  # reliability 5
    damaged = model / (file if file != "blocks" else "blocks/layers.1.safetensors")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        damaged.unlink()
    else:
        damaged.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    load = load_tokenizer if file == "tokenizer.model" else load_model
    with pytest.raises(InputError, match=damaged.name):
        load(model)
