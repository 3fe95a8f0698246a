"""Reliability 10: whatever names, headers and indexes say, a file is converted whole or refused.

Refused means one InputError, nothing left and nothing written outside. Rows, prompts and settings
are read or refused. Deterministic here; the nightly run draws new cases.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("torch")

import gguf
import hypothesis
import hypothesis.strategies as st
import jax
import safetensors.torch
import torch
from meta_files import random_tensors, write_hf, write_meta
from random_models import GROUPED
from random_models import VOCABULARY as ROWS
from small_tokenizers import files_of_letters, files_of_pieces

from convert import from_hf, from_meta, to_gguf
from convert.from_hf import FromHf
from convert.from_meta import FromMeta
from convert.to_gguf import ToGguf
from eval.prompt_file import read_prompts, read_references
from jllama.cli.settings import settings_from_yaml
from jllama.config import LoraConfig
from jllama.errors import InputError
from jllama.folders.adapter import load_adapter, save_adapter
from jllama.folders.load import load_model
from jllama.folders.manifest import read_manifest
from jllama.lora import attach
from jllama.text.messages import ignored
from jllama.text.prompt import PromptStyle, prompt_ids
from jllama.text.row_file import read_rows
from jllama.text.rows import make_examples
from jllama.text.tokenizer import TiktokenTokenizer, load_tokenizer
from train.config import TrainConfig

PARAMS = GROUPED | {"n_layers": 1}
TENSORS = random_tensors(PARAMS)
NIGHTLY = "JLLAMA_FUZZ" in os.environ  # make nightly: new cases, and more of them
SETTINGS = {"deadline": None, "derandomize": not NIGHTLY, "database": None,
            "max_examples": 1000 if NIGHTLY else 50}  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)
names = st.text(min_size=1, max_size=30) | st.sampled_from(
    ["../x", "/etc/passwd", "a/../../b", "layers.-1.x", f"layers.{10**30}.y", "\0", ".", *TENSORS]
)
# (place as a share of the file, byte)
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    write_meta(root / "meta", TENSORS, PARAMS)
    write_hf(root / "one", TENSORS, PARAMS)
    write_hf(root / "two", TENSORS, PARAMS, files=2)
    from_meta.convert(FromMeta(root / "meta", root / "model"))
    model = load_model(root / "model", "fp32")
    lora = LoraConfig(rank=2)
    attach(model, lora, jax.random.key(0))
    save_adapter(root / "adapter", model, lora, "x", {})
    return root


@contextlib.contextmanager
def copy_of(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as root:
        yield Path(shutil.copytree(folder, Path(root) / folder.name))


def converted_or_refused(convert: Callable, settings: Callable, folder: Path) -> None:
    before = sorted(os.listdir(folder.parent))
    model = folder.parent / "out"
    try:
        convert(settings(folder, model))
    except InputError:
        assert sorted(os.listdir(folder.parent)) == before
    else:
        assert len(read_manifest(model)["tensors"]) == len(TENSORS)
        load_model(model, "fp32")


def edit(file: Path, changes: list[tuple[float, int]], span: int) -> None:
    """Bytes changed within the first `span` ones: the header, not the weights."""
    content = file.read_bytes()
    file.write_bytes(edited(content[:span], changes) + content[span:])


def edited(content: bytes, changes: list[tuple[float, int]]) -> bytes:
    found = bytearray(content)
    for share, byte in changes:
        found[int(share * (len(found) - 1))] = byte
    return bytes(found)


@pytest.mark.parametrize(
    ("folder", "name", "span", "convert", "settings"),
    [
        ("meta", "consolidated.00.pth", 4000, from_meta.convert, FromMeta),
        ("one", "model.safetensors", 1500, from_hf.convert, FromHf),
    ],
)
@hypothesis.settings(**SETTINGS)
@hypothesis.given(changes=edits, cut=st.none() | st.floats(0, 1))
def test_bytes_of_weights(place, folder, name, span, convert, settings, changes, cut):
    with copy_of(place / folder) as source:
        file = source / name
        edit(file, changes, span)
        if cut is not None:
            file.write_bytes(file.read_bytes()[: int(cut * file.stat().st_size)])
        converted_or_refused(convert, settings, source)


@hypothesis.settings(**SETTINGS)
@hypothesis.given(data=st.data())
def test_names_of_tensors(place, data):
    chosen = data.draw(st.lists(st.sampled_from(list(TENSORS)), max_size=3, unique=True))
    renamed = {name: data.draw(names) for name in chosen}
    tensors = {renamed.get(name, name): tensor for name, tensor in TENSORS.items()}
    with copy_of(place / "meta") as meta:
        torch.save(tensors, meta / "consolidated.00.pth")
        converted_or_refused(from_meta.convert, FromMeta, meta)
    with copy_of(place / "one") as hf:
        stored = safetensors.torch.load_file(hf / "model.safetensors")
        fresh = dict(zip(stored, [*renamed.values(), *stored], strict=False))
        moved = {fresh[name]: tensor.clone() for name, tensor in stored.items()}
        safetensors.torch.save_file(moved, hf / "model.safetensors")
        converted_or_refused(from_hf.convert, FromHf, hf)


@hypothesis.settings(**SETTINGS)
@hypothesis.given(data=st.data())
def test_an_index(place, data):
    with copy_of(place / "two") as hf:
        file = hf / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        placed = index["weight_map"]
        files = names | json_values | st.sampled_from(sorted(set(placed.values())))
        for name in data.draw(st.lists(st.sampled_from(list(placed)), min_size=1, max_size=3)):
            placed[name] = data.draw(files)
        whole = data.draw(st.sampled_from([index, {"weight_map": data.draw(json_values)}]))
        file.write_text(json.dumps(whole))
        converted_or_refused(from_hf.convert, FromHf, hf)


@pytest.mark.parametrize(
    ("folder", "name"),
    [("meta", "params.json"), ("one", "config.json"), ("one", "tokenizer.model")],
)
@hypothesis.settings(**SETTINGS)
@hypothesis.given(data=st.data())
def test_a_config(place, folder, name, data):
    with copy_of(place / folder) as source:
        file = source / name
        if name.endswith(".json"):
            content = json.loads(file.read_text())
            known = st.sampled_from(sorted(content))
            numbers = st.integers(-2, 2**70) | st.floats()
            for field in data.draw(st.lists(known, min_size=1, max_size=3)):
                content[field] = data.draw(json_values | numbers)
            file.write_text(json.dumps(content))
        else:
            edit(file, data.draw(edits), 10**6)
        if folder == "meta":
            converted_or_refused(from_meta.convert, FromMeta, source)
        else:
            converted_or_refused(from_hf.convert, FromHf, source)


@hypothesis.settings(**SETTINGS)
@hypothesis.given(data=st.data())
def test_an_adapter(place, data):
    model = load_model(place / "model", "fp32")
    with copy_of(place / "adapter") as adapter:
        (adapter / "jllama.json").unlink()
        if data.draw(st.booleans()):
            edit(adapter / "adapter_model.safetensors", data.draw(edits), 1000)
        else:
            file = adapter / "adapter_config.json"
            content = json.loads(file.read_text())
            for field in data.draw(st.lists(st.sampled_from(sorted(content)), min_size=1)):
                content[field] = data.draw(json_values)
            file.write_text(json.dumps(content))
        with contextlib.suppress(InputError):
            load_adapter(model, adapter)


def changed(draw: Callable, content: Any) -> Any:
    """JSON with one value, somewhere in it, replaced or left out."""
    place, holder, key = content, None, None
    while isinstance(place, dict | list) and place and (holder is None or draw(st.booleans())):
        holder = place
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        place = place[key]
    if draw(st.booleans()):
        holder[key] = draw(json_values | st.integers(0, 600) | token_names)
    else:
        del holder[key]
    return content


def words_of(draw: Callable, files: Mapping[str, str]) -> dict[str, bytes]:
    """A tokenizer's files, one to three of them damaged, some missing."""
    found = {name: text.encode() for name, text in files.items()}
    chosen = st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=3, unique=True)
    for name in draw(chosen):
        how = draw(st.sampled_from(["value", "bytes", "words", "missing"]))
        if how == "value" and name.endswith(".json"):
            found[name] = json.dumps(changed(draw, json.loads(files[name]))).encode()
        elif how == "bytes":
            found[name] = edited(found[name], draw(edits))
        elif how == "words" and name.endswith(".jinja"):
            found[name] = "".join(draw(st.lists(jinja_words, max_size=12))).encode()
        elif how == "missing" and name != "tokenizer.json":
            del found[name]
    return found


