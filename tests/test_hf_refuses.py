"""Damaged, hostile and foreign Hugging Face folders: each is named, and nothing is left."""

import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")

import safetensors.torch
import torch
from meta_files import random_tensors, write_hf
from random_models import GROUPED, TOKENIZER

from convert import from_hf
from convert.from_hf import FromHf, convert
from jllama.errors import InputError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("hf") / "hf", random_tensors(GROUPED), GROUPED, files=2)


@pytest.fixture
def hf(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "hf"))


def set_json(name: str, **fields):
    def change(folder: Path):
        content = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps(content))

    return change


def set_tensors(change_tensors):
    """In whichever file holds q of layer 1, or the final norm."""

    def change(folder: Path):
        for file in (folder / FIRST, folder / SECOND):
            tensors = safetensors.torch.load_file(file)
            change_tensors(tensors)
            safetensors.torch.save_file(tensors, file)

    return change


def replaced(name: str, value):
    def change(tensors):
        if name in tensors:
            tensors[name] = value(tensors[name])

    return set_tensors(change)


def move_to(target: str):
    """The index sends a tensor to a file outside, and the file is there."""

    def change(folder: Path):
        outside = folder.parent / "outside.safetensors"
        shutil.copy(folder / FIRST, outside)
        index = json.loads((folder / INDEX).read_text())
        where = target.format(outside=outside)
        index["weight_map"] = dict.fromkeys(index["weight_map"], where)
        (folder / INDEX).write_text(json.dumps(index))

    return change


def lie_in_header(find: bytes, put: bytes):
    def change(folder: Path):
        content = (folder / FIRST).read_bytes()
        assert find in content
        assert len(find) == len(put)
        (folder / FIRST).write_bytes(content.replace(find, put, 1))

    return change


def index_swaps(folder: Path):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][Q] = {FIRST: SECOND, SECOND: FIRST}[index["weight_map"][Q]]
    (folder / INDEX).write_text(json.dumps(index))


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


# What is wrong -> how to make it so, and what the message must say
DAMAGE = {
    "index out of the folder": (
        move_to("../outside.safetensors"),
        ["'../outside.safetensors' is no name of a .safetensors file here", "hostile"],
    ),
    "index to an absolute path": (move_to("{outside}"), ["outside.safetensors' is no name"]),
    "index to a pickle": (move_to("pytorch_model.bin"), ["'pytorch_model.bin' is no name"]),
    "index of numbers": (set_json(INDEX, weight_map={Q: 3}), ["'3' is no name"]),
    "index without a map": (set_json(INDEX, weight_map=None), ["no weight_map of tensors"]),
    "index broken": (write(INDEX, b"{"), [f"{INDEX}: line 1: invalid JSON"]),
    "index of endless nesting": (write(INDEX, b'{"a":' * 200_000), [f"{INDEX}: not readable"]),
    "index swaps two files": (index_swaps, [f"{Q}: {INDEX} says model-0000", "has it"]),
    "missing file": (lambda hf: (hf / SECOND).unlink(), [f"{SECOND}: no such file"]),
    "truncated": (
        lambda hf: (hf / FIRST).write_bytes((hf / FIRST).read_bytes()[:-100]),
        [f"{FIRST}: damaged", "download these files again"],
    ),
    "header longer than the file": (
        lambda hf: (hf / FIRST).write_bytes(b"\xff" * 7 + b"\x00" + (hf / FIRST).read_bytes()[8:]),
        [f"{FIRST}: damaged"],
    ),
    "header that lies about a shape": (
        lie_in_header(b'"shape":[32]', b'"shape":[99]'),
        [f"{FIRST}: damaged"],
    ),
    "header that lies about a dtype": (
        lie_in_header(b'"dtype":"F32"', b'"dtype":"F64"'),
        [f"{FIRST}: damaged"],
    ),
    "web page": (write(FIRST, b"<html>404</html>"), [f"{FIRST}: damaged"]),
    "no weights": (
        lambda hf: [file.unlink() for file in hf.glob("model*")],
        ["no weights; expected model.safetensors or model.safetensors.index.json, or pytorch_"],
    ),
    "safetensors under the name of a pickle": (
        lambda hf: [file.rename(hf / "pytorch_model.bin") for file in hf.glob("model*")],
        ["pytorch_model.bin: not a PyTorch archive"],
    ),
    "misshapen tensor": (
        replaced(Q, lambda x: x[:16]),
        [f"{Q} is [16, 32], expected [32, 32]"],
    ),
    "integers": (replaced(NORM, lambda x: x.int()), [f"{NORM} is I32, expected F16, BF16, F32"]),
    "not a number": (
        replaced(Q, lambda x: x * float("nan")),
        [f"{Q} holds NaN or infinity", "nothing was written"],
    ),
    "an extra tensor": (
        lambda hf: (
            safetensors.torch.save_file({"lora": torch.ones(2)}, hf / SECOND),
            set_json(INDEX, weight_map={"lora": SECOND})(hf),
        ),
        [f"{SECOND}: lora [2] is unknown", f"{Q} is missing, expected [32, 32]"],
    ),
    "another model's config": (
        set_json("config.json", num_hidden_layers=1),
        [f"{Q} [32, 32] is unknown", "the weights do not fit config.json"],
    ),
    "biases": (set_json("config.json", attention_bias=True), ["attention_bias is True"]),
    "GELU": (set_json("config.json", hidden_act="gelu"), ["hidden_act is 'gelu', expected 'silu'"]),
    "quantised": (
        set_json("config.json", quantization_config={"bits": 4}),
        ["these weights are quantised"],
    ),
    "yarn": (
        set_json("config.json", rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        ["rope_type is 'yarn', expected 'default', 'linear' or 'llama3'"],
    ),
    "half a llama3 rope": (
        set_json("config.json", rope_parameters={"rope_type": "llama3", "factor": 8.0}),
        ["rope low_freq_factor is None", "rope original_max_position_embeddings is None"],
    ),
    "heads of another size": (
        set_json("config.json", head_dim=16),
        [f"{Q} is [32, 32], expected [64, 32]"],
    ),
    "wrong numbers": (
        set_json("config.json", hidden_size=0, rms_norm_eps="x", vocab_size=10**40),
        ["hidden_size is 0", "rms_norm_eps is 'x'", "vocab_size is 1000"],
    ),
    "a billion layers": (
        set_json("config.json", num_hidden_layers=10**9),
        ["n_layers 1000000000"],
    ),
    "tokenizer too large": (
        write("tokenizer.model", TOKENIZER + b"AAA= 256\n"),
        ["513 tokens, but the weights have 512 rows"],
    ),
    "no tokenizer": (lambda hf: (hf / "tokenizer.model").unlink(), ["no tokenizer"]),
}


def pickled(folder: Path, change=lambda tensors: None, **index) -> Path:
    """The same model as two .bin files with their index."""
    place = {FIRST: "pytorch_model-00001-of-00002.bin", SECOND: "pytorch_model-00002-of-00002.bin"}
    content = json.loads((folder / INDEX).read_text())
    for file, name in place.items():
        tensors = safetensors.torch.load_file(folder / file)
        change(tensors)
        torch.save(tensors, folder / name)
        (folder / file).unlink()
    (folder / INDEX).unlink()
    content["weight_map"] = {name: place[file] for name, file in content["weight_map"].items()}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content | index))
    return folder


