import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_files import TOKENIZER

from jllama.errors import InputError
from jllama.text.prompt import Message, prompt_ids, render
from jllama.text.rows import Example, make_examples, read_rows
from jllama.text.tokenizer import load_tokenizer
from train.data.batches import Batches, hold_out, pack, shuffled


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(TOKENIZER)
    return load_tokenizer(file)


def examples_of(rows, tokenizer, style="plain", **more):
    settings = {"max_seq_len": 512, "train_on_prompt": False, "skip_bad_rows": 0} | more
    return make_examples(rows, tokenizer, style, source="rows.json", **settings)


ROW = {"instruction": "Add.", "input": "2 3", "output": "5"}


@pytest.mark.parametrize(
    ("style", "prompt"),
    [
        ("report", "Add.2 3"),
        ("plain", "Add.\n2 3\n"),
        ("alpaca", "### Instruction:\nAdd.\n\n### Input:\n2 3\n\n### Response:\n"),
        ("llama3-chat", "Add.\n2 3"),
    ],
)
def test_a_row_has_one_bos_ends_in_a_stop_token_and_learns_only_the_answer(
    style, prompt, tokenizer
):  # lessons 8, 9, 10
    (example,) = examples_of([ROW], tokenizer, style).rows
    assert example.ids.count(tokenizer.bos_id) == 1
    assert example.ids[0] == tokenizer.bos_id
    assert example.ids[-1] in tokenizer.stop_ids
    assert example.learned[-1]
    learned = [token for token, learn in zip(example.ids, example.learned, strict=True) if learn]
    assert learned[:-1] == tokenizer.encode("5")
    assert prompt in tokenizer.decode(example.ids)
    assert example.ids[: -len(learned)] == prompt_ids(style, ROW, tokenizer)


def test_a_long_row_loses_its_end_and_keeps_its_mask(tokenizer):  # lesson 10
    rows = [{"prompt": "abc", "completion": "x" * 100}]
    found = examples_of(rows, tokenizer, "report", max_seq_len=20)
    (example,) = found.rows
    assert found.truncated == 1
    assert example.ids == [tokenizer.bos_id, *tokenizer.encode("abc" + "x" * 16)]
    assert example.learned == [False] * 4 + [True] * 16


def test_llama2_chat_wraps_each_turn():
    turns = [
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Bye"),
    ]
    texts = [piece.text for piece in render("llama2-chat", turns)]
    assert texts == [
        "<s>", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]", "Hello", "</s>",
        "<s>", "[INST] Bye [/INST]",
    ]  # fmt: skip


def test_all_three_kinds_of_rows_give_the_same_example(tokenizer):
    rows = [
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
            ]
        },
    ]
    first, second, third = examples_of(rows, tokenizer).rows
    assert first.ids == second.ids == third.ids
    assert first.learned == second.learned == third.learned


def test_json_and_jsonl_read_alike(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([ROW, ROW]))
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n")
    assert read_rows(tmp_path / "a.json") == read_rows(tmp_path / "a.jsonl") == [ROW, ROW]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"[{]", "line 1: invalid JSON"),
        (b'{"prompt": "a"}\n{"prompt"\n{bad\n', r"line 2: .*\n  line 3"),
        (b"[1, 2]", "row 0: int"),
        (b"[]", "no rows"),
        (b'[{"prompt": "\xff"}]', "byte 13 is not UTF-8"),
    ],
)
def test_a_broken_file_is_named_with_its_line(content, message, tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_rows(file)
    assert str(file) in str(error.value)


def test_all_bad_rows_are_listed_together_and_tolerated_by_number(tokenizer):  # lesson 10
    rows = [
        ROW,
        {"instruction": "a", "output": ""},
        {"prompt": "x" * 600, "completion": "y"},
        {"text": "?"},
        {"prompt": "no answer"},
    ]
    with pytest.raises(InputError) as error:
        examples_of(rows, tokenizer)
    for part in ("4 unusable of 5", "row 1: the answer is empty", "row 2: its prompt fills all",
                 "row 3: keys ['text']", "row 4: no answer", "--skip-bad-rows 4"):  # fmt: skip
        assert part in str(error.value)
    kept = examples_of(rows, tokenizer, skip_bad_rows=4)
    assert [example.row for example in kept.rows] == [0]
    assert len(kept.skipped) == 4


def made(lengths):
    return [Example(i, list(range(n + 1)), [False] + [True] * n) for i, n in enumerate(lengths)]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    k=st.integers(1, 4),
    batch=st.integers(1, 4),
    plan=st.sampled_from([{"packing": True}] + [{"length_buckets": n} for n in (1, 2, 5)]),
    seed=st.integers(0, 5),
)
def test_every_row_is_trained_on_exactly_once_an_epoch(lengths, k, batch, plan, seed):
    batches = Batches(
        made(lengths), accumulation=k, batch=batch, max_seq_len=40, shuffle=True, seed=seed,
        epochs=2, **{"packing": False} | plan,
    )  # fmt: skip
    border = batches.epoch_ends[0]
    first = [row for step in range(border) for row in batches.rows(step)]
    second = [row for step in range(border, len(batches.windows)) for row in batches.rows(step)]
    assert sorted(first) == sorted(second) == list(range(len(lengths)))
    supervised = sum(int(batches.window(step).mask.sum()) for step in range(border))
    assert supervised == sum(lengths)


