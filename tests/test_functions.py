"""Conversations that call functions: ids and masks beside transformers, and what is refused."""

import json

import pytest
from row_examples import examples_of
from test_template import CHATML, continued, learned_parts, opened
from test_tokenizer_folders import TOKENIZER, chatml, exported, saved, smollm

from eval.exact import short_answers
from jllama.errors import InputError
from jllama.text.messages import Message, ignored, row_messages
from jllama.text.prompt import conversation, prompt_ids
from train.data.lint.command import main as lint


def llama31(root):
    return saved(exported(TOKENIZER, root / "a"), root / "b")


# In the manner of Llama 3.1: functions in the first question, one call a turn, its answer as JSON.
LLAMA31 = """\
{{- bos_token }}
{%- set turns = messages %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for m in turns %}
    {%- if m.role == 'tool' or m.role == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if m.content is mapping or m.content is iterable %}{{- m.content | tojson }}
        {%- else %}{{- m.content }}{%- endif %}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in m %}
        {%- if not m.tool_calls | length == 1 %}
            {{- raise_exception('one call a turn') }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
        {%- if loop.first and tools is not none %}
            {%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
        {%- endif %}
        {{- m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# In the manner of Hermes and Qwen: functions in the system turn, answers in a turn of the user.
HERMES = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or m.role == 'assistant' and not m.tool_calls %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
        {%- for call in m.tool_calls %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# In the manner of SmolLM3: marks around what the model writes, each answer of a function by name.
MARKED = """\
{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}
        {{- m.content or '' }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif m.role == 'tool' %}
        {{- m.name + ' ' + m.tool_call_id + ': ' + m.content + '<|im_end|>\\n' }}
    {%- else %}
        {{- m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
TEMPLATES = {
    "llama 3.1": (llama31, LLAMA31),
    "hermes": (chatml, HERMES),
    "smollm": (smollm, HERMES),
    "marked": (smollm, MARKED),
}

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "warmth", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "rain", "description": "Is it wet?"}},
]


def call(name, arguments, number="c1"):
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def row(arguments, tools=TOOLS, last=True):
    """As OpenAI has it: {"messages": [...], "tools": [...]}."""
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "How warm is it in Bern?"},
        {"role": "assistant", "content": None, "tool_calls": [call("warmth", arguments)]},
        {"role": "tool", "tool_call_id": "c1", "name": "warmth", "content": '{"degrees": 17}'},
        {"role": "assistant", "content": "17 degrees."},
        {"role": "user", "content": "And wet?"},
        {"role": "assistant", "content": "", "tool_calls": [call("rain", {}, "c2")]},
        {"role": "tool", "tool_call_id": "c2", "name": "rain", "content": "no"},
        {"role": "assistant", "content": "No."},
    ]
    return {"messages": turns if last else turns[:-2], "tools": tools}


