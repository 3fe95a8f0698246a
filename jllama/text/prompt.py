"""Prompt styles: how a conversation becomes text, shared by training and evaluation.

A style turns messages into pieces, each tokenised apart, so that the border between prompt and
answer is a border between ids:

    report   [<s>] "Name a colour." | "red" [</s>]
    plain    [<s>] "Name a colour.\\n" | "red" [</s>]
    alpaca   [<s>] "Below is an instruction ...### Response:\\n" | "red" [</s>]
    text     [<s>] | "Red is a colour." [</s>]

What stands right of the bar is learned; the rest is context. A row of text is learned whole
in any style; `text` takes no other rows, and a prompt of it is what the model goes on with.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from jllama.errors import InputError
from jllama.text.messages import Message, row_messages
from jllama.text.tokenizer import Tokenizer

PromptStyle = Literal["report", "plain", "alpaca", "llama2-chat", "llama3-chat", "chat", "text"]
_STYLES = get_args(PromptStyle)


class Piece(NamedTuple):
    """Text, or the name of one special token.

    Args:
        learn: whether the model learns to write it; None: only where prompts are learned, too.
    """

    text: str
    learn: bool | None = None
    special: bool = False


def chat_style(style: PromptStyle) -> PromptStyle:
    """The style where the user names a template: chat, which plain, the default, gives way to.

    Raises:
        InputError: if another one is asked for.
    """
    if style not in ("chat", "plain"):
        raise InputError(f"prompt_template and prompt_style {style}; a template is style chat")
    return "chat"


# Stanford Alpaca's template, and what its fields are where a question has an input.
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
ALPACA_PAIRED = ", paired with an input that provides further context"
ALPACA_INPUT = "### Input:\n{context}\n\n"


def _user_text(style: PromptStyle, message: Message) -> str:
    content, context = message.content, message.context
    if style == "report":
        return content + context
    if style == "alpaca":
        return ALPACA.format(
            paired=ALPACA_PAIRED if context else "",
            instruction=content,
            input=ALPACA_INPUT.format(context=context) if context else "",
        )
    text = f"{content}\n{context}" if context else content
    return text + "\n" if style == "plain" else text.strip()


def render(style: PromptStyle, messages: Sequence[Message]) -> list[Piece]:
    """The pieces of a conversation; without a last answer they end where the model begins.

    Raises:
        InputError: if the style cannot express the conversation.
    """
    if style not in _STYLES:
        raise InputError(f"prompt style {style!r}; choose from {', '.join(_STYLES)}")
    roles = [message.role for message in messages]
    if roles == ["text"]:
        return [Piece("<s>", special=True), *_answer(messages[0].content, messages[0])]
    if style == "text":
        if roles == ["user"]:  # of a prompt, never of training
            return [Piece("<s>", special=True), Piece(_user_text(style, messages[0]))]
        if roles[-1:] == ["user"]:
            raise InputError(
                f"a prompt of --prompt-style text is one text, not {', '.join(roles[:12])}; drop "
                "the system message and earlier turns"
            )
        raise InputError(
            f"--prompt-style text is for rows of text, not for {', '.join(roles[:12])}; give it a "
            "column of text (--columns text=COLUMN), or choose another style"
        )
    if unknown := _functions_of(messages):
        raise InputError(
            f"prompt style {style} does not know {', '.join(unknown)}; take --prompt-style chat "
            "with a model whose chat template does, or take them out of the row"
        )
    _check(messages)
    if style == "llama3-chat":
        return _llama3(messages)
    if style == "llama2-chat":
        return _llama2(messages)
    return _completion(style, messages)


_FUNCTIONS = {"tool", "tool_calls", "tools"}


def _functions_of(messages: Sequence[Message]) -> list[str]:
    """What of a conversation with functions stands in messages: tool, tool_calls, tools."""
    names = {m.role for m in messages}.union(*[m.more for m in messages])
    return sorted(names & _FUNCTIONS)


# What may follow a turn; a call is an assistant's turn that tools answer.
_FOLLOWS: Mapping[str, tuple[str, ...]] = {
    "": ("user",), "user": ("assistant", "call"), "assistant": ("user",), "call": ("tool",),
    "tool": ("tool", "assistant", "call"),
}  # fmt: skip


def _check(messages: Sequence[Message]) -> None:
    said = ["call" if m.calls else m.role for m in messages if m.role != "tools"]
    if not said:
        raise InputError("a conversation without messages")
    turns = said[1:] if said[0] == "system" else said
    follows = (now in _FOLLOWS.get(before, ()) for before, now in itertools.pairwise(["", *turns]))
    if not turns or not all(follows):
        raise InputError(
            "expected an optional system message, then user and assistant in turn"
            + (", and tool after a call" if {"call", "tool"} & {*said} else "")
            + f"; found {', '.join(said[:12])}"
            + (", ..." if len(said) > 12 else "")
        )


def _answer(text: str, message: Message) -> list[Piece]:
    """What the model writes, and its end; learned unless the message says otherwise."""
    learn = message.learn is not False
    return [Piece(text, learn), Piece("</s>", learn, special=True)]


def _completion(style: PromptStyle, messages: Sequence[Message]) -> list[Piece]:
    pieces, system = [], ""
    for message in messages:
        if message.role == "system":
            system = message.content + "\n"
        elif message.role == "assistant":
            pieces += _answer(message.content, message)
        else:
            text = system + _user_text(style, message)
            pieces += [Piece("<s>", message.learn, special=True), Piece(text, message.learn)]
            system = ""
    return pieces


def _llama2(messages: Sequence[Message]) -> list[Piece]:
    pieces, system = [], ""
    for message in messages:
        if message.role == "system":
            system = f"<<SYS>>\n{message.content}\n<</SYS>>\n\n"
        elif message.role == "user":
            text = f"[INST] {system}{_user_text('llama2-chat', message)} [/INST]"
            pieces += [Piece("<s>", message.learn, special=True), Piece(text, message.learn)]
            system = ""
        else:
            pieces += _answer(message.content.strip(), message)
    return pieces


def _llama3(messages: Sequence[Message]) -> list[Piece]:
    pieces = [Piece("<s>", special=True)]

    def header(role: str, learn: bool | None) -> list[Piece]:
        return [
            Piece("<|start_header_id|>", learn, special=True),
            Piece(role, learn),
            Piece("<|end_header_id|>", learn, special=True),
            Piece("\n\n", learn),
        ]

    for message in messages:
        learn = message.learn
        pieces += header(message.role, False if learn is False else None)
        if message.role == "assistant":
            learn = learn is not False
        pieces.append(Piece(_user_text("llama3-chat", message), learn))
        pieces.append(Piece("<|eot_id|>", learn, special=True))
    if messages[-1].role != "assistant":
        pieces += header("assistant", None)
    return pieces


def encode(
    pieces: Sequence[Piece], tokenizer: Tokenizer, train_on_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Ids and, for each, whether it is learned; the first never is, for nothing precedes it."""
    ids: list[int] = []
    learned: list[bool] = []
    for piece in pieces:
        if not piece.special:
            new = tokenizer.encode(piece.text)
        elif piece.text in ("<s>", "</s>"):  # every tokenizer's own begin and end
            new = [tokenizer.bos_id if piece.text == "<s>" else tokenizer.eos_id]
        else:
            new = [tokenizer.special(piece.text)]
        ids += new
        learned += [train_on_prompt if piece.learn is None else piece.learn] * len(new)
    learned[:1] = [False] * len(learned[:1])
    return ids, learned


