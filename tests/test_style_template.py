"""Every prompt style as a chat template: ids of training, of transformers, and of the export."""

import json
import shutil

import pytest

pytest.importorskip("torch")
from random_models import BASE
from test_template import CHATML, TURNS, dicts
from test_tokenizer_folders import SAMPLE, TOKENIZER, chatml, llama3, saved_again, smollm
from train_runs import settings, small_place
from transformers import AutoTokenizer

from convert.hf.tokenizer import read_hf_tokenizer, write_tokenizer_files
from convert.to_hf import main as to_hf
from eval.prompts import main as prompts
from eval.subject import Subject, resolve
from jllama.errors import InputError
from jllama.folders.adapter import PASSPORT
from jllama.text.hf_files import TEMPLATE, read_words, with_template
from jllama.text.messages import Message, row_messages
from jllama.text.prompt import conversation, prompt_ids
from jllama.text.style_template import style_template
from jllama.text.tokenizer import load_tokenizer, tokenizer_of
from train.config import TrainConfig, read_defaults
from train.data.lint.command import LintConfig
from train.trainer import Trainer

OURS = ["report", "plain", "alpaca", "llama2-chat"]
AWKWARD = [
    Message("user", " two  spaces, a tab\t and </s\n"), Message("assistant", "日本 🚀\n\n- é"),
    Message("user", "x"), Message("assistant", ""),
    Message("user", "1. a\n2. b"), Message("assistant", "{'a': [1, 2]}"),
]  # fmt: skip
TALKS = [TURNS, TURNS[1:], TURNS[1:3], AWKWARD, [TURNS[0], *AWKWARD]]


def meta(content):
    return lambda root: {"tokenizer.model": content}


def files_of(make):
    return lambda root: read_hf_tokenizer(make(root))


KINDS = {
    "sentencepiece": meta(SAMPLE),
    "llama 3": meta(TOKENIZER),
    "saved again": files_of(saved_again),
    "chatml": files_of(chatml),
    "renamed": files_of(llama3),
    "smollm": files_of(smollm),
}


def exported(files, style, root):
    """Ours, and transformers' out of what an export of a model that was tuned in a style has."""
    ours = tokenizer_of(files, root)
    folder = root / "exported"
    folder.mkdir()
    files = with_template(files, style_template(style, ours), ours.stop_ids, root)
    write_tokenizer_files(files, folder, 512)
    return ours, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", OURS)
def test_the_ids_of_training_are_those_of_the_exports_template(style, kind, tmp_path):
    check_talks(style, *exported(KINDS[kind](tmp_path), style, tmp_path))


def test_llama_3s_own_style(tmp_path):
    check_talks("llama3-chat", *exported(KINDS["llama 3"](tmp_path), "llama3-chat", tmp_path))


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "style", "turns"),
    [
        *[("llama2", style, True) for style in OURS],
        ("llama3", "report", False),
        ("llama3", "plain", True),
        ("llama3", "alpaca", True),
        ("llama3", "llama2-chat", False),
        ("llama3", "llama3-chat", True),
    ],
)
def test_the_real_tokenizers(name, style, turns, assets, tmp_path):
    """Where a template takes one question only, no join gives the ids of an answer."""
    files = {"tokenizer.model": (assets / f"tokenizers/{name}_tokenizer.model").read_bytes()}
    ours, theirs = exported(files, style, tmp_path)
    if turns:
        check_talks(style, ours, theirs)
        return
    prompt, _ = conversation(style, TURNS[:2], ours)
    assert prompt == theirs.apply_chat_template(dicts(TURNS[:2]), return_dict=False)
    with pytest.raises(Exception, match="one question at a time"):
        theirs.apply_chat_template(dicts(TURNS))


def check_talks(style, ours, theirs):
    for talk in TALKS:
        ids, _ = conversation(style, talk, ours)
        assert ids == theirs.apply_chat_template(dicts(talk), return_dict=False)
        for end in [n for n, message in enumerate(talk) if message.role == "assistant"]:
            prompt, _ = conversation(style, talk[:end], ours)
            assert prompt == theirs.apply_chat_template(
                dicts(talk[:end]), add_generation_prompt=True, return_dict=False
            )


