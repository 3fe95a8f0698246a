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

from convert import from_hf, from_meta, to_hf
from convert.from_hf import FromHf, convert
from convert.from_meta import FromMeta
from convert.to_hf import ToHf
from jllama.errors import InputError
from jllama.folders.load import load_model

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


BUILT = "built here are LLaMA, and Mistral without a sliding window"


def foreign(model_type: str, architecture: str):
    return {"model_type": model_type, "architectures": [architecture]}, [
        f"config.json: model_type is '{model_type}' ('{architecture}'); {BUILT}"
    ]


# What config.json says of a model that is none of ours, and what is said of that, in one line.
FOREIGN = {
    "gpt2": foreign("gpt2", "GPT2LMHeadModel"),
    "qwen2": foreign("qwen2", "Qwen2ForCausalLM"),
    "gemma": foreign("gemma2", "Gemma2ForCausalLM"),
    "mixtral": foreign("mixtral", "MixtralForCausalLM"),
    "phi3": foreign("phi3", "Phi3ForCausalLM"),
    "Llama 4": foreign("llama4", "Llama4ForConditionalGeneration"),
    "Ministral": foreign("ministral", "MinistralForCausalLM"),
    "an encoder": foreign("bert", "BertForMaskedLM"),
    "an encoder and a decoder": foreign("t5", "T5ForConditionalGeneration"),
    "no word of it": (
        {"model_type": ...}, [f"no model_type, so it is not said what this model is; {BUILT}"]
    ),
    "a number": ({"model_type": 3}, ["model_type is 3"]),
    "a classifier": (
        {"architectures": ["LlamaForSequenceClassification"]},
        ["its architecture is 'LlamaForSequenceClassification', expected LlamaForCausalLM", BUILT],
    ),
    "Mistral with a window": (
        {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768},
        ["sliding_window is 4096 of 32768 positions, expected null or all of them"],
    ),
    "Mistral without a word of its window": (
        {"model_type": "mistral", "max_position_embeddings": 32768},
        ["sliding_window is absent, which to transformers is 4096 of 32768 positions"],
    ),
    "biases of attention": (
        {"attention_bias": True},
        ["no LLaMA that is built here: attention_bias is True, expected False"],
    ),
    "biases of the feed-forward layer": ({"mlp_bias": True}, ["mlp_bias is True, expected False"]),
    "half of each head turned": (
        {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5, expected 1.0"]
    ),
    **{
        f"rope {kind}": (
            {"rope_scaling": {"rope_type": kind, "factor": 2.0}},
            [f"rope_type is '{kind}', expected 'default', 'linear' or 'llama3'"],
        )
        for kind in ("yarn", "dynamic", "longrope")
    },
    "rope yarn, as it once was written": (
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        ["rope_type is 'yarn'"],
    ),
    "linear rope without a factor": (
        {"rope_scaling": {"rope_type": "linear"}}, ["rope factor is None, expected a positive num"]
    ),
    **{
        method: (
            {"quantization_config": {"quant_method": method, "bits": 4}},
            [f"quantised in another way ('{method}') than to bitsandbytes' nf4", "--base stores"],
        )
        for method in ("gptq", "awq", "compressed-tensors", "fp8")
    },
    "8 bits": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        ["quantised in another way ('bitsandbytes') than to bitsandbytes' nf4"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_llama_is_refused_in_one_line(what, hf, tmp_path, refusal):
    fields, fragments = FOREIGN[what]
    content = json.loads((hf / "config.json").read_text()) | fields
    content = {name: value for name, value in content.items() if value is not ...}
    (hf / "config.json").write_text(json.dumps(content))
    message = refusal(convert, FromHf(hf, tmp_path / "model"))
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def put_adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def put_file(name: str):
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(b"GGUF")
        return folder / name

    return make


# What is given in place of the folder of a model: how to make it, and what is said of it.
OTHER_KINDS = {
    "an adapter": (put_adapter, "an adapter; give the base model that it belongs to, and this"),
    "a GGUF file": (put_file("a.gguf"), "a GGUF file; jllama writes such files and reads none"),
    "a folder of GGUF files": (
        lambda folder: put_file("a.gguf")(folder).parent, "has a.gguf, a GGUF file; jllama writes"
    ),
    "a file of weights": (put_file("model.safetensors"), "a file; expected the folder of a model"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER_KINDS)
def test_what_is_no_folder_of_a_model_is_refused_in_one_line(what, tmp_path, refusal):
    make, words = OTHER_KINDS[what]
    (tmp_path / "src").mkdir()
    given = make(tmp_path / "src")
    messages = [
        refusal(convert, FromHf(given, tmp_path / "model")),
        refusal(from_meta.convert, FromMeta(given, tmp_path / "model")),
        refusal(to_hf.export, ToHf(given, tmp_path / "out")),
        refusal(load_model, given),
    ]
    for message in messages:
        assert message.startswith(f"{given}: {words}")
        assert "\n" not in message


def test_a_model_folder_needs_no_conversion(original, tmp_path, refusal):
    from_meta.convert(FromMeta(original, tmp_path / "model"))
    said = refusal(convert, FromHf(tmp_path / "model", tmp_path / "again"))
    assert said == f"{tmp_path / 'model'}: is a model folder already, and needs no conversion"


def test_metas_files_are_sent_to_the_other_command(original, tmp_path):
    with pytest.raises(InputError, match=r"run: jllama from-meta"):
        convert(FromHf(original, tmp_path / "model"))


def test_the_command_names_what_it_wrote(hf, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from_hf.main(["hf"])
    said = capsys.readouterr().out
    assert "wrote models/hf" in said
    assert "next: jllama train --model models/hf --data FILE" in said
