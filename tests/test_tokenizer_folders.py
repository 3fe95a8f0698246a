"""Folders of fine-tunes: their own tokens, ends and files, in and out, beside transformers."""

import json
import random
import shutil

import pytest

pytest.importorskip("torch")
import hf_models
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
from gguf import GGUFWriter, TokenType
from random_models import BASE, TOKENIZER, model_folder
from tokenizers import decoders, models, pre_tokenizers, trainers
from train_runs import as_flags
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import jllama
from convert.from_hf import main as from_hf
from convert.gguf.metadata import add_vocabulary
from convert.gguf.vocabulary import read_vocabulary
from convert.hf.tokenizer import read_hf_tokenizer, write_hf_tokenizer
from convert.to_hf import main as to_hf
from convert.to_meta import main as to_meta
from jllama import bundled
from jllama.cli import children
from jllama.errors import InputError
from jllama.folders.adapter import PASSPORT
from jllama.text.json_tokenizer import JsonTokenizer
from jllama.text.tokenizer import SentencePieceTokenizer, TiktokenTokenizer, tokenizer_of

SAMPLE = (bundled.SAMPLE / "tokenizer.model").read_bytes()
CHATML = ["<|im_start|>", "<|im_end|>"]
PARTS = ["the", " ", "  ", "\n", "\t", "1234", "é", "日本", "🚀", "'RE", "▁", "<s>", "</s>",
         "<|im_end|>", "<think>", "[PAD]", "opposite", "<0x0A>", "\u200d", "Ġ", "x"]  # fmt: skip
DRAW = random.Random(0)
TEXTS = ["".join(DRAW.choices(PARTS, k=DRAW.randrange(12))) for _ in range(200)]


def saved(tokenizer, folder):
    """By transformers, with a config.json of a LLaMA beside it."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    return folder


def exported(content, folder):
    folder.mkdir()
    write_hf_tokenizer(content, folder, 512)
    return AutoTokenizer.from_pretrained(folder)


def saved_again(root):
    """A Llama 2 that transformers 5 saved: tokenizer.json alone."""
    return saved(exported(SAMPLE, root / "a"), root / "b")


def chatml(root):
    tokenizer = exported(SAMPLE, root / "a")
    tokenizer.add_special_tokens({"additional_special_tokens": CHATML, "eos_token": CHATML[1]})
    return saved(tokenizer, root / "b")


def alpaca(root):
    tokenizer = exported(SAMPLE, root / "a")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return saved(tokenizer, root / "b")


def llama3(root):
    """Specials renamed and more added, one of which is text like any other."""
    folder = saved(exported(TOKENIZER, root / "a"), root / "b")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    for index, name in ((9, "<|im_end|>"), (200, "<|im_start|>")):
        content["added_tokens"][index]["content"] = name
    plain = content["added_tokens"][0] | {"special": False}
    content["added_tokens"].append(plain | {"id": 512, "content": "<think>"})
    file.write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_end|>"}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 265]}')
    return folder


def byte_level(root, specials, bos, eos):
    """Trained here: words as GPT-2 cuts them, digits one by one."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([row["output"] for row in ROWS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    return saved(fast, root / "b")


ROWS = json.loads(bundled.ROWS.read_text())


def smollm(root):
    return byte_level(root, ["<|endoftext|>", *CHATML], *CHATML)


def deepseek(root):
    return byte_level(root, marks := ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], *marks)