def test_alpacas_input_is_a_word_of_its_message(tmp_path):
    ours, theirs = exported(KINDS["sentencepiece"](tmp_path), "alpaca", tmp_path)
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    said = [{"role": "user", "content": "Add.", "input": "2 and 3"}]
    assert theirs.apply_chat_template(said, return_dict=False) == prompt_ids("alpaca", row, ours)
    said.append({"role": "assistant", "content": "5"})
    ids, _ = conversation("alpaca", row_messages(row), ours)
    assert theirs.apply_chat_template(said, return_dict=False) == ids


@pytest.mark.parametrize("style", OURS)
def test_a_template_refuses_what_the_style_refuses(style, tmp_path):
    _, theirs = exported(KINDS["sentencepiece"](tmp_path), style, tmp_path)
    for roles in (["assistant"], ["user", "user"], ["system", "assistant"], ["user", "system"]):
        with pytest.raises(Exception, match="then user and assistant"):
            theirs.apply_chat_template([{"role": role, "content": "x"} for role in roles])


def test_where_question_and_answer_grow_together_a_template_has_questions_only(tmp_path):
    """`.Red` is one token here, which training never sees: it makes ids of `.` and of `Red`."""
    files = KINDS["smollm"](tmp_path)
    content = json.loads(files["tokenizer.json"])
    vocabulary, pairs = content["model"]["vocab"], content["model"]["merges"]
    vocabulary[')"'] = max(vocabulary.values()) + 1
    for word in ("Re", "Red"):
        vocabulary.setdefault(word, max(vocabulary.values()) + 1)
    content["model"]["merges"] = [['"', '"'], *pairs]
    vocabulary['""'] = max(vocabulary.values()) + 1
    files["tokenizer.json"] = json.dumps(content).encode()
    ours, theirs = exported(files, "report", tmp_path)
    ids, _ = conversation("report", TURNS[:2], ours)
    assert theirs.apply_chat_template(dicts(TURNS[:2]), return_dict=False) == ids
    with pytest.raises(Exception, match="one question at a time"):
        theirs.apply_chat_template(dicts(TURNS[:3]))
    assert exported_of_plain_has_answers(files, tmp_path)


def exported_of_plain_has_answers(files, root):
    return "one question" not in style_template("plain", tokenizer_of(files, root))


def test_an_end_without_a_name_has_no_template(tmp_path):
    files = KINDS["smollm"](tmp_path)
    config = json.loads(files["tokenizer_config.json"])
    files["tokenizer_config.json"] = json.dumps(config | {"eos_token": None}).encode()
    files["generation_config.json"] = b'{"eos_token_id": 99999}'
    assert style_template("plain", tokenizer_of(files, tmp_path)) is None


def test_the_files_of_a_tuned_model(tmp_path):
    """Its template takes the place of the base's, and all that ends its answers is named."""
    files = KINDS["smollm"](tmp_path)
    config = json.loads(files["tokenizer_config.json"]) | {"chat_template": CHATML}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    files["generation_config.json"] = b'{"eos_token_id": 0, "temperature": 0.6}'
    ours = tokenizer_of(files, tmp_path)
    tuned = with_template(files, "{{ 1 }}", ours.stop_ids, tmp_path)
    assert read_words(tuned, tmp_path).template == "{{ 1 }}"
    assert "chat_template" not in json.loads(tuned["tokenizer_config.json"])
    generation = json.loads(tuned["generation_config.json"])
    assert generation == {"eos_token_id": [0, ours.eos_id], "temperature": 0.6}
    assert with_template(files, CHATML, (0,), tmp_path) == files


