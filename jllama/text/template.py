"""A model's own chat template: messages to text, and which of it the model wrote.

    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}

What an answer adds to the text before it is learned, up to its last special token. Where the
template marks it itself, by `{% generation %}`, what lies between the marks. Functions and their
calls are given to the template as transformers' `apply_chat_template(messages, tools=tools)` does.
"""

import contextlib
import functools
import json
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jllama.errors import InputError
from jllama.text.messages import Message


class Said(NamedTuple):
    """A conversation as text, and where in it the answers lie: (first, behind the last, number)."""

    text: str
    answers: list[tuple[int, int, int]]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the model writes, between two marks."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [jinja2.nodes.Name("jllama_mark", "load")])
        return CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, mark: str, caller: Any) -> str:
        return mark + caller() + mark


class ChatTemplate:
    """A template of Jinja, in its sandbox; read when it is used first.

    Args:
        names: what it may know of special tokens: bos_token, eos_token, ...
        specials: the texts of special tokens.
    """

    def __init__(self, source: str, file: Path, names: dict[str, str], specials: frozenset[str]):
        self.source, self._file, self._names, self._specials = source, file, names, specials
        self._marks = "{% generation" in source or "{%- generation" in source

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _json
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", 0)
            raise InputError(f"{self._file}: line {line}: {error}") from error

    def check(self) -> None:
        """Raises an InputError if it is no template of Jinja."""
        _ = self._template

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the model answers.

        Raises:
            InputError: as for `said`.
        """
        self._check(messages)
        return self._render(messages, begins_answer=True)

    def said(self, messages: Sequence[Message]) -> Said:
        """A conversation that ends with an answer.

        Raises:
            InputError: if it is no template, or refuses them, a message spells out a special token,
                the template does not write the functions or calls that there are, or later turns
                change what it writes of earlier ones.
        """
        self._check(messages)
        numbers = [n for n, message in enumerate(messages) if message.role == "assistant"]
        if self._marks:
            return self._by_marks(messages, numbers)
        whole = self._render(messages)
        answers = []
        for n in numbers:
            before = self._render(messages[:n], begins_answer=True)
            after = self._render(messages[: n + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                turn = sum(message.role != "tools" for message in messages[: n + 1])
                raise InputError(
                    f"{self._file} writes turn {turn} in another way once others follow, so the "
                    "model would learn what it never sees; split the conversation, or choose "
                    "another --prompt-style"
                )
            answers.append((len(before), self._end(after, len(before)), n))
        return Said(whole, answers)

    def _end(self, text: str, start: int) -> int:
        """Behind the last special token of an answer: what follows it is no part of it."""
        ends = [at + len(s) for s in self._specials if (at := text.rfind(s, start)) >= 0]
        return max(ends, default=len(text))

    def _by_marks(self, messages: Sequence[Message], numbers: list[int]) -> Said:
        mark = secrets.token_hex(16)
        parts = self._render(messages, mark=mark).split(mark)
        if len(parts) != 2 * len(numbers) + 1:
            raise InputError(
                f"{self._file}: {len(parts) // 2} parts between generation marks for "
                f"{len(numbers)} answers"
            )
        answers, at = [], 0
        for place, part in enumerate(parts):
            if place % 2:
                answers.append((at, at + len(part), numbers[place // 2]))
            at += len(part)
        return Said("".join(parts), answers)

    def _check(self, messages: Sequence[Message]) -> None:
        for message in messages:
            more = json.dumps(message.more, ensure_ascii=False) if message.more else ""
            for name in self._specials:
                if name in message.content + message.context + more:
                    raise InputError(
                        f"a message spells out {name}, which the model's chat template would read "
                        "as its own; take it out, or choose another --prompt-style"
                    )
        if unwritten := self._unwritten(messages):
            raise InputError(
                f"{self._file} does not write {', '.join(unwritten)}; take a model, or a "
                "--prompt-template, that does, or take them out of the row"
            )

    def _unwritten(self, messages: Sequence[Message]) -> list[str]:
        """What of functions and calls the template leaves out: without it the text is the same."""
        if not any(message.more or message.role == "tool" for message in messages):
            return []
        # A call without text has none here that a template would trip over.
        said = [replace(m, content=m.content or ".") if m.calls else m for m in messages]
        others = {
            "tools": [m for m in said if m.role != "tools"],
            "tool_calls": [replace(m, more={}) if m.calls else m for m in said],
            "tool": [replace(m, content=m.content + ".") if m.role == "tool" else m for m in said],
        }
        whole = self._render(said)
        unwritten = []
        for name, other in others.items():
            with contextlib.suppress(InputError):  # then it does read them
                if other != said and self._render(other) == whole:
                    unwritten.append(name)
        return unwritten

    def _render(
        self, messages: Sequence[Message], *, begins_answer: bool = False, mark: str = ""
    ) -> str:
        turns = [_turn(message) for message in messages if message.role != "tools"]
        tools = next((m.more["tools"] for m in messages if m.role == "tools"), None)
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=begins_answer, jllama_mark=mark, tools=tools,
                documents=None, **self._names,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError,
                AttributeError, RecursionError) as error:  # fmt: skip
            raise InputError(f"{self._file}: {error}") from error


def _turn(message: Message) -> dict[str, Any]:
    """As templates read it: a call without text has the content none."""
    text = f"{message.content}\n{message.context}" if message.context else message.content
    empty = message.calls and not text
    return {"role": message.role, "content": None if empty else text, **message.more}


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
