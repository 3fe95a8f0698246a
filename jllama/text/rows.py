"""A data file's rows as ids, and what of them is learned: shared by training and evaluation.

{"prompt": "2 + 3 = ", "completion": "5"}  ->  ids [1 7 8 4 2], learned [0 0 0 1 1]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jllama.errors import InputError
from jllama.folders.json_files import listed, read_values
from jllama.text.prompt import PromptStyle, encode, render, row_messages
from jllama.text.tokenizer import Tokenizer


class Example(NamedTuple):
    """One row as ids, and for each id whether it is learned."""

    row: int
    ids: list[int]
    learned: list[bool]
    cut: bool = False  # at max_seq_len


@dataclass(frozen=True)
class Examples:
    """The usable rows of a file, and what happened to the others."""

    rows: list[Example]
    skipped: list[str]

    @property
    def truncated(self) -> int:
        """Rows that lost their end."""
        return sum(example.cut for example in self.rows)


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a JSON list or a JSONL file.

    Raises:
        InputError: naming the line or position of what is wrong.
    """
    content = read_values(path, "a JSON list or one JSON object a line; give one with --data")
    rows = [content] if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of objects, found {type(rows).__name__}")
    wrong = [f"row {i}: {type(row).__name__}" for i, row in enumerate(rows)
             if not isinstance(row, dict)]  # fmt: skip
    if not rows or wrong:
        raise InputError(f"{path}: expected a list of objects; found {listed(wrong) or 'no rows'}")
    return rows


def make_examples(
    rows: Sequence[dict],
    tokenizer: Tokenizer,
    style: PromptStyle,
    *,
    max_seq_len: int,
    train_on_prompt: bool,
    skip_bad_rows: int,
    source: str,
) -> Examples:
    """Tokenises rows; those with nothing to learn are problems, shown together.

    Raises:
        InputError: if more than `skip_bad_rows` rows are unusable.
    """
    examples, problems = [], []
    for index, row in enumerate(rows):
        try:
            messages = row_messages(row)
            if messages and messages[-1].role != "assistant":
                raise InputError("no answer; expected output, completion or an assistant message")
            if messages and not messages[-1].content.strip():
                raise InputError("the answer is empty")
            ids, learned = encode(render(style, messages), tokenizer)
        except InputError as error:
            problems.append(f"row {index}: {error}")
            continue
        too_long = len(ids) > max_seq_len
        ids, learned = ids[:max_seq_len], learned[:max_seq_len]
        if train_on_prompt:
            learned = [True] * len(ids)
        if not any(learned[1:]):
            problems.append(f"row {index}: its prompt fills all {max_seq_len} tokens")
            continue
        examples.append(Example(index, ids, learned, too_long))
    if len(problems) > skip_bad_rows or not examples:
        raise InputError(
            f"{source}: {len(problems)} unusable of {len(rows)} rows; mend them, raise "
            f"--max-seq-len, or allow them with --skip-bad-rows {len(problems)}\n  "
            + listed(problems)
        )
    return Examples(examples, problems)
