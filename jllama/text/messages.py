"""The rows of data files as messages, whichever kind they are of:

    {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    {"prompt": "2 + 3 = ", "completion": "5"}
    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}
    {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]}
    {"text": "2 + 3 = 5"}

A `null` is as if it were missing. What would change the meaning of a row is honoured or refused by
its name; `ignored` tells the other columns.
"""

import dataclasses
import difflib
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jllama.errors import InputError
from jllama.folders.json_files import kind_of


@dataclass(frozen=True)
class Message:
    """One turn.

    Args:
        role: `system`, `user`, `assistant`, or `text` for a row that is a text and no conversation.
        context: an Alpaca row's input.
        learn: whether the model learns to write it; None: answers and texts yes, the others only
            with --train-on-prompt.
    """

    role: str
    content: str
    context: str = ""
    learn: bool | None = None


# Columns, and the part of a row that each is; of several for one part the first counts.
COLUMNS = {
    "system": "system", "system_prompt": "system",
    "messages": "turns", "conversations": "turns",
    "history": "history",
    "instruction": "question", "prompt": "question", "question": "question",
    "input": "context", "context": "context",
    "output": "answer", "completion": "answer", "response": "answer", "answer": "answer",
    "text": "text",
}  # fmt: skip
# The part that tells a kind of row, and the others that it may have.
_KINDS = {
    "turns": ("system",),
    "question": ("system", "history", "context", "answer"),
    "text": (),
}
# Which answers are learned: each one that no mark excepts, the last one of a conversation, or those
# of a conversation's that a mark names (weight 1, train true).
Learn = Literal["all", "last", "weighted"]
_ROLE, _CONTENT = ("role", "from"), ("content", "value")
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "tool": "tool",
    "function": "tool", "ipython": "tool", "observation": "tool",
}  # fmt: skip
_LEARNED = ("weight", "train", "loss")  # of a message: 0 or false is not learned, 1 or true is
# They change what a row means, and no prompt style here can say it.
_REFUSED_IN_ROW = ("tools", "functions", "images", "videos", "audios")
_REFUSED_IN_MESSAGE = (
    "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "masked",
    "train_detail", "prefix", "images", "audio",
)  # fmt: skip
_EXPECTED = (
    "instruction/input/output, prompt/completion, question/answer, messages, conversations or text"
)


def row_messages(row: Mapping, learn: Learn = "all") -> list[Message]:
    """A data row of any kind as messages; its answer may be missing: such a row is a prompt.

    A `history` of [question, answer] pairs comes before the row's own question, and its answers are
    learned like those of earlier messages. A message with `"weight": 0`, `"train": false` or
    `"loss": false` is never learned.

    Args:
        learn: which answers are; of those that are not, `Message.learn` is False.

    Raises:
        InputError: if the columns are of no kind, a value is not text, or a column changes what the
            row means in a way that no prompt style can express.
    """
    names = _names(row)
    turns = _turns(row, names["turns"]) if "turns" in names else []
    refused = {name for name in _REFUSED_IN_ROW if row.get(name)}  # an empty list says nothing
    refused |= {name for turn in turns for name in _REFUSED_IN_MESSAGE if turn.get(name)}
    if refused:
        raise InputError(f"no prompt style here knows {', '.join(sorted(refused))}; take it out")
    system = _text(row, names["system"]) if "system" in names else ""
    messages = [Message("system", system)] if system else []
    if "text" in names:
        return [Message("text", _text(row, "text"))]
    if "turns" in names:
        said = [_message(turn, i, learn) for i, turn in enumerate(turns)]
        messages += [turn for turn in said if turn.role != "system" or turn.content]
        return _last_learned(messages) if learn == "last" else messages
    for question, answer in _history(row.get("history")):
        messages += [Message("user", question), Message("assistant", answer)]
    context = _text(row, names["context"]) if "context" in names else ""
    messages.append(Message("user", _text(row, names["question"]), context))
    if "answer" in names:
        messages.append(Message("assistant", _text(row, names["answer"])))
    return _last_learned(messages) if learn == "last" else messages


