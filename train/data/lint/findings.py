"""What rows hold, and what of it a run would trip over: counts, and numbers of rows."""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from jllama.errors import InputError
from jllama.text.messages import ignored, kind, row_messages
from jllama.text.prompt import conversation
from jllama.text.rows import SPECIAL, Examples, answered
from jllama.text.tokenizer import Tokenizer
from train.config import TrainConfig

FIRST = 10  # numbers of rows that are told
BARS = 16  # of a histogram, at most


@dataclass
class Rows:
    """What stands in the rows themselves; those that cannot be read are left out.

    Args:
        kinds: {"instruction/output": 600, "messages": 61}
        ignored: columns that nothing is made of, and of how many rows.
        answers: {1: 600, 3: 61}: how many rows have how many; a text counts as one.
        specials: {"</s>": 3}: what spells out a special token of some tokenizer, in how many rows.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    specials: Counter[str] = field(default_factory=Counter)


def look_at(rows: Sequence[Mapping], tokenizer: Tokenizer) -> Rows:
    """One pass over the rows, parsed one at a time."""
    found = Rows()
    special = re.compile("|".join([*map(re.escape, sorted(tokenizer.specials)), SPECIAL.pattern]))
    for row in rows:
        with contextlib.suppress(InputError):  # which tokenising them names
            found.kinds[kind(row)] += 1
            found.ignored.update(ignored(row))
            messages = row_messages(row)
            found.answers[sum(m.role in ("assistant", "text") for m in messages)] += 1
            texts = (text for m in messages for text in (m.content, m.context))
            found.specials.update({name for text in texts for name in special.findall(text)})
    return found


def whole_lengths(
    rows: Sequence[Mapping], examples: Examples, tokenizer: Tokenizer, config: TrainConfig
) -> Int[np.ndarray, " rows"]:
    """Tokens of each row that is used, before `--max-seq-len` cuts it."""
    numbers, first = np.unique(examples.rows, return_index=True)
    lengths = examples.lengths[first]
    cut = np.isin(numbers, examples.rows[examples.cut])
    if config.long_rows == "split":
        cut |= np.isin(numbers, examples.rows[examples.lengths == config.max_seq_len])
    for place in np.flatnonzero(cut):
        messages = answered(row_messages(rows[int(numbers[place])]))
        ids, _ = conversation(config.prompt_style, messages, tokenizer)
        lengths[place] = len(ids)
    return lengths


def histogram(lengths: Int[np.ndarray, " rows"]) -> list[tuple[int, int, int]]:
    """(from, to, rows): bars of equal width, a power of two, from the shortest row to the longest.

    lengths 7 9 12 20  ->  (7, 8, 1), (9, 10, 1), (11, 12, 1), (13, 14, 0), ..., (19, 20, 1)
    """
    longest = int(lengths.max())
    width = 1 << max(0, -(-longest // BARS) - 1).bit_length()
    counts = np.bincount((lengths - 1) // width, minlength=-(-longest // width))
    bars = [(i * width + 1, (i + 1) * width, int(count)) for i, count in enumerate(counts)]
    return bars[int(np.flatnonzero(counts)[0]) :]


def token_figures(examples: Examples) -> dict[str, dict[str, float]]:
    """{"row": {"least": 9, "median": 20.0, "mean": 21.5, "most": 60, "all": 14200}, ...}"""
    totals, answers = examples.lengths, examples.learned_counts
    return {
        name: {
            "least": int(counts.min()),
            "median": float(np.median(counts)),
            "mean": float(counts.mean()),
            "most": int(counts.max()),
            "all": int(counts.sum()),
        }
        for name, counts in (
            ("not_learned", totals - answers), ("learned", answers), ("row", totals),
        )
    }  # fmt: skip


def copies(examples: Examples) -> dict[str, int]:
    """How many different rows occur more than once, and how many copies that makes beside them."""
    _, counts = np.unique(_hashes(examples), return_counts=True)
    return {"rows": int(np.count_nonzero(counts > 1)), "copies": int((counts - 1).sum())}


def leaks(training: Examples, held_out: Examples) -> tuple[list[int], list[int]]:
    """Held-out rows that are also trained on, and those whose prompt is, with another answer."""
    if not len(held_out):
        return [], []
    same = np.isin(_hashes(held_out), _hashes(training))
    asked = np.isin(_hashes(held_out, prompts=True), _hashes(training, prompts=True))
    asked &= ~same & (_prompt_lengths(held_out) > 1)
    return held_out.rows[same].tolist(), held_out.rows[asked].tolist()


def _hashes(examples: Examples, prompts: bool = False) -> UInt64[np.ndarray, " examples"]:
    """8 bytes of the ids of each example, or of those before its first learned one."""
    lengths = _prompt_lengths(examples) if prompts else examples.lengths
    parts = (example.ids[:n] for example, n in zip(examples, lengths, strict=True))
    hashes = (hashlib.blake2b(part.tobytes(), digest_size=8).digest() for part in parts)
    return np.frombuffer(b"".join(hashes), np.uint64)


def _prompt_lengths(examples: Examples) -> Int[np.ndarray, " examples"]:
    return np.fromiter((int(np.argmax(x.learned)) for x in examples), np.int64, len(examples))


def borders(examples: Examples, tokenizer: Tokenizer) -> tuple[dict[str, Any], list[str]]:
    """Tokens that begin and end rows, and what is wrong: no BOS, or two."""
    begins, doubled, bos, ends = [], [], 0, 0
    for example in examples:
        is_bos = example.ids == tokenizer.bos_id
        bos += int(np.count_nonzero(is_bos))
        last = example.ids[np.flatnonzero(example.learned)[-1]]  # a template may write on behind it
        ends += int(last) in tokenizer.stop_ids
        if not is_bos[0]:
            begins.append(example.row)
        if np.any(is_bos[:-1] & is_bos[1:]):
            doubled.append(example.row)
    errors = [f"{len(begins)} rows without BOS: {begins[:FIRST]}"] if begins else []
    errors += [f"{len(doubled)} rows with BOS twice: {doubled[:FIRST]}"] if doubled else []
    return {"begins": bos, "ends": ends}, errors
