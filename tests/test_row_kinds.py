"""From a small file of each kind to ids and what is learned, written by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from row_examples import examples_of

from jllama.errors import InputError
from jllama.text.messages import row_messages
from jllama.text.row_file import read_rows
from jllama.text.template import ChatTemplate
from train.data.batches import hold_out


class Letters:
    """A token a character; 1 begins and 2 ends a text."""

    bos_id, eos_id, stop_ids, vocab_size = 1, 2, (2,), 256
    specials, template = frozenset({"<", ">"}), None

    def encode(self, text):
        return list(text.encode())

    marked = encode

    def decode(self, ids):
        return bytes(ids).decode()

    def piece(self, token):
        return {1: "<", 2: ">"}.get(int(token)) or chr(token)

    def special(self, name):
        raise InputError(f"no {name}")


def seen(example):
    """`<q\\n` is read, and `[a>]` is learned."""
    text, inside = "", False
    for token, learned in zip(example.ids, example.learned.tolist(), strict=True):
        text += "[" * (learned and not inside) + "]" * (inside and not learned)
        text += Letters().piece(token)
        inside = learned
    return text + "]" * bool(inside)


TALK = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
TURNS = [{"role": role, "content": text} for role, text in TALK]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TALK
]
WEIGHTS = [
    turn | ({"weight": weight} if weight is not None else {})
    for turn, weight in zip(TURNS, (None, 0, None, 1), strict=True)
]
ONE_WEIGHT = [TURNS[0], TURNS[1] | {"train": True}, *TURNS[2:]]
ALL, LAST, FIRST = "<a\n[b>]<c\n[d>]", "<a\nb><c\n[d>]", "<a\n[b>]<c\nd>"
KINDS = {
    "alpaca": ({"instruction": "a", "input": "i", "output": "b"}, "<a\ni\n[b>]"),
    "alpaca, more": (
        {"system": "s", "history": [["a", "b"]], "instruction": "c", "input": "", "output": "d"},
        "<s\na\n[b>]<c\n[d>]",
    ),
    "completion": ({"prompt": "a", "completion": "b"}, "<a\n[b>]"),
    "question": ({"question": "a", "answer": "b"}, "<a\n[b>]"),
    "input, output": ({"input": "a", "output": "b"}, "<a\n[b>]"),
    "response": ({"instruction": "a", "response": "b"}, "<a\n[b>]"),
    "messages": ({"messages": TURNS}, ALL),
    "sharegpt": ({"conversations": SHAREGPT}, ALL),
    "weights": ({"messages": WEIGHTS}, LAST),
    "text": ({"text": "ab"}, "<[ab>]"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_each_kind(kind, tmp_path):
    row, expected = KINDS[kind]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    examples, _ = examples_of(read_rows(tmp_path / "rows.jsonl"), Letters())
    assert [seen(example) for example in examples] == [expected]


# Functions as `(f)`, their calls as `!f2`, their answers as `=3`.
CALLING = """\
{% if tools %}({{ tools | map(attribute='function.name') | join }}){% endif %}\
{% for m in messages %}\
{% if m.role == 'tool' %}={{ m.content + '\n' }}\
{% elif m.tool_calls %}{% set call = m.tool_calls[0].function %}\
!{{ call.name }}{{ call.arguments.x }}>\
{% elif m.role == 'assistant' %}{{ m.content }}>\
{% else %}<{{ m.content + '\n' }}{% endif %}{% endfor %}"""


class Templated(Letters):
    specials, template = Letters.specials, ChatTemplate(CALLING, Path(), {}, Letters.specials)

    def marked(self, text):
        return [{"<": 1, ">": 2}.get(letter) or ord(letter) for letter in text]


CALLED = {
    "openai": {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None,
             "tool_calls": [{"id": "0", "function": {"name": "f", "arguments": '{"x": 2}'}}]},
            {"role": "tool", "tool_call_id": "0", "content": "3"},
            {"role": "assistant", "content": "b"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 2}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "b"},
        ],
        "tools": '[{"name": "f"}]',
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CALLED)
@pytest.mark.parametrize(
    ("learn", "expected"), [("all", "(f)<a\n[!f2>]=3\n[b>]"), ("last", "(f)<a\n!f2>=3\n[b>]")]
)
def test_a_call_is_learned_and_its_answer_is_not(kind, learn, expected, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(CALLED[kind]))
    rows = read_rows(tmp_path / "rows.jsonl")
    examples, _ = examples_of(rows, Templated(), "chat", learn=learn)
    assert [seen(example) for example in examples] == [expected]


def test_style_text_learns_each_token_of_a_text_and_its_end_and_takes_no_other_row():
    examples, skipped = examples_of(
        [{"text": "ab"}, {"prompt": "a", "completion": "b"}], Letters(), "text", skip_bad_rows=1
    )
    assert [seen(example) for example in examples] == ["<[ab>]"]
    assert examples[0].ids.tolist() == [1, 97, 98, 2]
    assert len(skipped) == 1


LEARNED = {
    "all": {"messages": ALL, "weights": LAST, "one weight": ALL, "alpaca": "<a\n[b>]"},
    "last": {"messages": LAST, "weights": LAST, "one weight": LAST, "alpaca": "<a\n[b>]"},
    "weighted": {"messages": None, "weights": LAST, "one weight": FIRST, "alpaca": "<a\n[b>]"},
}
TALKS = {
    "messages": {"messages": TURNS},
    "weights": {"messages": WEIGHTS},
    "one weight": {"messages": ONE_WEIGHT},
    "alpaca": {"prompt": "a", "completion": "b"},
}


@pytest.mark.parametrize("learn", LEARNED)
def test_which_answers_are_learned(learn):
    for name, expected in LEARNED[learn].items():
        if expected is None:
            with pytest.raises(InputError, match="marked as not to be learned"):
                examples_of([TALKS[name]], Letters(), learn=learn)
            continue
        examples, _ = examples_of([TALKS[name]], Letters(), learn=learn)
        assert seen(examples[0]) == expected, name


LONG = [{"prompt": "abc", "completion": "12345"}, {"prompt": "a", "completion": "1"}]


@pytest.mark.parametrize(
    ("long_rows", "expected"),
    [
        ("cut", ["<abc\n[1]", "<a\n[1>]"]),
        ("drop", ["<a\n[1>]"]),
        ("split", ["<abc\n[1]", "1[2345>]", "<a\n[1>]"]),
    ],
)
def test_rows_that_are_longer(long_rows, expected):
    examples, skipped = examples_of(LONG, Letters(), max_seq_len=6, long_rows=long_rows)
    assert [seen(example) for example in examples] == expected
    assert not skipped
    assert examples.cut.sum() == (long_rows == "cut")
    noted = [note for note, rows in examples.notes.items() if list(rows) == [0]]
    assert noted == ["are longer than 6 tokens, and left out"] * (long_rows == "drop")


def test_a_split_row_learns_each_of_its_ids_once_and_parts_without_any_are_left_out():
    row = {"prompt": "a" * 17, "completion": "123456789"}
    for size in range(2, 30):
        examples, _ = examples_of([row], Letters(), max_seq_len=size, long_rows="split")
        learned = np.concatenate([example.ids[example.learned] for example in examples])
        assert bytes(learned.tolist()) == b"123456789\x02"
        assert all(2 <= len(example.ids) <= size and example.learned.any() for example in examples)
        assert {example.row for example in examples} == {0}


def test_the_parts_of_a_row_are_held_out_together():
    rows = [{"text": chr(97 + i) * (3 + i)} for i in range(20)]
    examples, _ = examples_of(rows, Letters(), max_seq_len=5, long_rows="split")
    assert len(examples) > 40
    training, held_out = hold_out(examples, 0.25, 0)
    assert len({*held_out.rows.tolist()}) == 5
    assert not {*held_out.rows.tolist()} & {*training.rows.tolist()}
    assert len(training) + len(held_out) == len(examples)


def test_all_rows_left_out_is_an_error():
    with pytest.raises(InputError, match="all 1 rows that can be used are longer than 6 tokens"):
        examples_of(LONG[:1], Letters(), max_seq_len=6, long_rows="drop")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instrction": "a", "output": "b"}, "If 'instrction' is 'instruction': --columns i"),
        ({"Prompt": "a", "Completion": "b"}, "If 'Prompt' is 'prompt': --columns prompt=Prompt"),
        ({"x": "a", "y": "b"}, "expected instruction/input/output, .*; --columns NAME=COLUMN"),
        ({}, "columns none; expected"),
    ],
)  # fmt: skip
def test_unknown_columns_are_one_message_with_the_nearest_known(row, message):
    with pytest.raises(InputError, match=message) as error:
        row_messages(row)
    assert "\n" not in str(error.value)