def prompt_ids(style: PromptStyle, row: Mapping, tokenizer: Tokenizer) -> list[int]:
    """The ids of a row without its last answer: what generation starts from.

    Raises:
        InputError: as `row_messages` and `render`, and for a row of text, which has a prompt in
            style `text` alone.
    """
    messages = row_messages(row)
    if messages and messages[-1].role == "text":
        if style != "text":
            raise InputError("a row of text has no prompt; expected one of the other kinds")
        messages = [Message("user", messages[-1].content)]
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    return conversation(style, messages, tokenizer)[0]


def conversation(
    style: PromptStyle,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    train_on_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and, for each, whether it is learned.

    Without a last answer they end where the model begins.

    Raises:
        InputError: if the style, or the model's template, cannot express it.
    """
    if style != "chat" or [message.role for message in messages] == ["text"]:
        return encode(render(style, messages), tokenizer, train_on_prompt)
    if tokenizer.template is None:
        raise InputError("this model has no chat template; choose another prompt style")
    _check(messages)
    if any(message.learn and message.role != "assistant" for message in messages):
        raise InputError("only answers can be learned with --prompt-style chat")
    if messages[-1].role != "assistant":
        ids = tokenizer.marked(tokenizer.template.prompt(messages))
        return ids, [False] * len(ids)
    said = tokenizer.template.said(messages)
    ids = tokenizer.marked(said.text)
    learned = [train_on_prompt] * len(ids)
    for first, end, number in said.answers:
        begin, behind = (_ids_before(said.text[:at], ids, tokenizer) for at in (first, end))
        learned[begin:behind] = [messages[number].learn is not False] * (behind - begin)
    learned[:1] = [False] * len(learned[:1])
    return ids, learned


def _ids_before(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """How many ids the beginning of a text has; a chat begins with the same."""
    before = tokenizer.marked(text)
    if [*ids[: len(before)]] != before:
        raise InputError(
            "a token lies half in the prompt and half in the answer, as the chat template writes "
            "them, and no chat would begin so; choose another --prompt-style"
        )
    return len(before)
