import json
import tracemalloc

import numpy as np
import pytest
from row_examples import examples_of

from jllama.errors import InputError
from jllama.text.prompt import Message, prompt_ids, render
from jllama.text.row_file import read_rows
from jllama.text.tokenizer import _parts

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
    (example,), _ = examples_of([ROW], tokenizer, style)
    ids = example.ids.tolist()
    assert ids.count(tokenizer.bos_id) == 1
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] in tokenizer.stop_ids
    assert example.learned[-1]
    learned = example.ids[example.learned].tolist()
    assert learned[:-1] == tokenizer.encode("5")
    assert prompt in tokenizer.decode(ids)
    assert ids[: -len(learned)] == prompt_ids(style, ROW, tokenizer)


def test_a_long_row_loses_its_end_and_keeps_its_mask(tokenizer):  # lesson 10
    rows = [{"prompt": "abc", "completion": "x" * 100}]
    (example,), _ = examples_of(rows, tokenizer, "report", max_seq_len=20)
    assert example.cut
    assert example.ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("abc" + "x" * 16)]
    assert example.learned.tolist() == [False] * 4 + [True] * 16


def test_a_learned_prompt_is_all_but_the_id_that_nothing_precedes(tokenizer):
    (example,), _ = examples_of([ROW], tokenizer, train_on_prompt=True)
    assert example.learned.tolist() == [False] + [True] * (len(example.ids) - 1)


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


def test_all_bad_rows_are_listed_together_and_tolerated_by_number(tokenizer):  # lesson 10
    rows = [
        ROW,
        {"instruction": "a", "output": ""},
        {"prompt": "x" * 600, "completion": "y"},
        {"body": "?"},
        {"prompt": "no answer"},
    ]
    with pytest.raises(InputError) as error:
        examples_of(rows, tokenizer)
    for part in ("4 unusable of 5", "row 1: the answer is empty", "row 2: its prompt fills all",
                 "row 3: columns 'body'", "row 4: no answer", "--skip-bad-rows 4"):  # fmt: skip
        assert part in str(error.value)
    kept, skipped = examples_of(rows, tokenizer, skip_bad_rows=4)
    assert [example.row for example in kept] == [0]
    assert len(skipped) == 4


def test_examples_are_views_of_arrays_of_5_bytes_a_token(tokenizer):
    rows = [{"prompt": "a" * 20, "completion": "b" * (60 + i % 9)} for i in range(200)]
    examples, _ = examples_of(rows, tokenizer)
    tokens = int(examples.lengths.sum())
    assert examples.ids.nbytes + examples.learned.nbytes == 5 * tokens
    arrays = [x for x in vars(examples).values() if isinstance(x, np.ndarray)]
    assert sum(array.nbytes for array in arrays) < 5.5 * tokens
    some = examples.take([7, 3])
    assert [example.row for example in some] == [7, 3]
    for _, ids, learned, _ in (examples[3], some[1]):
        assert np.shares_memory(ids, examples.ids)
        assert np.shares_memory(learned, examples.learned)
        assert tokenizer.decode(ids.tolist()).endswith("b" * (60 + 3))
    assert some.learned_counts.tolist() == [60 + 7 + 1, 60 + 3 + 1]  # with the end token


@pytest.mark.parametrize("separator", ["\n", ","])
def test_reading_and_tokenising_hold_under_8_bytes_a_token_beyond_the_text(
    separator, tokenizer, tmp_path
):
    line = json.dumps({"prompt": "a" * 100, "completion": "☕" + "b" * 300}, ensure_ascii=False)
    text = separator.join([line] * 1000)
    (tmp_path / "rows").write_text(f"[{text}]" if separator == "," else text)
    size = (tmp_path / "rows").stat().st_size
    tracemalloc.start()
    try:
        examples, _ = examples_of(read_rows(tmp_path / "rows"), tokenizer)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (peak - size) / len(examples.ids) < 8


@pytest.mark.parametrize("text", [" " * 10**6 + "a", "b" * 30_000 + "\n" * 60_000, "☕ " * 30_000])
def test_no_text_makes_tiktoken_panic(text, tokenizer):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    (example,), _ = examples_of([{"prompt": text, "completion": "x"}], tokenizer, max_seq_len=2**21)
    assert example.learned.sum() == 2


def test_long_texts_are_split_as_metas_code_does(monkeypatch):
    monkeypatch.setattr("jllama.text.tokenizer.LONGEST_TEXT", 12)
    monkeypatch.setattr("jllama.text.tokenizer.LONGEST_RUN", 3)
    assert list(_parts("ab       cdefghi jk")) == ["ab   ", "   ", " cde", "fgh", "i jk"]
