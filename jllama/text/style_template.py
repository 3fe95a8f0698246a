"""Our prompt styles as chat templates, for the programs that serve a tuned model.

A style writes ids, with a border of its own between question and answer; a template writes text. So
it is made for one tokenizer, and tried on a few conversations: an answer is joined to its question
by nothing or by a space, whichever gives the ids of training.

    plain, Llama 2   "<s>Name a colour.\\n" + " red" + "</s>"
    plain, Llama 3   "<|begin_of_text|>Name a colour.\\n" + "red" + "<|end_of_text|>"
"""

import json
from collections.abc import Mapping
from pathlib import Path
from string import Formatter

from jllama.text.hf_files import TEMPLATE
from jllama.text.messages import Message
from jllama.text.prompt import (
    ALPACA,
    ALPACA_INPUT,
    ALPACA_PAIRED,
    PromptStyle,
    conversation,
)
from jllama.text.template import ChatTemplate
from jllama.text.tokenizer import Tokenizer, border_names

_TOKENS = """\
{{%- set begin = {} %}}
{{%- set end = {} %}}
"""
# What stands in capitals is put in.
_TURNS = """\
{%- set system = '' %}
{%- set turns = messages %}
{%- if messages[0].role == 'system' %}
    {%- set system = SYSTEM %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- for m in turns %}
    {%- if m.role != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('expected an optional system message, then user and assistant') }}
    {%- elif m.role == 'user' %}
        {{- begin + USER }}
    {%- else %}
        {{- ANSWER + end }}
    {%- endif %}
{%- endfor %}
"""
_LLAMA3 = """\
{{- begin }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_NO_ANSWER = "raise_exception('this model was tuned on one question at a time')"


def _put_in(text: str, fields: Mapping[str, str]) -> str:
    """A format string as an expression of Jinja: "a{b}" -> "a" + b."""
    parts = []
    for literal, field, *_ in Formatter().parse(text):
        parts += [json.dumps(literal)] if literal else []
        parts += [fields[field]] if field else []
    return " + ".join(parts)


_FIELDS = {
    "paired": f"({json.dumps(ALPACA_PAIRED)} if m.input else '')",
    "instruction": "m.content",
    "input": f"({_put_in(ALPACA_INPUT, {'context': 'm.input'})} if m.input else '')",
}
_BEFORE = "(system if loop.first else '') + "
_PLAIN_SYSTEM = "messages[0].content + '\\n'"
# The system message, what is asked, what is answered.
_EXPRESSIONS: Mapping[str, tuple[str, str, str]] = {
    "report": (_PLAIN_SYSTEM, _BEFORE + "m.content", "m.content"),
    "plain": (_PLAIN_SYSTEM, _BEFORE + "m.content + '\\n'", "m.content"),
    "alpaca": (_PLAIN_SYSTEM, _BEFORE + _put_in(ALPACA, _FIELDS), "m.content"),
    "llama2-chat": (
        "'<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n'",
        f"'[INST] ' + {_BEFORE}m.content | trim + ' [/INST]'",
        "m.content | trim",
    ),
}
_TALK = [
    Message("user", "Why? Name a colour."), Message("assistant", "Red (or blue)."),
    Message("user", "2 + 2"), Message("assistant", "4, of course:\n- four"),
    Message("user", "He said \"no\""), Message("assistant", "\"Нет\" it is"),
    Message("user", "Go on"), Message("assistant", "(and on)"),
]  # fmt: skip
_TALKS = [_TALK, _TALK[2:], [Message("system", "Be kind."), *_TALK]]


def style_template(style: PromptStyle, tokenizer: Tokenizer) -> str | None:
    """The template that gives a tokenizer's ids of a style; None where no text has them.

    Where only questions have them, the template refuses to go on after an answer.
    """
    if style == "chat":
        return tokenizer.template.source if tokenizer.template else None
    if style == "text":
        return None
    borders = border_names(tokenizer).values()
    if not tokenizer.specials.issuperset(borders):
        return None
    tokens = _TOKENS.format(*(json.dumps(name, ensure_ascii=False) for name in borders))
    if style == "llama3-chat":
        sources = [_LLAMA3]
    else:
        system, user, answer = _EXPRESSIONS[style]
        joined = f"(' ' + {answer} if m.content else '')"
        sources = [
            _TURNS.replace("SYSTEM", system).replace("USER", user).replace("ANSWER", way)
            for way in (answer, joined, _NO_ANSWER)
        ]
    found = (tokens + source for source in sources)
    return next((source for source in found if _has_the_ids(source, style, tokenizer)), None)


def _has_the_ids(source: str, style: PromptStyle, tokenizer: Tokenizer) -> bool:
    """Whether a template gives a style's ids of the talks, or of their first questions only."""
    template = ChatTemplate(source, Path(TEMPLATE), {}, tokenizer.specials)
    one_question = _NO_ANSWER in source
    for talk in _TALKS:
        if one_question:
            talk = talk[: 1 + (talk[0].role == "system")]
        for end in range(1, len(talk) + 1):
            messages = talk[:end]
            role = messages[-1].role
            if role == "system":
                continue
            ids, _ = conversation(style, messages, tokenizer)
            said = role == "assistant"
            text = template.said(messages).text if said else template.prompt(messages)
            if tokenizer.marked(text) != ids:
                return False
    return True
