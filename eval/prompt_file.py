"""What a file of prompts asks: its rows as ids, and how they are to be answered.

    {"temperature": 0, "prompts": [{"prompt": "Name a colour.", "max_new_tokens": 8}, ...]}

or rows of any kind that training reads, without settings beside them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jllama
from jllama.errors import AtLeast1, InputError, Seed, checked
from jllama.folders.json_files import listed
from jllama.text.prompt import PromptStyle, prompt_ids
from jllama.text.row_file import read_rows
from jllama.text.tokenizer import Tokenizer


@checked
class Decoding(jllama.Sampling):
    """How answers are made: what a file may say beside its rows, for all of them."""

    max_new_tokens: AtLeast1 = 128
    seed: Seed = 1


@checked
class Limits:
    """What a row may say of its answer's length."""

    max_new_tokens: AtLeast1 | None = None
    max_total_tokens: AtLeast1 | None = None


class Prompts(NamedTuple):
    """A file's rows, the ids of each prompt, how many new tokens each answer may have, and how."""

    rows: Sequence[dict]
    ids: list[list[int]]
    budgets: list[int]
    decoding: Decoding


def read_prompts(
    file: str | Path,
    tokenizer: Tokenizer,
    style: PromptStyle,
    *,
    context: int,
    flags: Mapping[str, Any],
    limit: int = 0,
) -> Prompts:
    """Reads a file's prompts, or the first ones.

    Args:
        context: of the model, in tokens.
        flags: fields of `Decoding`, which come before what the file says; None says nothing.
        limit: 0 takes all rows.

    Raises:
        InputError: everything that is wrong with the rows, prompts that fill the context included.
    """
    rows = read_rows(file)
    try:
        decoding = Decoding(**_given(rows.beside, Decoding))
    except InputError as error:
        raise InputError(f"{file}: beside its rows: {error}") from None
    rows = rows[: limit or None]
    asked = _given(flags, Decoding)
    ids: list[list[int]] = []
    budgets, problems = [], []
    for index, row in enumerate(rows):
        try:
            ids.append(prompt_ids(style, row, tokenizer))
            room = context - len(ids[-1])
            if room <= 0:
                raise InputError(
                    f"its prompt has {len(ids[-1]):,} tokens, which leaves an answer no room in "
                    f"the model's context of {context:,}; shorten it"
                )
            own = _budget(row, len(ids[-1]), decoding)
            budgets.append(asked.get("max_new_tokens", own))
        except InputError as error:
            problems.append(f"row {index}: {error}")
    if problems:
        raise InputError(f"{file}: {listed(problems)}")
    return Prompts(rows, ids, budgets, replace(decoding, **asked))


def _given(said: Mapping[str, Any], settings: type) -> dict[str, Any]:
    """What is said of the fields of settings."""
    names = [field.name for field in fields(settings)]
    return {name: said[name] for name in names if said.get(name) is not None}


def _budget(row: Mapping, prompt_length: int, decoding: Decoding) -> int:
    """How many new tokens a row's answer may have: the row's own limit, else that of the file."""
    limits = Limits(**_given(row, Limits))
    misplaced = _given(row, Decoding).keys() - _given(row, Limits).keys()
    if misplaced:
        raise InputError(
            f"{', '.join(sorted(misplaced))}: one for all rows; say it beside them, or by a flag"
        )
    if limits.max_total_tokens is not None:
        return max(0, limits.max_total_tokens - prompt_length)
    return limits.max_new_tokens or decoding.max_new_tokens


def read_references(path: str) -> dict[str, dict[str, str]]:
    """Recorded answers by prompt: every text field of a row whose name ends in `answer`.

    Raises:
        InputError: if the file has no rows, or rows without a prompt.
    """
    rows = read_rows(path)
    wrong = [f"row {i}: no text in 'prompt'" for i, row in enumerate(rows)
             if not isinstance(row.get("prompt"), str)]  # fmt: skip
    if wrong:
        raise InputError(f"{path}: expected recorded answers; {listed(wrong)}")
    return {
        row["prompt"].strip(): {
            name: value
            for name, value in row.items()
            if name.endswith("answer") and isinstance(value, str)
        }
        for row in rows
    }
