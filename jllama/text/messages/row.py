"""The rows of data files as messages, whichever kind they are of:

    {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    {"prompt": "2 + 3 = ", "completion": "5"}
    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}
    {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]}
    {"text": "2 + 3 = 5"}

A conversation may call functions, which `tools` describes:

    {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    {"role": "tool", "content": "5"}

A `null` is as if it were missing. What would change the meaning of a row is honoured or refused by
its name; `ignored` tells the other columns.
"""

import dataclasses
import difflib
import functools
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jllama.errors import InputError
from jllama.text.messages.message import Learn, Message, text_of, unicode_text
from jllama.text.messages.tools import tools_of
from jllama.text.messages.turn import message_of, unread

# Columns, and the part of a row that each is; of several for one part the first counts.
COLUMNS = {
    "system": "system", "system_prompt": "system",
    "tools": "tools", "functions": "tools",
    "messages": "turns", "conversations": "turns",
    "history": "history",
    "instruction": "question", "prompt": "question", "question": "question",
    "input": "context", "context": "context",
    "output": "answer", "completion": "answer", "response": "answer", "answer": "answer",
    "text": "text",
}  # fmt: skip
# The part that tells a kind of row, and the others that it may have.
_KINDS = {
    "turns": ("system", "tools"),
    "question": ("system", "tools", "history", "context", "answer"),
    "text": (),
}
# They change what a row means, and no prompt style here can say it.
_REFUSED_IN_ROW = ("images", "videos", "audios")
_REFUSED_IN_MESSAGE = (
    "reasoning_content", "reasoning", "thinking", "masked", "train_detail", "prefix", "images",
    "audio",
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
    system = text_of(row, names["system"]) if "system" in names else ""
    messages = tools_of(row, names["tools"]) if "tools" in names else []
    messages += [Message("system", system)] if system else []
    if "text" in names:
        return [Message("text", text_of(row, "text"))]
    if "turns" in names:
        said = [message_of(turn, i, learn) for i, turn in enumerate(turns)]
        messages += [turn for turn in said if turn.role != "system" or turn.content]
        return _last_learned(messages) if learn == "last" else messages
    for question, answer in _history(row.get("history")):
        messages += [Message("user", question), Message("assistant", answer)]
    context = text_of(row, names["context"]) if "context" in names else ""
    messages.append(Message("user", text_of(row, names["question"]), context))
    if "answer" in names:
        messages.append(Message("assistant", text_of(row, names["answer"])))
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
        for turn in _turns(row, names["turns"]):
            found |= {f"{names['turns']}.{name}" for name in unread(turn)}
    return found


def kind(row: Mapping) -> str:
    """The columns that tell a row's kind: `messages`, `text`, `instruction/output`.

    Raises:
        InputError: if they are of no kind.
    """
    names = _names(row)
    told = next(part for part in _KINDS if part in names)
    return "/".join(names[part] for part in (told, "answer") if part in names)


def _names(row: Mapping) -> Mapping[str, str]:
    """The parts of a row and its names for them: {"question": "prompt", "answer": "completion"}."""
    names, kind, misplaced = _parts(tuple([name for name in row if row[name] is not None]))
    if not kind:
        raise InputError(_unknown(row))
    for name in misplaced:
        if row[name]:
            raise InputError(f"'{name}' beside '{names[kind]}', which has no place for it")
    return names


@functools.lru_cache  # a file has rows of few kinds
def _parts(columns: Sequence[str]) -> tuple[Mapping[str, str], str, Sequence[str]]:
    """The parts that columns are, the one that tells their kind (none: ""), those out of place."""
    names: dict[str, str] = {}
    for name, part in COLUMNS.items():
        if name in columns:
            names.setdefault(part, name)
    kind = next((part for part in _KINDS if part in names), "")
    if not kind and "context" in names and "answer" in names:  # {"input": ..., "output": ...}
        kind, names["question"] = "question", names.pop("context")
    if not kind:
        return {}, "", ()
    known = (kind, *_KINDS[kind])
    misplaced = [names[x] for x in ("system", "history", "tools") if x in names and x not in known]
    return {part: name for part, name in names.items() if part in known}, kind, misplaced


def _unknown(row: Mapping) -> str:
    """What is wrong with columns of no kind, and which of them may be meant."""
    columns = ", ".join(map(reprlib.repr, sorted(row)[:12]))
    words = f"columns {columns or 'none'}; expected {_EXPECTED}"
    for name in row:
        if near := difflib.get_close_matches(name.lower(), COLUMNS, n=1):
            return f"{words}. If {name!r} is {near[0]!r}: --columns {near[0]}={name}"
    return f"{words}; --columns NAME=COLUMN,... says which is which"


def _turns(row: Mapping, name: str) -> list[Mapping]:
    turns = row[name]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError(f"'{name}' is not a list of {{role, content}} or {{from, value}}")
    return turns


def _history(pairs: Any) -> Iterator[tuple[str, str]]:
    for pair in pairs if isinstance(pairs, list) else [pairs] if pairs else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError("'history' is not a list of [question, answer]")
        yield unicode_text(pair[0], "'history'"), unicode_text(pair[1], "'history'")