def test_packed_rows_have_their_own_segments_and_positions():
    batches = Batches(
        made([3, 4]), accumulation=1, batch=1, max_seq_len=10, packing=True, shuffle=False,
        seed=0, epochs=1,
    )  # fmt: skip
    window = batches.window(0)
    assert window.segments[0, 0].tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0, 0]
    assert window.positions[0, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0, 0]
    assert window.targets[0, 0].tolist() == [1, 2, 3, 1, 2, 3, 4, 0, 0, 0]


@pytest.mark.parametrize("packing", [False, True])
def test_padding_is_masked_by_length_and_never_by_id(packing):  # lesson 8
    zeros = Example(0, [1, 7, 0, 0, 0], [False, False, True, True, True])  # its end token is 0, too
    longer = Example(1, [1, *range(2, 9)], [False] * 6 + [True] * 2)
    batches = Batches(
        [zeros, longer], accumulation=1, batch=2, max_seq_len=16, packing=packing, shuffle=False,
        seed=0, epochs=1,
    )  # fmt: skip
    window = batches.window(0)
    assert window.targets[0, 0, :4].tolist() == [7, 0, 0, 0]
    assert window.mask[0, 0, :4].tolist() == [False, True, True, True]
    assert window.mask.sum() == 5


def test_length_buckets_pad_less_and_give_one_shape_each():
    lengths = [5, 9, 20, 40, 90, 100] * 10
    shapes, shares = {}, {}
    for buckets in (1, 2, 3):
        batches = Batches(
            made(lengths), accumulation=2, batch=2, max_seq_len=512, packing=False,
            length_buckets=buckets, shuffle=True, seed=0, epochs=1,
        )  # fmt: skip
        windows = [batches.window(step) for step in range(len(batches.windows))]
        shapes[buckets] = {window.tokens.shape for window in windows}
        places = sum(window.tokens.size for window in windows)
        assert batches.padding_share() == pytest.approx(1 - sum(lengths) / places)
        shares[buckets] = batches.padding_share()
    assert shapes[1] == {(2, 2, 128)}
    assert shapes[2] == {(2, 2, 32), (2, 2, 128)}
    assert shapes[3] == {(2, 2, 32), (2, 2, 64), (2, 2, 128)}
    assert shares[3] < shares[2] < shares[1]


def test_packing_fills_the_fullest_sequence_that_has_room():
    assert pack([0, 1, 2, 3], [3, 5, 2, 4], 8) == [[0, 1], [2, 3]]


def test_order_depends_only_on_seed_and_epoch():
    assert shuffled(50, 1, 2) == shuffled(50, 1, 2)
    assert shuffled(50, 1, 2) != shuffled(50, 1, 3)
    assert shuffled(50, 1, 2) != shuffled(50, 2, 2)
    assert sorted(shuffled(50, 1, 2)) == list(range(50))


def test_windows_from_a_step_are_those_of_the_whole_run():
    batches = Batches(
        made([3, 4, 5, 6, 7]), accumulation=1, batch=2, max_seq_len=10, packing=False,
        shuffle=True, seed=3, epochs=2,
    )  # fmt: skip
    whole, late = list(batches.from_step(0)), list(batches.from_step(4))
    assert len(whole) == 6
    for expected, found in zip(whole[4:], late, strict=True):
        np.testing.assert_array_equal(expected.tokens, found.tokens)


def test_held_out_rows_are_not_trained_on():
    training, held_out = hold_out(made([1] * 20), 0.25, seed=0)
    assert len(held_out) == 5
    assert not {e.row for e in training} & {e.row for e in held_out}
    with pytest.raises(InputError, match="holds out all 20 rows"):
        hold_out(made([1] * 20), 20, seed=0)
