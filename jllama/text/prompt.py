"""Prompt styles: how a conversation becomes text, shared by training and evaluation.

A style turns messages into pieces, each tokenised apart, so that the border between prompt and
answer is a border between ids:

    report   [<s>] "Name a colour." | "red" [</s>]
    plain    [<s>] "Name a colour.\\n" | "red" [</s>]
    alpaca   [<s>] "Below is an instruction ...### Response:\\n" | "red" [</s>]

What stands right of the bar is learned; the rest is context.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from jllama.errors import InputError
from jllama.text.tokenizer import Tokenizer

PromptStyle = Literal["report", "plain", "alpaca", "llama2-chat", "llama3-chat"]


@dataclass(frozen=True)
class Message:
    """One turn: role `system`, `user` or `assistant`; `context` is an Alpaca row's input."""

    role: str
    content: str
    context: str = ""


@dataclass(frozen=True)
class Piece:
    """Text, or the name of one special token, and whether the model learns to write it."""

    text: str
    learn: bool = False
    special: bool = False


_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


def _user_text(style: PromptStyle, message: Message) -> str:
    content, context = message.content, message.context
    if style == "report":
        return content + context
    if style == "alpaca":  # Stanford Alpaca's template, with and without an input
        return _ALPACA.format(
            paired=", paired with an input that provides further context" if context else "",
            instruction=content,
            input=f"### Input:\n{context}\n\n" if context else "",
        )
    text = f"{content}\n{context}" if context else content
    return text + "\n" if style == "plain" else text.strip()


def render(style: PromptStyle, messages: Sequence[Message]) -> list[Piece]:
    """The pieces of a conversation; without a last answer they end where the model begins.

    Raises:
        InputError: if the style cannot express the conversation.
    """
    if style not in get_args(PromptStyle):
        raise InputError(f"prompt style {style!r}; choose from {', '.join(get_args(PromptStyle))}")
    _check(messages)
    if style == "llama3-chat":
        return _llama3(messages)
    if style == "llama2-chat":
        return _llama2(messages)
    return _completion(style, messages)


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise InputError("a conversation without messages")
    turns = [m.role for m in messages if m.role != "system"]
    system = [i for i, m in enumerate(messages) if m.role == "system"]
    expected = ["user", "assistant"] * len(turns)
    if system not in ([], [0]) or turns != expected[: len(turns)] or not turns:
        raise InputError(
            "expected an optional system message, then user and assistant in turn; found "
            + ", ".join(m.role for m in messages)
        )


def _completion(style: PromptStyle, messages: Sequence[Message]) -> list[Piece]:
    pieces, system = [], ""
    for message in messages:
        if message.role == "system":
            system = message.content + "\n"
        elif message.role == "assistant":
            pieces += [Piece(message.content, learn=True), Piece("</s>", learn=True, special=True)]
        else:
            text = _user_text(style, message)
            pieces += [Piece("<s>", special=True), Piece(system + text)]
            system = ""
    return pieces


def _llama2(messages: Sequence[Message]) -> list[Piece]:
    pieces, system = [], ""
    for message in messages:
        if message.role == "system":
            system = f"<<SYS>>\n{message.content}\n<</SYS>>\n\n"
        elif message.role == "user":
            text = f"[INST] {system}{_user_text('llama2-chat', message)} [/INST]"
            pieces += [Piece("<s>", special=True), Piece(text)]
            system = ""
        else:
            pieces += [
                Piece(message.content.strip(), learn=True),
                Piece("</s>", learn=True, special=True),
            ]
    return pieces


def _llama3(messages: Sequence[Message]) -> list[Piece]:
    pieces = [Piece("<s>", special=True)]

    def header(role):
        return [
            Piece("<|start_header_id|>", special=True),
            Piece(role),
            Piece("<|end_header_id|>", special=True),
            Piece("\n\n"),
        ]

    for message in messages:
        learn = message.role == "assistant"
        text = _user_text("llama3-chat", message)
        pieces += [*header(message.role), Piece(text, learn=learn)]
        pieces.append(Piece("<|eot_id|>", learn=learn, special=True))
    if messages[-1].role != "assistant":
        pieces += header("assistant")
    return pieces


def encode(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Ids and, for each, whether it is learned."""
    ids, learned = [], []
    for piece in pieces:
        if not piece.special:
            new = tokenizer.encode(piece.text)
        elif piece.text in ("<s>", "</s>"):  # every tokenizer's own begin and end
            new = [tokenizer.bos_id if piece.text == "<s>" else tokenizer.eos_id]
        else:
            new = [tokenizer.special(piece.text)]
        ids += new
        learned += [piece.learn] * len(new)
    return ids, learned


def row_messages(row: Mapping) -> list[Message]:
    """A data row of any of the three kinds as messages.

        {"instruction": "Add.", "input": "2 and 3", "output": "5"}
        {"prompt": "2 + 3 = ", "completion": "5"}
        {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", ...}]}

    The answer may be missing: such a row is a prompt.

    Raises:
        InputError: if the keys are none of these or a value is not text.
    """
    if "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise InputError("'messages' is not a list of {role, content}")
        return [Message(_text(turn, "role"), _text(turn, "content")) for turn in turns]
    if "instruction" in row:
        prompt = Message("user", _text(row, "instruction"), _text(row, "input", ""))
        answer = "output"
    elif "prompt" in row:
        prompt, answer = Message("user", _text(row, "prompt")), "completion"
    else:
        raise InputError(
            f"keys {sorted(row)}; expected instruction/input/output, prompt/completion or messages"
        )
    return [prompt, Message("assistant", _text(row, answer))] if answer in row else [prompt]


def _text(row: Mapping, key: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        raise InputError(f"'{key}' is {type(value).__name__}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"'{key}' is not valid Unicode at character {error.start}") from None
    return value


def prompt_ids(style: PromptStyle, row: Mapping, tokenizer: Tokenizer) -> list[int]:
    """The ids of a row without its last answer: what generation starts from."""
    messages = row_messages(row)
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    return encode(render(style, messages), tokenizer)[0]