BERN = {"city": "Bern", "unit": "°C", "days": [1, 2.5]}


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("given", ["objects", "texts"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_ids_and_masks_are_those_of_apply_chat_template(kind, given, last, tmp_path):
    make, template = TEMPLATES[kind]
    ours, hf = opened(make(tmp_path), template)
    theirs = row(BERN, last=last)
    asked = row(json.dumps(BERN), json.dumps(TOOLS), last) if given == "texts" else theirs
    messages = row_messages(asked)
    ids, learned = conversation("chat", messages, ours)
    how = {"tools": TOOLS, "return_dict": True}
    marked = hf.apply_chat_template(theirs["messages"], return_assistant_tokens_mask=True, **how)
    assert ids == marked["input_ids"]
    prompt = hf.apply_chat_template(theirs["messages"][:-1], add_generation_prompt=True, **how)
    assert prompt_ids("chat", asked, ours) == prompt["input_ids"] == ids[: len(prompt["input_ids"])]
    if kind == "marked":
        assert [bool(x) for x in marked["assistant_masks"]] == learned
    ends = {"llama 3.1": "<|eot_id|>"}.get(kind, "<|im_end|>")
    calls = {
        "llama 3.1": '{{"name": "{}", "parameters": {}}}',
        "marked": '<tool_call>{{"name": "{}", "arguments": {}}}</tool_call>',
    }.get(kind, '\n<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>')
    said = [calls.format("warmth", json.dumps(BERN, ensure_ascii=False)), "17 degrees.",
            calls.format("rain", "{}"), "No."]  # fmt: skip
    if kind in ("hermes", "smollm"):
        said = [text.removeprefix("\n") for text in said]  # the prompt ends with that line
    parts = [continued(ours, text + ends) for text in said[: None if last else -1]]
    assert learned_parts(ids, learned) == parts


def test_only_the_last_answer_is_learned_where_that_is_asked(tmp_path):
    ours, _ = opened(smollm(tmp_path), HERMES)
    ids, learned = conversation("chat", row_messages(row(BERN), "last"), ours)
    assert learned_parts(ids, learned) == [continued(ours, "No.<|im_end|>")]


SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "How warm is it in Bern?"},
        {"from": "function_call", "value": '{"name": "warmth", "arguments": {"city": "Bern"}}'},
        {"from": "observation", "value": "17"},
        {"from": "gpt", "value": "17 degrees."},
    ],
    "tools": json.dumps([TOOLS[0]["function"]]),
}
BEFORE = {
    "messages": [
        {"role": "user", "content": "How warm is it in Bern?"},
        {"role": "assistant", "function_call": {"name": "warmth", "arguments": '{"city": "Bern"}'}},
        {"role": "function", "name": "warmth", "content": "17"},
        {"role": "assistant", "content": "17 degrees."},
    ],
    "functions": [TOOLS[0]["function"]],
}


@pytest.mark.parametrize("other", [SHAREGPT, BEFORE])
def test_other_ways_to_write_calls_are_the_same_conversation(other, tmp_path):
    ours, hf = opened(smollm(tmp_path), HERMES)
    turns = [
        {"role": "user", "content": "How warm is it in Bern?"},
        {"role": "assistant", "content": None, "tool_calls": [call("warmth", {"city": "Bern"})]},
        {"role": "tool", "content": "17"},
        {"role": "assistant", "content": "17 degrees."},
    ]
    expected = hf.apply_chat_template(turns, tools=TOOLS[:1], return_dict=False)
    assert conversation("chat", row_messages(other), ours)[0] == expected
    assert not ignored(other)


def test_a_question_may_have_tools_and_an_empty_list_says_nothing(tmp_path):
    ours, hf = opened(smollm(tmp_path), HERMES)
    asked = {"instruction": "Hi", "output": "Hello", "tools": json.dumps(TOOLS)}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    expected = hf.apply_chat_template(turns, tools=TOOLS, return_dict=False)
    assert conversation("chat", row_messages(asked), ours)[0] == expected
    for empty in ([], "[]", "", None):
        plain = [Message("user", "Hi"), Message("assistant", "Hello")]
        assert row_messages(asked | {"tools": empty}) == plain


