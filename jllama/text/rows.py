"""Rows as ids, and what of them is learned: shared by training and evaluation.

{"prompt": "2 + 3 = ", "completion": "5"}  ->  ids [1 7 8 4 2], learned [0 0 0 1 1]
"""

import dataclasses
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt16

from jllama.errors import InputError
from jllama.folders.json_files import listed
from jllama.text.messages import Learn, Message, row_messages
from jllama.text.prompt import PromptStyle, conversation
from jllama.text.row_file import Rows
from jllama.text.tokenizer import Tokenizer

# What a tokenizer or a template somewhere would read as one token, or as a border.
SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|<(?:bos|eos|pad|unk)>"
)


# What becomes of a row that is longer than max_seq_len: it loses its end, is left out, or goes on
# as another example, whose first id is the last one of the part before it.
LongRows = Literal["cut", "drop", "split"]


class Example(NamedTuple):
    """One row as ids, and for each id whether it is learned; the first never is."""

    row: int  # its number in the file
    ids: Int32[np.ndarray, " T"]
    learned: Bool[np.ndarray, " T"]
    cut: bool = False  # at max_seq_len


@dataclass(frozen=True)
class Rendering:
    """How rows become examples; the fields are named as the settings of a run are."""

    prompt_style: PromptStyle
    max_seq_len: int
    train_on_prompt: bool = False
    learn: Learn = "all"
    long_rows: LongRows = "cut"


