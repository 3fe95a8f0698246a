"""Short answers asked of a model by greedy decoding, and whether it gives them to the letter."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jllama
from jllama.text.messages import row_messages
from jllama.text.prompt import PromptStyle, conversation
from jllama.text.rows import Examples, answered
from jllama.text.tokenizer import Tokenizer


class Asked(NamedTuple):
    """A row's number in the file, its prompt, and the answer that is right."""

    row: int
    prompt: list[int]
    answer: str


def short_answers(
    rows: Sequence[Mapping],
    examples: Examples,
    tokenizer: Tokenizer,
    style: PromptStyle,
    *,
    most: int,
    context: int,
) -> list[Asked]:
    """The whole rows whose last answer has at most `most` tokens, its end token counted.

    Args:
        rows: the data file, which the examples are numbered after.
        context: longest row that the model can write to its end.
    """
    asked = []
    parts = Counter(examples.rows.tolist())  # of a long row there may be several
    for example in examples:
        *before, answer = answered(row_messages(rows[example.row]))
        if not before or answer.learn is False:  # before a text there is nothing
            continue
        prompt = conversation(style, before, tokenizer)[0]
        fits = len(example.ids) <= context and len(example.ids) - len(prompt) <= most
        whole = parts[example.row] == 1 and example.ids[: len(prompt)].tolist() == prompt
        if fits and whole and not example.cut:
            said = answer.content
            if answer.calls:  # the template writes them
                ids = example.ids[len(prompt) :].tolist()
                said = tokenizer.decode([x for x in ids if x not in tokenizer.stop_ids])
            asked.append(Asked(example.row, prompt, said.strip()))
    return asked


def exact_answers(
    voice: tuple[jllama.Llama, float],
    asked: Sequence[Asked],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[], None],
) -> dict[int, bool]:
    """By row: whether greedy decoding gives the answer, white space around it aside, and stops."""
    model, adapter_scale = voice
    right = {}
    ordered = sorted(asked, key=lambda row: len(row.prompt))
    for start in range(0, len(ordered), batch_size):
        chosen = ordered[start : start + batch_size]
        prompts = [row.prompt for row in chosen]
        prompts += prompts[-1:] * (batch_size - len(chosen))  # another size is another compilation
        answers = jllama.generate(
            model, prompts, max_new_tokens, jllama.Sampling(temperature=0),
            stop_ids=tokenizer.stop_ids, adapter_scale=adapter_scale,
        )  # fmt: skip
        for row, ids in zip(chosen, answers, strict=False):
            *text, last = ids
            stops = last in tokenizer.stop_ids
            right[row.row] = stops and tokenizer.decode(text).strip() == row.answer
        advance()
    return right