token_names = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<think>", "<unk>", "<s>", "</s>", "[PAD3]", "[PAD300]", "a",
     "▁", "", "\0", "<0x0A>", "BPE", "Unigram", "WordLevel", "Split", "NFC", "Metaspace"]
)  # fmt: skip
jinja_words = st.sampled_from(
    ["{{ ", " }}", "{% ", " %}", "for m in messages", "endfor", "m.content", "m['role']", "if ",
     "endif", "bos_token", "{% generation %}", "{% endgeneration %}", "raise_exception('no')",
     "<|im_start|>", "messages[9]", "1/0", "x" * 9, "set a = ", "{#", "{{ m.a.b.c }}",
     "range(10**9)|list", "'a' * 10**12", "macro f()", "f(f)", "{% for i in range(9) %}"]
)  # fmt: skip


@pytest.mark.parametrize("kind", [files_of_letters, files_of_pieces])
@hypothesis.settings(**SETTINGS)
@hypothesis.given(data=st.data())
def test_a_tokenizers_files(place, kind, data):
    with copy_of(place / "one") as hf:
        (hf / "tokenizer.model").unlink()
        for name, content in words_of(data.draw, kind()).items():
            (hf / name).write_bytes(content)
        converted_or_refused(from_hf.convert, FromHf, hf)
        model, file = hf.parent / "out", hf.parent / "m.gguf"
        if not model.exists():
            return
        found = load_tokenizer(model)
        ids = found.encode("the <|im_end|> and \n\0é")
        assert all(0 <= token < ROWS for token in (*ids, found.bos_id, found.eos_id))
        assert isinstance(found.decode([*ids, 10**6]), str)
        with contextlib.suppress(InputError):
            prompt_ids("chat", {"messages": [{"role": "user", "content": "the"}]}, found)
        before = sorted(os.listdir(hf.parent))
        try:
            to_gguf.export(ToGguf(model, file))
        except InputError:
            assert sorted(os.listdir(hf.parent)) == before
        else:
            fields = gguf.GGUFReader(file).fields
            tokens = fields["tokenizer.ggml.tokens"].contents()
            assert len(tokens) == len({*tokens}) == ROWS  # or llama.cpp ends the process
            for name in ("bos", "eos"):
                assert fields[f"tokenizer.ggml.{name}_token_id"].contents() < ROWS