class Part(NamedTuple):
    """What becomes of some rows: examples in flat arrays, and what is wrong with the other rows."""

    ids: Int32[np.ndarray, " tokens"]
    learned: Bool[np.ndarray, " tokens"]
    each: Int32[np.ndarray, "examples 5"]  # tokens, learned tokens, row, turns, whether it is cut
    problems: list[tuple[int, str]]  # the rows' numbers, and the reasons
    notes: dict[str, "array[int]"]


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of a file in flat arrays, 5 bytes a token; `examples[i]` is a view of one.

    ids     [1 7 8 4 2  1 9 2  ...]    learned  [0 0 0 1 1  0 1 1  ...]
    starts  [0 5 ...]                  lengths  [5 3 ...]
    """

    ids: Int32[np.ndarray, " tokens"] | UInt16[np.ndarray, " tokens"]
    learned: Bool[np.ndarray, " tokens"]
    starts: Int64[np.ndarray, " examples"]
    lengths: Int32[np.ndarray, " examples"]
    learned_counts: Int32[np.ndarray, " examples"]
    rows: Int32[np.ndarray, " examples"]  # their numbers in the file
    turns: Int32[np.ndarray, " examples"]  # how often their first id, mostly BOS, comes
    cut: Bool[np.ndarray, " examples"]
    weights: Float32[np.ndarray, " examples"]  # how often an epoch has each
    # What is noteworthy of rows of the whole file, and their numbers.
    notes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Examples":
        """Copies examples, as they come, into buffers that grow."""
        ids, learned, each = bytearray(), bytearray(), array("i")
        for example in examples:
            ids += example.ids.tobytes()
            learned += example.learned.tobytes()
            count = int(np.count_nonzero(example.learned))
            turns = int(np.count_nonzero(example.ids == example.ids[0]))
            each.extend((len(example.ids), count, example.row, turns, example.cut))
        of_each = np.array(each, np.int32).reshape(-1, 5)
        return cls.flat(np.frombuffer(ids, np.int32), np.frombuffer(learned, bool), of_each)

    @classmethod
    def flat(
        cls, ids: np.ndarray, learned: np.ndarray, each: Int32[np.ndarray, "examples 5"]
    ) -> "Examples":
        """Those of the arrays of a `Part`, or of several joined ones; ids may be 16 bits wide."""
        lengths, counts, rows, turns, cut = each.T.copy()
        return cls(
            ids=ids,
            learned=learned,
            starts=np.cumsum(lengths, dtype=np.int64) - lengths,
            lengths=lengths,
            learned_counts=counts,
            rows=rows,
            turns=turns,
            cut=cut.astype(bool),
            weights=np.ones(len(rows), np.float32),
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        here = slice(self.starts[index], self.starts[index] + self.lengths[index])
        row, cut = int(self.rows[index]), bool(self.cut[index])
        return Example(row, self.ids[here].astype(np.int32, copy=False), self.learned[here], cut)

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))

    def take(self, chosen: Any) -> "Examples":
        """Those of a list of positions or a mask; tokens are shared, not copied."""
        of_each = ("starts", "lengths", "learned_counts", "rows", "turns", "cut", "weights")
        return dataclasses.replace(self, **{name: getattr(self, name)[chosen] for name in of_each})


def make_examples(
    rows: Sequence[Mapping],
    tokenizer: Tokenizer,
    style: PromptStyle,
    *,
    max_seq_len: int,
    train_on_prompt: bool,
    skip_bad_rows: int,
    source: str,
    learn: Learn = "all",
    long_rows: LongRows = "cut",
) -> tuple[Examples, list[str]]:
    """Tokenises rows, one at a time; gives the usable ones, and what is wrong with the others.

    Raises:
        InputError: if more than `skip_bad_rows` rows are unusable.
    """
    rendering = Rendering(style, max_seq_len, train_on_prompt, learn, long_rows)
    part = make_part(rows, tokenizer, rendering)
    where = rows.place if isinstance(rows, Rows) else "row {}".format
    problems = [f"{where(index)}: {words}" for index, words in part.problems]
    examples = dataclasses.replace(Examples.flat(*part[:3]), notes=part.notes)
    check_usable(examples, problems, len(rows), max_seq_len, skip_bad_rows, source)
    return examples, problems


def make_part(
    rows: Iterable[Mapping], tokenizer: Tokenizer, rendering: Rendering, first: int = 0
) -> Part:
    """Tokenises rows, of which the first has this number; there need be no usable one."""
    ids, learned, each = array("i"), bytearray(), array("i")
    problems: list[tuple[int, str]] = []
    notes: dict[str, array[int]] = {}
    max_seq_len, long_rows = rendering.max_seq_len, rendering.long_rows
    for index, row in enumerate(rows, first):
        try:
            said = row_messages(row, rendering.learn)
            messages = answered(said)
            whole, learns = conversation(
                rendering.prompt_style, messages, tokenizer, rendering.train_on_prompt
            )
            marks = bytes(learns)
            if 1 not in marks:
                raise InputError("each answer is marked as not to be learned")
            long = len(whole) > max_seq_len
            if long and long_rows == "cut" and 1 not in marks[:max_seq_len]:
                raise InputError(f"its prompt fills all {max_seq_len} tokens")
        except InputError as error:
            problems.append((index, str(error)))
            continue
        found = [*_notes(messages, dropped=len(said) > len(messages))]
        if long and long_rows == "drop":
            found.append(f"are longer than {max_seq_len} tokens, and left out")
        for note in found:
            notes.setdefault(note, array("i")).append(index)
        parts = [(whole, marks)]  # lists and bytes: an array of numpy's for each row takes as long
        if long and long_rows == "cut":
            parts = [(whole[:max_seq_len], marks[:max_seq_len])]
        elif long:
            parts = [*_parts(whole, marks, max_seq_len)] if long_rows == "split" else []
        for some, some_marks in parts:
            ids.fromlist(some)
            learned += some_marks
            turns = some.count(whole[0])
            each.extend((len(some), some_marks.count(1), index, turns, long and long_rows == "cut"))
    return Part(
        np.frombuffer(ids, np.int32),
        np.frombuffer(learned, bool),
        np.array(each, np.int32).reshape(-1, 5),
        problems,
        notes,
    )


def check_usable(
    examples: Examples,
    problems: Sequence[str],
    rows: int,
    max_seq_len: int,
    skip_bad_rows: int,
    source: str,
) -> None:
    """Refuses rows of which too many are unusable, or all too long.

    Raises:
        InputError: lists the problems.
    """
    if len(problems) > skip_bad_rows or len(problems) == rows:
        raise InputError(
            f"{source}: {len(problems)} unusable of {rows} rows; mend them, raise "
            f"--max-seq-len, or allow them with --skip-bad-rows {len(problems)}\n  "
            + listed(problems)
        )
    if not len(examples):
        raise InputError(
            f"{source}: all {rows - len(problems)} rows that can be used are longer than "
            f"{max_seq_len} tokens; raise --max-seq-len, or keep their beginnings: --long-rows cut"
        )


def _parts(ids: list[int], marks: bytes, size: int) -> Iterator[tuple[list[int], bytes]]:
    """A long row in parts; those in which nothing is learned are left out.

    ids 1 2 3 4 5, at most 3  ->  1 2 3, then 3 4 5, of which 3 is not learned again
    """
    for start in range(0, len(ids) - 1, size - 1):
        part = b"\0" + marks[start + 1 : start + size]
        if 1 in part:
            yield ids[start : start + size], part


def answered(messages: Sequence[Message]) -> Sequence[Message]:
    """A row's messages without the turns after its last answer.

    Raises:
        InputError: if there is no answer, or an empty one that would be learned as an end at once.
    """
    answers = [i for i, message in enumerate(messages) if message.role in ("assistant", "text")]
    if not answers:
        raise InputError("no answer; expected output, completion or an assistant message")
    for i in answers:
        said = messages[i].content.strip() or messages[i].calls
        if messages[i].learn is not False and not said:
            before = f"message {i}: " if i < answers[-1] else ""
            raise InputError(f"{before}the answer is empty")
    return messages[: answers[-1] + 1]


def _notes(messages: Sequence[Message], dropped: bool) -> Iterator[str]:
    """What a person should know of rows that are learned all the same; reads after "3 rows"."""
    if dropped:
        yield "end with a turn that nothing answers, which is dropped"
    if any(_spells_special(m.content) or _spells_special(m.context) for m in messages):
        yield "spell out special tokens such as </s>, which are read as plain text"
    questions = [message for message in messages if message.role == "user"]
    if any(not message.content.strip() and not message.context.strip() for message in questions):
        yield "have an empty question"
    if any(message.learn is False for message in messages):
        yield "have messages that are marked as not to be learned"


def _spells_special(text: str) -> bool:
    return ("<" in text or "[" in text) and SPECIAL.search(text) is not None
