"""Whole folders of fine-tunes through `from-hf` and `to-hf`: nothing is lost, nothing else is read.

What transformers makes of a folder, jllama makes of the model folder, and transformers again of the
export: ids, ends, templates and which ids are learned.
"""

import json
import shutil

import pytest

pytest.importorskip("torch")
import torch
from test_template import MARKED, TURNS, dicts
from test_tokenizer_folders import (
    SAMPLE,
    TEXTS,
    alpaca,
    chatml,
    deepseek,
    llama3,
    saved_again,
    smollm,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from convert.from_hf import main as from_hf
from convert.to_hf import main as to_hf
from jllama.text.prompt import conversation
from jllama.text.tokenizer import load_tokenizer


def both_files(root):
    """ChatML as on the hub: Meta's tokenizer.model, and a tokenizer.json with more tokens."""
    folder = chatml(root)
    (folder / "tokenizer.model").write_bytes(SAMPLE)
    return folder


# How a tokenizer is made, and to what its rows are padded.
FOLDERS = {
    "chatml": (chatml, 1),
    "chatml, both files": (both_files, 1),
    "saved again": (saved_again, 1),
    "alpaca": (alpaca, 1),
    "padded": (alpaca, 64),
    "llama 3": (llama3, 1),
    "smollm": (smollm, 1),
    "deepseek": (deepseek, 1),
}


@pytest.fixture(scope="module", params=FOLDERS)
def folders(request, tmp_path_factory):
    """A source with weights, its model folder, and the export of that."""
    make, multiple = FOLDERS[request.param]
    root = tmp_path_factory.mktemp("folders")
    source, model, back = make(root), root / "model", root / "back"
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = -(-len(tokenizer) // multiple) * multiple
    config = LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(source)
    (source / "chat_template.jinja").write_text(MARKED)
    (source / "README.md").write_text("a card")
    from_hf([str(source), str(model)])
    to_hf([str(model), str(back)])
    return source, model, back


def test_the_tokenizer_is_the_sources_in_and_out(folders):
    source, model, back = folders
    ours = load_tokenizer(model)
    first, last = (AutoTokenizer.from_pretrained(folder) for folder in (source, back))
    for text in TEXTS:
        ids = first(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == ids, text
        assert first(text)["input_ids"] == last(text)["input_ids"], text
    assert (last.bos_token_id, last.eos_token_id) == (first.bos_token_id, first.eos_token_id)
    stated = json.loads((source / "generation_config.json").read_text())["eos_token_id"]
    assert {*ours.stop_ids} == {first.eos_token_id, *(stated if type(stated) is list else [stated])}
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == stated


def test_conversations_and_what_is_learned_are_the_templates(folders):
    source, model, back = folders
    ours = load_tokenizer(model)
    ids, learned = conversation("chat", TURNS, ours)
    prompt, _ = conversation("chat", TURNS[:-1], ours)
    for folder in (source, back):
        theirs = AutoTokenizer.from_pretrained(folder)
        said = theirs.apply_chat_template(
            dicts(TURNS), return_dict=True, return_assistant_tokens_mask=True
        )
        assert said["input_ids"] == ids
        assert [bool(x) for x in said["assistant_masks"]] == learned
        assert prompt == theirs.apply_chat_template(
            dicts(TURNS[:-1]), add_generation_prompt=True, return_dict=False
        )


def test_every_file_of_the_source_comes_back_but_for_what_was_named(folders):
    source, model, back = folders
    for file in source.iterdir():
        if file.name == "config.json":
            assert (model / "hf_config.json").read_bytes() == file.read_bytes()
        elif file.name not in ("README.md", "model.safetensors"):
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name
    before, after = (AutoModelForCausalLM.from_pretrained(x) for x in (source, back))
    assert before.config.eos_token_id == after.config.eos_token_id
    ids = torch.arange(before.config.vocab_size)[None]
    assert torch.equal(before(ids).logits, after(ids).logits)


def test_what_is_dropped_is_named(folders, tmp_path, capsys):
    source, _, _ = folders
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf/merges.txt").write_text("")
    from_hf([str(tmp_path / "hf"), str(tmp_path / "model")])
    assert "nothing here reads it: README.md, merges.txt\n" in capsys.readouterr().out