def _last_learned(messages: list[Message]) -> list[Message]:
    """The messages, of whose answers only the last one is learned."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    return [
        dataclasses.replace(message, learn=False) if i in answers[:-1] else message
        for i, message in enumerate(messages)
    ]


def ignored(row: Mapping) -> set[str]:
    """The columns of a row that nothing is made of, those of its messages as `messages.name`."""
    names = _names(row)
    found = {name for name in row if row[name] is not None} - set(names.values())
    if "turns" in names:
        read = (*_ROLE, *_CONTENT, *_LEARNED)
        for turn in _turns(row, names["turns"]):
            more = {name for name in turn if turn[name] is not None}.difference(read)
            found |= {f"{names['turns']}.{name}" for name in more}
    return found


def _names(row: Mapping) -> dict[str, str]:
    """The parts of a row and its names for them: {"question": "prompt", "answer": "completion"}."""
    names: dict[str, str] = {}
    for name, part in COLUMNS.items():
        if row.get(name) is not None:
            names.setdefault(part, name)
    kind = next((part for part in _KINDS if part in names), None)
    if kind is None and "context" in names and "answer" in names:  # {"input": ..., "output": ...}
        kind, names["question"] = "question", names.pop("context")
    if kind is None:
        raise InputError(_unknown(row))
    for part in ("system", "history"):
        if part not in _KINDS[kind] and row.get(names.get(part, part)):
            raise InputError(f"'{names[part]}' beside '{names[kind]}', which has no place for it")
    return {part: name for part, name in names.items() if part in (kind, *_KINDS[kind])}


def _unknown(row: Mapping) -> str:
    """What is wrong with columns of no kind, and which of them may be meant."""
    columns = ", ".join(map(reprlib.repr, sorted(row)[:12]))
    words = f"columns {columns or 'none'}; expected {_EXPECTED}"
    for name in row:
        if near := difflib.get_close_matches(name.lower(), COLUMNS, n=1):
            return f"{words}. If {name!r} is {near[0]!r}: --columns {near[0]}={name}"
    return f"{words}; --columns NAME=COLUMN,... says which is which"


def _text(values: Mapping, name: str) -> str:
    return _unicode(values.get(name), f"'{name}'")


def _unicode(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{what} is {kind_of(value) if value is not None else 'missing'}, expected text"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid Unicode at character {error.start}") from None
    return value


def _turns(row: Mapping, name: str) -> list[Mapping]:
    turns = row[name]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError(f"'{name}' is not a list of {{role, content}} or {{from, value}}")
    return turns


def _message(turn: Mapping, index: int, learn: Learn) -> Message:
    try:
        role = _role(_text(turn, _first(turn, _ROLE)))
        return Message(
            role, _content(turn, _first(turn, _CONTENT)), learn=_learn(turn, role, learn)
        )
    except InputError as error:
        raise InputError(f"message {index}: {error}") from None


def _first(values: Mapping, names: tuple[str, ...]) -> str:
    return next((name for name in names if values.get(name) is not None), names[0])


def _role(name: str) -> str:
    role = _ROLES.get(name.strip().lower())
    if role is None or role == "tool":
        known = ", ".join(name for name, role in _ROLES.items() if role != "tool")
        raise InputError(f"role {reprlib.repr(name)}, expected one of {known}")
    return role


def _learn(turn: Mapping, role: str, learn: Learn) -> bool | None:
    """Whether a message is learned; None where that goes without saying."""
    said = {name: turn[name] for name in _LEARNED if turn.get(name) is not None}
    for name, value in said.items():
        if value not in (0, 1):
            raise InputError(f"'{name}' is {reprlib.repr(value)}, expected 0 or 1, false or true")
    if not all(said.values()):
        return False
    if learn == "weighted" and role == "assistant" and not said:
        return False
    return True if said and role != "assistant" else None


def _content(turn: Mapping, name: str) -> str:
    """A message's text, which may be in parts [{"type": "text", "text": "..."}, ...]."""
    if not isinstance(turn.get(name), list):
        return _text(turn, name)
    return "".join(_part(part) for part in turn[name])


def _part(part: Any) -> str:
    if not isinstance(part, Mapping):
        return _unicode(part, "a part of the content")
    if part.get("type", "text") != "text":
        raise InputError(
            f"a part of the content is of type {reprlib.repr(part['type'])}; only text is read"
        )
    return _text(part, "text")


def _history(pairs: Any) -> Iterator[tuple[str, str]]:
    for pair in pairs if isinstance(pairs, list) else [pairs] if pairs else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError("'history' is not a list of [question, answer]")
        yield _unicode(pair[0], "'history'"), _unicode(pair[1], "'history'")
