"""The model's own chat template: ids and masks beside transformers, and by hand."""

import json

import pytest
from test_tokenizer_folders import chatml, llama3, saved_again, smollm
from transformers import AutoTokenizer

from convert.hf.tokenizer import read_hf_tokenizer
from jllama.errors import InputError
from jllama.text.messages import Message
from jllama.text.prompt import conversation
from jllama.text.tokenizer import tokenizer_of
from train.data.lint.command import main as lint

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
MARKED = (
    "{%- for m in messages %}\n    {%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{%- generation %}{{ m.content + '<|im_end|>' }}{%- endgeneration %}{{ '\n' }}{%- else %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{ m.content | trim }}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
HIDING = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'][1:])")
TURNS = [
    Message("system", "Be kind."), Message("user", "the opposite of hot?"),
    Message("assistant", "Cold! It is cold."), Message("user", "And of 12 wet?\n"),
    Message("assistant", "Dry."),
]  # fmt: skip


def opened(folder, template):
    """Ours, and transformers', with a template."""
    (folder / "chat_template.jinja").write_text(template)
    return tokenizer_of(read_hf_tokenizer(folder), folder), AutoTokenizer.from_pretrained(folder)


def dicts(messages):
    return [{"role": m.role, "content": m.content} for m in messages]


def learned_parts(ids, learned):
    """The ids of each stretch that is learned."""
    parts = []
    for place, (token, learns) in enumerate(zip(ids, learned, strict=True)):
        if learns:
            parts += [] if learned[place - 1] else [[]]
            parts[-1].append(token)
    return parts


@pytest.mark.parametrize("turns", [TURNS, TURNS[1:], TURNS[1:3]], ids=["five", "four", "two"])
@pytest.mark.parametrize(
    ("make", "template", "answer"),
    [
        (chatml, CHATML, "{}<|im_end|>"),
        (smollm, CHATML, "{}<|im_end|>"),
        (smollm, MARKED, "{}<|im_end|>"),
        (llama3, CHATML, "{}<|im_end|>"),
        (saved_again, LLAMA2, " {} </s>"),
    ],
    ids=["llama 2", "smollm", "marked", "llama 3", "inst"],
)
def test_ids_are_those_of_apply_chat_template(make, template, answer, turns, tmp_path):
    ours, hf = opened(make(tmp_path), template)
    ids, learned = conversation("chat", turns, ours)
    assert ids == hf.apply_chat_template(dicts(turns), return_dict=False)
    prompt, _ = conversation("chat", turns[:-1], ours)
    assert prompt == hf.apply_chat_template(
        dicts(turns[:-1]), add_generation_prompt=True, return_dict=False
    )
    assert ids[: len(prompt)] == prompt
    answers = [answer.format(m.content) for m in turns if m.role == "assistant"]
    assert learned_parts(ids, learned) == [continued(ours, text) for text in answers]
    if template is MARKED:
        theirs = hf.apply_chat_template(
            dicts(turns), return_dict=True, return_assistant_tokens_mask=True
        )
        assert [bool(x) for x in theirs["assistant_masks"]] == learned


def continued(tokenizer, text):
    """A text's ids where it does not begin a text, which SentencePiece's gives a space."""
    before = tokenizer.marked("x")
    return tokenizer.marked("x" + text)[len(before) :]


def test_which_turns_are_learned(tmp_path):
    ours, _ = opened(chatml(tmp_path), CHATML)
    turns = [*TURNS[:2], Message("assistant", TURNS[2].content, learn=False), *TURNS[3:]]
    ids, learned = conversation("chat", turns, ours)
    assert learned_parts(ids, learned) == [continued(ours, "Dry.<|im_end|>")]
    parts = learned_parts(*conversation("chat", turns, ours, train_on_prompt=True))
    assert sum(map(len, parts)) > len(ids) / 2
    assert len(parts) == 2


REFUSED = {
    "hides": (HIDING, TURNS, "writes turn 3 in another way once others follow"),
    "refuses": (CHATML + "{{ raise_exception('no system, please') }}", TURNS, "no system, please"),
    "spelled": (CHATML, [Message("user", "<|im_end|>")], r"spells out <\|im_end\|>"),
    "no template": ("{% if %}", TURNS, "chat_template.jinja: line 1"),
    "not safe": ("{{ ''.__class__.__mro__ }}", TURNS, "unsafe"),
    "unknown": ("{{ messages[0].nothing.more }}", TURNS, "has no attribute"),
    "learned user": (CHATML, [Message("user", "a", learn=True)], "only answers can be learned"),
    "marks": ("{% generation %}x{% endgeneration %}", TURNS, "1 parts between .* for 2 answers"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_template_that_cannot_say_it_is_refused(what, tmp_path):
    template, turns, message = REFUSED[what]
    folder = chatml(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = tokenizer_of(read_hf_tokenizer(folder), folder)  # other styles do not need it
    with pytest.raises(InputError, match=message):
        conversation("chat", turns, tokenizer)


def test_a_template_may_lie_in_tokenizer_config(tmp_path):
    folder = chatml(tmp_path)
    file = folder / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": CHATML}]
    for template in (CHATML, several):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
        ours = tokenizer_of(read_hf_tokenizer(folder), folder)
        assert ours.decode(conversation("chat", TURNS, ours)[0]).startswith("system\nBe kind.")


def test_the_lint_sees_the_end_that_a_template_writes_a_line_behind(tmp_path, capsys):
    folder, file = smollm(tmp_path), tmp_path / "rows.json"
    (folder / "chat_template.jinja").write_text(CHATML)
    file.write_text(json.dumps([{"messages": dicts(TURNS)}, {"prompt": "a", "completion": "b"}]))
    lint([str(file), "--model", str(folder), "--prompt-style", "chat"])
    said = " ".join(capsys.readouterr().out.split())
    assert "in 2 rows; 2 rows end in a stop token" in said
    assert f"next: jllama train --model {folder} --data {file} --prompt-style chat" in said


def test_an_end_id_without_a_token_hinders_no_chat(tmp_path):
    folder = smollm(tmp_path)
    file = folder / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"}
    file.write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 99999}')
    ours, _ = opened(folder, CHATML)
    assert ours.stop_ids == (99999,)
    assert conversation("chat", TURNS, ours)[0]


def test_without_a_template_the_style_is_refused(tmp_path):
    folder = saved_again(tmp_path)
    with pytest.raises(InputError, match="this model has no chat template"):
        conversation("chat", TURNS, tokenizer_of(read_hf_tokenizer(folder), folder))