@pytest.mark.parametrize("make", [saved_again, chatml, alpaca, llama3, smollm, deepseek])
def test_ids_and_ends_are_those_of_transformers(make, tmp_path):
    folder = make(tmp_path)
    ours, hf = (
        tokenizer_of(read_hf_tokenizer(folder), folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert isinstance(ours, JsonTokenizer)
    for text in TEXTS:
        ids = hf(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == ids, text
        marked = [ours.bos_id, *ids, ours.eos_id]
        assert ours.decode(marked) == hf.decode(marked, skip_special_tokens=True), text
    assert (ours.bos_id, ours.eos_id) == (hf.bos_token_id, hf.eos_token_id)
    assert ours.vocab_size == len(hf)
    stated = {"llama3": {257, 265}}.get(make.__name__, {2})
    assert {*ours.stop_ids} == stated | {hf.eos_token_id}
    for name in hf.all_special_tokens:
        assert ours.special(name) == hf.convert_tokens_to_ids(name)
    assert ours.decode([ours.vocab_size + 3]) == ""
    assert ours.piece(ours.vocab_size + 3) == f"<id {ours.vocab_size + 3}>"
    assert "".join(map(ours.piece, ours.encode("the opposite"))).strip() == "the opposite"


def test_a_sentencepiece_model_is_given_the_names_of_added_tokens(tmp_path):
    """As slow tokenizers were saved: tokenizer.model, and the rest in small files."""
    size = SentencePieceTokenizer(SAMPLE).vocab_size
    (tmp_path / "tokenizer.model").write_bytes(SAMPLE)
    numbered = {name: size + n for n, name in enumerate(CHATML)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(numbered))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": size + 1}))
    ours = tokenizer_of(read_hf_tokenizer(tmp_path), tmp_path)
    assert isinstance(ours, SentencePieceTokenizer)
    assert (ours.vocab_size, ours.eos_id, ours.stop_ids) == (size + 2, size + 1, (size + 1,))
    assert ours.special("<|im_start|>") == size
    assert ours.piece(size) == "<|im_start|>"
    assert ours.decode([*ours.encode("the dog"), size, size + 1]) == "the dog"
    assert ours.encode("<|im_end|>") == SentencePieceTokenizer(SAMPLE).encode("<|im_end|>")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    vocabulary = read_vocabulary(tmp_path)
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    add_vocabulary(writer, vocabulary)
    assert writer.kv_data[0]["tokenizer.chat_template"].value == "{{ messages }}"
    assert vocabulary.tokens[size:] == CHATML
    assert vocabulary.types[size:] == [TokenType.CONTROL] * 2
    assert vocabulary.stop_ids == (size + 1,)


def test_llama_3s_reserved_tokens_may_bear_any_number(tmp_path):
    """As Hugging Face's 3.1 counts them, beside Meta's own file."""
    exported(TOKENIZER, tmp_path / "hf")
    file = tmp_path / "hf/tokenizer.json"
    content = json.loads(file.read_text())
    for index in (5, *range(11, 256)):
        number = 2 if index == 5 else index - 8
        content["added_tokens"][index]["content"] = f"<|reserved_special_token_{number}|>"
    file.write_text(json.dumps(content))
    files = read_hf_tokenizer(tmp_path / "hf")
    assert isinstance(tokenizer_of(files, tmp_path), TiktokenTokenizer)
    content["added_tokens"][9]["content"] = "<|reserved_special_token_900|>"
    renamed = files | {"tokenizer.json": json.dumps(content).encode()}
    assert isinstance(tokenizer_of(renamed, tmp_path), JsonTokenizer)


def test_metas_own_file_is_used_where_it_has_all_tokens(tmp_path):
    for content, kind in ((SAMPLE, SentencePieceTokenizer), (TOKENIZER, TiktokenTokenizer)):
        folder = tmp_path / kind.__name__
        exported(content, folder)
        (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
        ours = tokenizer_of(read_hf_tokenizer(folder), folder)
        assert type(ours) is kind
        assert {1, 2} <= {*ours.stop_ids}


def alpaca_of_old(root):
    """tokenizer.model, and [PAD] in small files."""
    (root / "b").mkdir()
    (root / "b" / "tokenizer.model").write_bytes(SAMPLE)
    (root / "b" / "added_tokens.json").write_text('{"[PAD]": 2048}')
    (root / "b" / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    return root / "b"


def of_rows(folder, rows):
    """A random model with so many rows beside a tokenizer; gives transformers' model."""
    sizes = hf_models.SIZES | {"vocab_size": rows}
    kept = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "config.json"}
    peer = hf_models.saved(folder, hf_models.LLAMA(**sizes))
    (folder / "tokenizer.model").unlink()
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    return peer


@pytest.mark.parametrize("make", [alpaca, alpaca_of_old])
@pytest.mark.parametrize("rows", [2048, 2049, 2112])  # without one for [PAD], with it, padded to 64
def test_a_padding_token_needs_no_row(make, rows, tmp_path):
    folder = make(tmp_path)
    peer = of_rows(folder, rows)
    from_hf([str(folder), str(tmp_path / "model")])
    ours = jllama.load_tokenizer(tmp_path / "model")
    assert ours.vocab_size == min(rows, 2049)
    for text in (*TEXTS, "a [PAD] b"):
        assert max(ours.encode(text) + ours.marked(text), default=0) < rows
        plain = SentencePieceTokenizer(SAMPLE).encode(text)
        if make is alpaca_of_old:
            assert ours.encode(text) == plain
    if rows > 2048:
        assert ours.special("[PAD]") == 2048
        assert 2048 in ours.marked("a [PAD] b")
    else:
        with pytest.raises(InputError, match=r"has no \[PAD\]"):
            ours.special("[PAD]")
    ids = np.array([ours.encode("What is the opposite of hot?")])
    found = jllama.load_model(tmp_path / "model", "fp32")(jnp.asarray(ids))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor(ids)).logits
        assert torch.equal(expected, peer(torch.tensor(ids)).logits)
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=0, atol=1e-5)
    to_hf([str(tmp_path / "model"), str(tmp_path / "back")])
    for file in ("added_tokens.json", "tokenizer.json"):  # what came in leaves again
        if (folder / file).exists():
            assert (tmp_path / "back" / file).read_bytes() == (folder / file).read_bytes()
    if make is alpaca_of_old:
        vocabulary = read_vocabulary(tmp_path / "model").padded(rows)
        assert len(vocabulary.tokens) == rows


@pytest.mark.parametrize("make", [chatml, alpaca])
def test_any_other_token_without_a_row_is_refused(make, tmp_path, capsys):
    folder = make(tmp_path)
    of_rows(folder, 2048 if make is chatml else 2047)
    with pytest.raises(SystemExit):
        from_hf([str(folder), str(tmp_path / "model")])
    said = capsys.readouterr().err
    assert f"tokens, but the weights have {2048 if make is chatml else 2047} rows" in said


WRONG = {
    "two ids": ("added_tokens.json", '{"<|im_end|>": 7}', "token '<|im_end|>' is"),
    "an id of words": ("added_tokens.json", '{"a": "b"}', "token 'a' has the id 'b'"),
    "ends of words": (
        "generation_config.json",
        '{"eos_token_id": "</s>"}',
        "is '</s>', expected ids",
    ),
    "a list": ("special_tokens_map.json", "[]", "expected a JSON object"),
    "no words": ("tokenizer_config.json", "\udcff", "not UTF-8"),
    "no model": ("tokenizer.json", '{"model": {}}', "no tokenizer that `tokenizers`"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_damaged_file_is_refused_by_its_name(what, tmp_path):
    folder = chatml(tmp_path)
    name, content, message = WRONG[what]
    (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        tokenizer_of(read_hf_tokenizer(folder), folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Hugging Face folder of a random model with a tokenizer like SmolLM's, and more rows."""
    root = tmp_path_factory.mktemp("source")
    to_hf([str(model_folder(root, BASE)), str(root / "hf")])
    for file in (root / "hf").glob("tokenizer*"):
        file.unlink()
    shutil.rmtree(root / "hf/original")
    (root / "words").mkdir()
    words = smollm(root / "words")
    (words / "config.json").unlink()
    shutil.copytree(words, root / "hf", dirs_exist_ok=True)
    (root / "hf/chat_template.jinja").write_text("{{ messages }}")
    (root / "hf/README.md").write_text("a card")
    (root / "hf/generation_config.json").write_text('{"eos_token_id": 2, "top_p": 0.9}')
    return root / "hf"


def test_every_file_of_the_source_is_kept_used_or_named(source, tmp_path, capsys):
    model, back = tmp_path / "model", tmp_path / "back"
    from_hf([str(source), str(model)])
    assert "left out, for nothing here reads it: README.md\n" in capsys.readouterr().out
    to_hf([str(model), str(back)])
    weights = {file.name for file in source.glob("model*")}
    for file in source.iterdir():
        if file.name == "config.json":
            assert (model / "hf_config.json").read_bytes() == file.read_bytes()
        elif file.name not in {*weights, "README.md"}:
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 2
    with pytest.raises(SystemExit):
        to_meta([str(model), str(tmp_path / "meta")])
    assert "its tokenizer is a tokenizer.json" in capsys.readouterr().err
    (model / "chat_template.jinja").write_text("another")
    with pytest.raises(InputError, match=r"chat_template.jinja differs from manifest.json"):
        jllama.load_tokenizer(model)


def test_an_end_that_has_no_row_is_refused(source, tmp_path, capsys):
    folder = tmp_path / "hf"
    shutil.copytree(source, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": 5000}')
    with pytest.raises(SystemExit) as ended:
        from_hf([str(folder), str(tmp_path / "model")])
    assert ended.value.code == 2
    assert "ends with token 5000, but the weights have 512 rows" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.integration
def test_such_a_model_is_trained_and_asked(source, tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    from_hf([str(source), str(model)])
    flags = {"model": model, "data": bundled.ROWS, "output_dir": run, "precision": "fp32",
             "max_steps": 2, "max_seq_len": 64, "skip_bad_rows": 10_000}  # fmt: skip
    children.run("train.lora", as_flags(flags))
    passport = json.loads((run / "adapter" / PASSPORT).read_text())
    files = json.loads((model / "manifest.json").read_text())["files"]
    assert passport["tokenizer_sha256"] == files["tokenizer.json"]
    children.run("eval.prompts", ["--run", run, "--max-new-tokens", 4])
