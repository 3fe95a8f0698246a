"""The turns of a conversation: {"role", "content"}, or {"from", "value"}."""

import reprlib
from collections.abc import Mapping
from typing import Any

from jllama.errors import InputError
from jllama.text.messages.message import Learn, Message, text_of, unicode_text
from jllama.text.messages.tools import CALLS, OF_TOOL, calls_of, more_of

_ROLE, _CONTENT = ("role", "from"), ("content", "value")
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "tool": "tool",
    "function": "tool", "ipython": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip
_LEARNED = ("weight", "train", "loss")  # of a message: 0 or false is not learned, 1 or true is


def message_of(turn: Mapping, index: int, learn: Learn) -> Message:
    """A turn as a message.

    Raises:
        InputError: what is wrong with it; `index` says which it is.
    """
    try:
        said = text_of(turn, _first(turn, _ROLE))
        role, content = _role(said), _first(turn, _CONTENT)
        more = more_of(turn, role)
        if said.strip().lower() == "function_call":  # LLaMA-Factory's: the content is the call
            more, turn = {"tool_calls": calls_of(turn, content)}, {**turn, content: ""}
        text = "" if more and turn.get(content) is None else _content(turn, content)
        return Message(role, text, learn=_learn(turn, role, learn), more=more)
    except InputError as error:
        raise InputError(f"message {index}: {error}") from None


def unread(turn: Mapping) -> set[str]:
    """The fields of a turn that nothing is made of."""
    read = {*_ROLE, *_CONTENT, *_LEARNED, *CALLS}
    if _ROLES.get(str(turn.get(_first(turn, _ROLE))).strip().lower()) == "tool":
        read |= {*OF_TOOL}
    return {name for name in turn if turn[name] is not None} - read


def _first(values: Mapping, names: tuple[str, ...]) -> str:
    return next((name for name in names if values.get(name) is not None), names[0])


def _role(name: str) -> str:
    role = _ROLES.get(name.strip().lower())
    if role is None:
        raise InputError(f"role {reprlib.repr(name)}, expected one of {', '.join(_ROLES)}")
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
        return text_of(turn, name)
    return "".join(_part(part) for part in turn[name])


def _part(part: Any) -> str:
    if not isinstance(part, Mapping):
        return unicode_text(part, "a part of the content")
    if part.get("type", "text") != "text":
        raise InputError(
            f"a part of the content is of type {reprlib.repr(part['type'])}; only text is read"
        )
    return text_of(part, "text")