TEMPLATE_OF_USER = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def run_of(place, name, **more):
    run = place / name
    more |= {"output_dir": run, "max_steps": 1, "max_seq_len": 256}
    Trainer(**settings(place, **more)).train()
    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, rows, a template, and a run with it."""
    place = small_place(tmp_path_factory.mktemp("template"), BASE)
    (place / "mine.jinja").write_text(TEMPLATE_OF_USER)
    run_of(place, "run", prompt_template=str(place / "mine.jinja"))
    return place


@pytest.mark.integration
def test_a_template_of_the_users_goes_with_the_adapter(place, tmp_path, capsys):
    adapter = place / "run/adapter"
    passport = json.loads((adapter / PASSPORT).read_text())
    assert passport["prompt_style"] == "chat"
    assert (adapter / TEMPLATE).read_text() == TEMPLATE_OF_USER
    prompts(["--run", str(place / "run"), "--max-new-tokens", "2", "--limit", "1"])
    to_hf([str(place / "model"), str(tmp_path / "hf"), "--adapter", str(adapter)])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.chat_template == TEMPLATE_OF_USER
    ours = load_tokenizer(place / "model", place / "mine.jinja")
    ids, learned = conversation("chat", TURNS[1:3], ours)
    assert theirs.apply_chat_template(dicts(TURNS[1:3]), return_dict=False) == ids
    assert ours.decode([x for x, y in zip(ids, learned, strict=True) if y]) == TURNS[2].content


@pytest.mark.integration
def test_a_template_that_was_changed_is_refused(place, tmp_path):
    shutil.copytree(place / "run/adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / TEMPLATE).write_text("another")
    asked = Subject(model=str(place / "model"), adapter=str(tmp_path / "adapter"))
    with pytest.raises(InputError, match=r"chat_template.jinja differs from jllama.json"):
        resolve(asked)
    shutil.copytree(place / "run", tmp_path / "run", ignore=lambda *_: ["adapter"])
    mine = place / "mine.jinja"
    mine.write_text(TEMPLATE_OF_USER + " ")
    with pytest.raises(InputError, match="prompt_template_sha256 differ"):
        Trainer(config=read_defaults(["--resume", str(tmp_path / "run")])[0]).train()
    mine.write_text(TEMPLATE_OF_USER)


@pytest.mark.integration
def test_another_style_and_a_template_contradict_each_other(place):
    for settings_class in (TrainConfig, Subject, LintConfig):
        assert settings_class(prompt_template="x").prompt_style == "chat"
        with pytest.raises(InputError, match="prompt_template and prompt_style alpaca"):
            settings_class(prompt_template="x", prompt_style="alpaca")
    with pytest.raises(InputError, match="nowhere"):
        run_of(place, "no", prompt_template="nowhere.jinja")
    assert not (place / "no").exists()


@pytest.mark.integration
@pytest.mark.parametrize("file", [True, False], ids=["with its template", "of an older version"])
def test_an_adapters_style_is_exported(file, place, tmp_path):
    shutil.copytree(styled(place) / "adapter", tmp_path / "adapter")
    if not file:
        (tmp_path / "adapter" / TEMPLATE).unlink()
    to_hf([str(place / "model"), str(tmp_path / "hf"), "--adapter", str(tmp_path / "adapter")])
    check_talks(
        "alpaca",
        load_tokenizer(place / "model"),
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )


def styled(place):
    """A run in another style."""
    done = place / "alpaca"
    return done if done.exists() else run_of(place, "alpaca", prompt_style="alpaca")


@pytest.mark.integration
def test_a_model_that_was_tuned_whole_has_its_style(place, tmp_path):
    run = run_of(place, "full", prompt_style="llama3-chat", tune="full", learning_rate=1e-5)
    to_hf([str(run / "model"), str(tmp_path / "hf")])
    ours = load_tokenizer(run / "model")
    check_talks("llama3-chat", ours, AutoTokenizer.from_pretrained(tmp_path / "hf"))
    asked, _ = resolve(Subject(run=str(run)))
    assert asked.prompt_template == ""  # it is for the style chat alone
    ids, _ = conversation("chat", TURNS, ours)
    assert ids == conversation("llama3-chat", TURNS, ours)[0]


@pytest.mark.integration
def test_a_run_on_texts_has_no_template_and_goes_on_with_its_prompts(place, tmp_path, capsys):
    texts, asked = tmp_path / "texts.json", tmp_path / "asked.json"
    texts.write_text(json.dumps([{"text": "the opposite of hot is cold"}] * 12))
    asked.write_text(json.dumps([{"text": "the opposite of"}, {"prompt": "the opposite of"}]))
    run = run_of(place, "text", data=str(texts), prompt_style="text")
    assert json.loads((run / "adapter" / PASSPORT).read_text())["prompt_style"] == "text"
    assert not (run / "adapter" / TEMPLATE).exists()
    prompts(["--run", str(run), "--prompts", str(asked), "--max-new-tokens", "2",
             "--temperature", "0"])  # fmt: skip
    first, second = map(json.loads, (run / "generations.jsonl").read_text().splitlines())
    assert first["tuned_ids"] == second["tuned_ids"]
    assert first["prompt"] == second["prompt"] == "the opposite of"
    to_hf([str(place / "model"), str(tmp_path / "hf"), "--adapter", str(run / "adapter")])
    assert not (tmp_path / "hf" / TEMPLATE).exists()
