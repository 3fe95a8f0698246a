"""One turn of a conversation, and the texts and JSON that rows hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jllama.errors import InputError
from jllama.folders.json_files import ROW_DECODER, kind_of

# Which answers are learned: each one that no mark excepts, the last one of a conversation, or those
# of a conversation's that a mark names (weight 1, train true).
Learn = Literal["all", "last", "weighted"]


@dataclass(frozen=True)
class Message:
    """One turn.

    Args:
        role: `system`, `user`, `assistant`, or `tool` for what a function answers; `tools`, before
            all others, for what may be called; `text` for a row that is a text, no conversation.
        context: an Alpaca row's input.
        learn: whether the model learns to write it; None: answers and texts yes, the others only
            with --train-on-prompt.
        more: what a chat template reads besides, by its names: `tool_calls` of an assistant,
            `tool_call_id` and `name` of a tool, the list `tools`.
    """

    role: str
    content: str
    context: str = ""
    learn: bool | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def calls(self) -> Sequence[Mapping]:
        """The functions that an assistant calls: {"function": {"name": ..., "arguments": {}}}."""
        return self.more.get("tool_calls", ())


def text_of(values: Mapping, name: str) -> str:
    """A field that must be a text; InputError if it is not."""
    return unicode_text(values.get(name), f"'{name}'")


def unicode_text(value: Any, what: str) -> str:
    """A text that UTF-8 can hold; InputError, which calls it `what`, if it is another value."""
    if not isinstance(value, str):
        raise InputError(
            f"{what} is {kind_of(value) if value is not None else 'missing'}, expected text"
        )
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{what} is not valid Unicode at character {error.start}") from None
    return value


def parsed(value: Any, what: str) -> Any:
    """A value, or the one that a text of JSON has, as tables give it; InputError if it is none."""
    if not isinstance(value, str):
        return value
    try:
        return ROW_DECODER.decode(value.strip() or "null")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is a text, and no JSON ({error})") from None
