"""A data file's rows as ids, and what of them is learned: shared by training and evaluation.

{"prompt": "2 + 3 = ", "completion": "5"}  ->  ids [1 7 8 4 2], learned [0 0 0 1 1]
"""

import codecs
import dataclasses
import io
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from jllama.errors import InputError
from jllama.folders.json_files import listed, read_bytes, values_in
from jllama.text.prompt import PromptStyle, encode, render, row_messages
from jllama.text.tokenizer import Tokenizer

_OPEN, _COMMA, _CLOSE = (re.compile(rf"[ \t\r\n]*{mark}[ \t\r\n]*") for mark in (r"\[", ",", r"\]"))


class Rows(Sequence[dict]):
    """The rows of a file, each parsed when it is asked for: only the file's own text is held."""

    def __init__(self, content: bytes, spans: Int64[np.ndarray, "rows 2"]):
        self._content, self._spans = content, spans

    @classmethod
    def of(cls, content: bytes) -> "Rows":
        """Parses every row once; ValueError if there is anything else, or nothing."""
        spans = array("q")
        is_list = re.match(rb"\s*\[", content)
        for row, start, stop in (_listed_rows if is_list else _line_rows)(content):
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__} at byte {start}")
            spans.extend((start, stop))
        if not spans:
            raise ValueError("no rows")
        return cls(content, np.array(spans, np.int64).reshape(-1, 2))

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Rows(self._content, self._spans[index])
        start, stop = self._spans[index]
        return json.loads(self._content[start:stop].decode())


def _line_rows(content: bytes) -> Iterator[tuple[Any, int, int]]:
    """The values of a JSONL file, and where each begins and ends."""
    stop = 0
    for line in io.BytesIO(content):
        start, stop = stop, stop + len(line)
        if not line.isspace():
            yield json.loads(line.decode()), start, stop


def _listed_rows(content: bytes) -> Iterator[tuple[Any, int, int]]:
    """The values in a JSON list, and where each begins and ends."""
    text = content.decode("latin-1")  # a character a byte: places in it are places in the file
    mark = _OPEN.match(text)
    while mark:
        row, stop = json.JSONDecoder().raw_decode(text, mark.end())
        content[mark.end() : stop].decode()  # or UnicodeDecodeError, a ValueError
        yield row, mark.end(), stop
        mark = _COMMA.match(text, stop)
    if not _CLOSE.fullmatch(text, stop):
        raise ValueError("more than a list")


class Example(NamedTuple):
    """One row as ids, and for each id whether it is learned; the first never is."""

    row: int  # its number in the file
    ids: Int32[np.ndarray, " T"]
    learned: Bool[np.ndarray, " T"]
    cut: bool = False  # at max_seq_len


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of a file in flat arrays, 5 bytes a token; `examples[i]` is a view of one.

    ids     [1 7 8 4 2  1 9 2  ...]    learned  [0 0 0 1 1  0 1 1  ...]
    starts  [0 5 ...]                  lengths  [5 3 ...]
    """

    ids: Int32[np.ndarray, " tokens"]
    learned: Bool[np.ndarray, " tokens"]
    starts: Int64[np.ndarray, " examples"]
    lengths: Int32[np.ndarray, " examples"]
    learned_counts: Int32[np.ndarray, " examples"]
    rows: Int32[np.ndarray, " examples"]  # their numbers in the file
    cut: Bool[np.ndarray, " examples"]

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Examples":
        """Copies examples, as they come, into buffers that grow."""
        ids, learned, each = bytearray(), bytearray(), array("i")
        for example in examples:
            ids += example.ids.tobytes()
            learned += example.learned.tobytes()
            count = int(np.count_nonzero(example.learned))
            each.extend((len(example.ids), count, example.row, example.cut))
        lengths, counts, rows, cut = np.array(each, np.int32).reshape(-1, 4).T.copy()
        return cls(
            ids=np.frombuffer(ids, np.int32),
            learned=np.frombuffer(learned, bool),
            starts=np.cumsum(lengths, dtype=np.int64) - lengths,
            lengths=lengths,
            learned_counts=counts,
            rows=rows,
            cut=cut.astype(bool),
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        here = slice(self.starts[index], self.starts[index] + self.lengths[index])
        row, cut = int(self.rows[index]), bool(self.cut[index])
        return Example(row, self.ids[here], self.learned[here], cut)

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))

    def take(self, chosen: Any) -> "Examples":
        """Those of a list of positions or a mask; tokens are shared, not copied."""
        of_each = ("starts", "lengths", "learned_counts", "rows", "cut")
        return dataclasses.replace(self, **{name: getattr(self, name)[chosen] for name in of_each})


def read_rows(path: str | Path) -> Sequence[dict]:
    """The rows of a JSON list or a JSONL file.

    Raises:
        InputError: naming the line or position of what is wrong.
    """
    wanted = "a JSON list or one JSON object a line; give one with --data"
    content = read_bytes(path, wanted).removeprefix(codecs.BOM_UTF8)
    try:
        return Rows.of(content)
    except (ValueError, RecursionError):  # something to complain of, or one object over many lines
        values = values_in(content, path, wanted)
    rows = [values] if isinstance(values, dict) else values
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of objects, found {type(rows).__name__}")
    wrong = [f"row {i}: {type(row).__name__}" for i, row in enumerate(rows)
             if not isinstance(row, dict)]  # fmt: skip
    if not rows or wrong:
        raise InputError(f"{path}: expected a list of objects; found {listed(wrong) or 'no rows'}")
    return rows


def make_examples(
    rows: Sequence[Mapping],
    tokenizer: Tokenizer,
    style: PromptStyle,
    *,
    max_seq_len: int,
    train_on_prompt: bool,
    skip_bad_rows: int,
    source: str,
) -> tuple[Examples, list[str]]:
    """Tokenises rows, one at a time; gives the usable ones, and what is wrong with the others.

    Raises:
        InputError: if more than `skip_bad_rows` rows are unusable.
    """
    problems: list[str] = []

    def usable() -> Iterator[Example]:
        for index, row in enumerate(rows):
            try:
                whole, learns = _encode_row(row, tokenizer, style)
                ids = np.array(whole[:max_seq_len], np.int32)
                learned = np.array(learns[:max_seq_len])
                if train_on_prompt:
                    learned[1:] = True
                if not learned.any():
                    raise InputError(f"its prompt fills all {max_seq_len} tokens")
            except InputError as error:
                problems.append(f"row {index}: {error}")
                continue
            yield Example(index, ids, learned, cut=len(whole) > max_seq_len)

    examples = Examples.of(usable())
    if len(problems) > skip_bad_rows or not len(examples):
        raise InputError(
            f"{source}: {len(problems)} unusable of {len(rows)} rows; mend them, raise "
            f"--max-seq-len, or allow them with --skip-bad-rows {len(problems)}\n  "
            + listed(problems)
        )
    return examples, problems


def _encode_row(
    row: Mapping, tokenizer: Tokenizer, style: PromptStyle
) -> tuple[list[int], list[bool]]:
    """A row's ids and what is learned; InputError if it has no answer."""
    messages = row_messages(row)
    if messages and messages[-1].role != "assistant":
        raise InputError("no answer; expected output, completion or an assistant message")
    if messages and not messages[-1].content.strip():
        raise InputError("the answer is empty")
    return encode(render(style, messages), tokenizer)