columns = st.sampled_from(
    ["instruction", "input", "output", "prompt", "completion", "messages", "conversations", "text",
     "system", "history", "tools", "role", "content", "from", "value", "weight", "train", "type",
     "temperature", "max_new_tokens", "seed", "user", "assistant", "gpt", "human", "tools",
     "tool_calls", "function", "arguments", "name", "tool", "function_call"]
)  # fmt: skip
texts = columns | st.sampled_from(["</s>", " " * 99, "", "\ud800", "\0"]) | st.text(max_size=9)
row_values = st.recursive(
    texts | st.none() | st.booleans() | st.floats() | st.integers(-2, 2) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(columns, inner, max_size=4),
    max_leaves=12,
)
rows = st.dictionaries(columns, row_values, min_size=1, max_size=4)
tokenizer = TiktokenTokenizer({bytes([byte]): byte for byte in range(256)})


@hypothesis.settings(**SETTINGS)
@hypothesis.given(rows=st.lists(rows, max_size=4), style=st.sampled_from(get_args(PromptStyle)))
def test_rows_of_any_columns(rows, style):
    how = {"max_seq_len": 64, "train_on_prompt": False, "skip_bad_rows": 9, "source": "rows"}
    with contextlib.suppress(InputError):
        examples, _ = make_examples(rows, tokenizer, style, **how)
        assert all(example.learned.any() and not example.learned[0] for example in examples)
    for row in rows:
        with contextlib.suppress(InputError):
            assert {name.partition(".")[0] for name in ignored(row)} <= row.keys()
        with contextlib.suppress(InputError):
            assert prompt_ids(style, row, tokenizer)


@hypothesis.settings(**SETTINGS)
@hypothesis.given(
    content=st.lists(rows, min_size=1, max_size=3),
    shape=st.sampled_from(["[{}]", "{}", '{{"prompts": [{}], "seed": 1}}']),
    indent=st.none() | st.just(1),
    changes=edits,
    cut=st.none() | st.floats(0, 1),
)
def test_a_file_of_rows(content, shape, indent, changes, cut):
    between = "\n" if shape == "{}" else ","
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "rows"
        text = shape.format(between.join(json.dumps(row, indent=indent) for row in content))
        file.write_text(text)
        edit(file, changes, len(text))
        if cut is not None:
            file.write_bytes(file.read_bytes()[: int(cut * len(text))])
        with contextlib.suppress(InputError):
            assert all(isinstance(row, dict) for row in read_rows(file))
        with contextlib.suppress(InputError):
            read_prompts(file, tokenizer, "plain", context=64, flags={})
        with contextlib.suppress(InputError):
            read_references(file)


yaml_words = st.sampled_from(
    ["seed", "epochs", "1", "- ", "? ", ": ", "[", "]", "{", "}", ",", "\n", "  ", "&a ", "*a",
     "<<", "!!int ", "!!binary ", "!", "'", '"', "|", "#", "---", "%YAML 9", "=",
     "2001-99-99", "0x", "~", "\t", ".nan", "1:99", "\ufeff"]
)  # fmt: skip


@hypothesis.settings(**SETTINGS)
@hypothesis.given(words=st.lists(yaml_words | st.text(max_size=4), max_size=12))
def test_a_settings_file(words):
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "settings.yaml"
        file.write_text("".join(words), encoding="utf-8", errors="surrogatepass")
        with contextlib.suppress(InputError):
            settings_from_yaml(TrainConfig, file)