NO_CALLS = HERMES.replace("{%- for call in m.tool_calls %}", "{%- for call in [] %}")
NO_ANSWERS = HERMES.replace("+ m.content + '\\n</tool", "+ '\\n</tool")
NO_TOOLS = HERMES.replace("{%- if tools %}", "{%- if none %}")
REFUSED = {
    "chatml": (CHATML, "chat_template.jinja does not write tools, tool_calls; take a model"),
    "no calls": (NO_CALLS, "does not write tool_calls; take a model"),
    "no answers": (NO_ANSWERS, "does not write tool; take a model"),
    "no tools": (NO_TOOLS, "does not write tools; take a model"),
    "one call": (LLAMA31.replace("length == 1", "length == 2"), "one call a turn"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_template_that_does_not_write_them_is_refused_by_name(what, tmp_path):
    template, message = REFUSED[what]
    ours, _ = opened(smollm(tmp_path), template)
    for asked in (row(BERN), row(BERN, last=False)):
        with pytest.raises(InputError, match=message):
            conversation("chat", row_messages(asked), ours)
        with pytest.raises(InputError, match=message):
            prompt_ids("chat", asked, ours)


@pytest.mark.parametrize("style", ["plain", "report", "alpaca", "llama2-chat", "llama3-chat"])
def test_styles_without_a_template_refuse_them_by_name(style, tokenizer):
    with pytest.raises(InputError, match=rf"row 0: prompt style {style} does not know tool, tool_"):
        examples_of([row(BERN)], tokenizer, style)
    asked = {"prompt": "a", "completion": "b", "tools": TOOLS}
    with pytest.raises(InputError, match=rf"prompt style {style} does not know tools; take"):
        examples_of([asked], tokenizer, style)


def changed(number, **fields):
    """The row with a message that differs."""
    turns = row(BERN)["messages"]
    return {"messages": [*turns[:number], turns[number] | fields, *turns[number + 1 :]]}


WRONG = {
    "arguments": (changed(2, tool_calls=[call("warmth", "{city")]), "message 2: 'arguments' is a"),
    "list": (changed(2, tool_calls=[call("warmth", "[1]")]), "'arguments' is a list, expected an"),
    "no name": (changed(2, tool_calls=[{"function": {}}]), "a call of 'tool_calls' names no func"),
    "number": (changed(2, tool_calls=3), "'tool_calls' is a number, expected functions"),
    "user": (changed(1, tool_calls=[call("f", {})]), "message 1: 'tool_calls' in a message of rol"),
    "surrogate": (changed(2, tool_calls=[call("f", {"a": "\ud800"})]), "not valid Unicode"),
    "tools": (row(BERN, "no JSON"), "'tools' is a text, and no JSON"),
    "objects": (row(BERN, {"a": 1}), "'tools' is not a list of functions"),
    "numbers": (row(BERN, [1]), "'tools' is not a list of functions"),
    "text": ({"text": "a", "tools": TOOLS}, "'tools' beside 'text', which has no place for it"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_call_or_function_is_named(what):
    wrong, message = WRONG[what]
    with pytest.raises(InputError, match=message):
        row_messages(wrong)


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([0, 1, 2, 5, 6], "system, user, call, user, call"),
        ([1, 3, 4], "user, tool, assistant"),
        ([1, 4, 3, 4], "user, assistant, tool, assistant"),
    ],
)
def test_a_call_is_answered_by_its_tool(turns, found, tmp_path):
    ours, _ = opened(smollm(tmp_path), HERMES)
    messages = row_messages({"messages": [row(BERN)["messages"][i] for i in turns]})
    with pytest.raises(InputError, match=f"and tool after a call; found {found}"):
        conversation("chat", messages, ours)


def test_special_tokens_in_functions_are_refused(tmp_path):
    ours, _ = opened(smollm(tmp_path), HERMES)
    with pytest.raises(InputError, match=r"spells out <\|im_end\|>"):
        conversation("chat", row_messages(row({"city": "<|im_end|>"})), ours)


def test_a_conversation_may_end_with_a_call_which_is_asked_for_to_the_letter(tmp_path):
    ours, _ = opened(smollm(tmp_path), HERMES)
    rows = [row(BERN, last=False)]
    examples, skipped = examples_of(rows, ours, "chat")
    assert not skipped
    (asked,) = short_answers(rows, examples, ours, "chat", most=99, context=9999)
    assert asked.answer == '<tool_call>\n{"name": "rain", "arguments": {}}\n</tool_call>'


def test_a_conversation_that_ends_with_an_answer_of_a_function_loses_it(tmp_path):
    ours, _ = opened(smollm(tmp_path), HERMES)
    ends = {"messages": row(BERN)["messages"][:-1], "tools": TOOLS}
    examples, _ = examples_of([ends, row(BERN, last=False)], ours, "chat")
    assert examples[0].ids.tolist() == examples[1].ids.tolist()
    assert [*examples.notes] == ["end with a turn that nothing answers, which is dropped"]


@pytest.mark.real
@pytest.mark.parametrize(("template", "code"), [(HERMES, 0), (CHATML, 2)])
def test_calls_are_rendered_by_a_template_that_knows_them(template, code, assets, tmp_path, capsys):
    folder = smollm(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    file = assets.parent / "cases/data/10-tool-calls.jsonl"
    asked = [file, "--model", folder, "--prompt-style", "chat"]
    try:
        lint([str(word) for word in asked])
        ended = 0
    except SystemExit as end:
        ended = end.code
    heard = capsys.readouterr()
    assert ended == code
    words = "⟦<tool_call>" if code == 0 else "does not write tools, tool_calls"
    assert words in heard.out + heard.err
