"""A data file's rows as ids, and what of them is learned: shared by training and evaluation.

{"prompt": "2 + 3 = ", "completion": "5"}  ->  ids [1 7 8 4 2], learned [0 0 0 1 1]
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jllama.errors import InputError
from jllama.prompt import PromptStyle, encode, render, row_messages
from jllama.tokenizer import Tokenizer

_SHOWN = 20  # problems of one file


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
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such data file; give one with --data") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --data wants a JSON or JSONL file") from error
    if not text.strip():
        raise InputError(f"{path}: empty; expected a JSON list or one JSON object a line")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {error.lineno}: invalid JSON ({error.msg})") from error
    else:
        rows = _json_lines(path, text)
    wrong = [f"row {i}: {type(row).__name__}" for i, row in enumerate(rows)
             if not isinstance(row, dict)]  # fmt: skip
    if not rows or wrong:
        raise InputError(f"{path}: expected a list of objects; found {_some(wrong) or 'no rows'}")
    return rows


def _json_lines(path: Path, text: str) -> list:
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                problems.append(f"line {number}: invalid JSON ({error.msg})")
    if problems:
        raise InputError(f"{path}: {_some(problems)}")
    return rows


def _some(problems: Sequence[str]) -> str:
    more = len(problems) - _SHOWN
    return "\n  ".join(problems[:_SHOWN]) + (f"\n  and {more} more" if more > 0 else "")


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
            + _some(problems)
        )
    return Examples(examples, problems)