class Program:
    """What a hostile .bin holds: unpickling it would make a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def put(value):
    return lambda tensors: tensors.update({Q: value(tensors[Q])} if Q in tensors else {})


def cut(folder: Path):
    file = folder / "pytorch_model-00001-of-00002.bin"
    file.write_bytes(file.read_bytes()[:-2000])


# As above, for pickles: what is put in place of a tensor, or said by the index, or done to a file.
PICKLED = {
    "a program": (
        {"change": put(lambda x: Program(Path("made")))},
        ["refused, it asks for posix"],
    ),
    "a list": ({"change": put(lambda x: [1])}, [f"{Q} (1 in all) not plain fp16, bf16 or fp32"]),
    "whole numbers": ({"change": put(lambda x: x.int())}, [f"{Q} (1 in all) not plain fp16"]),
    "misshapen": ({"change": put(lambda x: x[:16])}, [f"{Q} is [16, 32], expected [32, 32]"]),
    "missing": (
        {"change": lambda tensors: tensors.pop(Q, None)},
        [f"{Q}: pytorch_model.bin.index.json says", "but no file has it"],
    ),
    "unknown": (
        {"change": lambda tensors: tensors.update(extra=torch.ones(2))},
        ["extra is also in pytorch_model-00001-of-00002.bin"],
    ),
    "not a number": (
        {"change": put(lambda x: x * float("nan"))},
        [f"{Q} holds NaN or infinity", "nothing was written"],
    ),
    "index out of the folder": (
        {"weight_map": {Q: "../pytorch_model.bin"}},
        ["'../pytorch_model.bin' is no name of a .bin file here", "hostile"],
    ),
    "index to another kind": (
        {"weight_map": {Q: FIRST}},
        [f"'{FIRST}' is no name of a .bin file"],
    ),
    "missing file": (
        {"weight_map": {Q: "x.bin"}},
        ["x.bin: no such file; expected a file of wei"],
    ),
    "cut": (cut, ["pytorch_model-00001-of-00002.bin: truncated or damaged"]),
}


@pytest.mark.parametrize("what", PICKLED)
def test_damaged_pickles_are_named_and_leave_nothing(what, hf, tmp_path, refusal, monkeypatch):
    monkeypatch.chdir(tmp_path)
    how, fragments = PICKLED[what]
    if callable(how):
        how(pickled(hf))
    else:
        pickled(hf, **how)
    message = refusal(convert, FromHf(hf, tmp_path / "model"))
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_leaves_nothing(what, hf, tmp_path, refusal):
    change, fragments = DAMAGE[what]
    change(hf)
    message = refusal(convert, FromHf(hf, tmp_path / "model"))
    for fragment in fragments:
        assert fragment in message


def test_a_tied_head_that_is_no_copy_is_refused(tmp_path):
    hf = write_hf(tmp_path / "hf", random_tensors(GROUPED, tied=True), GROUPED)
    file = hf / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors | {"lm_head.weight": head}, file)
    convert(FromHf(hf, tmp_path / "copy"))
    head[5, 5] += 1
    safetensors.torch.save_file(tensors | {"lm_head.weight": head}, file)
    with pytest.raises(InputError, match=r"lm_head.weight differs from model.embed_tokens"):
        convert(FromHf(hf, tmp_path / "model"))


def test_metas_files_are_sent_to_the_other_command(original, tmp_path):
    with pytest.raises(InputError, match=r"run: jllama from-meta"):
        convert(FromHf(original, tmp_path / "model"))


def test_the_command_names_what_it_wrote(hf, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from_hf.main(["hf"])
    said = capsys.readouterr().out
    assert "wrote models/hf" in said
    assert "next: jllama train --model models/hf --data FILE" in said
