import json
import tracemalloc

import numpy as np
import pytest
from random_models import TOKENIZER

from jllama.errors import InputError
from jllama.text.prompt import Message, prompt_ids, render
from jllama.text.row_file import Rows, read_rows
from jllama.text.rows import make_examples
from jllama.text.tokenizer import load_tokenizer


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
    first, *others = examples_of(rows, tokenizer)[0]
    for other in others:
        assert first.ids.tolist() == other.ids.tolist()
        assert first.learned.tolist() == other.learned.tolist()


LINES = (json.dumps(ROW), '{"prompt": "[ü☕\\\\\\" ,{", "completion": "é]"}')


@pytest.mark.parametrize(
    "text",
    [
        "[{}, {}]",
        " [\n\t{}\r\n,\n{}] \n",
        "\ufeff[{},{}]",
        "{}\n{}",
        "\n{}\r\n \n  {}\n\n",
        "\ufeff{}\n{}\n",
    ],
)
def test_json_and_jsonl_read_alike_and_hold_text_alone(text, tmp_path):
    file = tmp_path / "rows"
    first, last = LINES
    file.write_bytes(text.replace("{}", first, 1).replace("{}", last).encode())
    rows = read_rows(file)
    assert isinstance(rows, Rows)
    assert list(rows) == [json.loads(line) for line in LINES]
    assert list(rows[1:]) == [rows[1]]


def test_one_object_over_many_lines_is_a_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROW, indent=2))
    assert read_rows(tmp_path / "a.json") == [ROW]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"[{]", "line 1: invalid JSON"),
        (b'{"prompt": "a"}\n{"prompt"\n{bad\n', r"line 2: .*\n  line 3"),
        (b"[1, 2]", "row 0: int"),
        (b"[]", "no rows"),
        (b'[{"prompt": "\xff"}]', "byte 13 is not UTF-8"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', "byte 28 is not UTF-8"),
        (b'[{"prompt": "a"}\n {"prompt": "b"}]', "line 2: invalid JSON"),
        (b'[{"prompt": "a"},\n]', "line 2: invalid JSON"),
        (b'[{"prompt": "a"}\n] 1', "line 2: invalid JSON"),
        (b'{"prompt": "a"}\n7\n"b"', r"row 1: int\n  row 2: str"),
        (b'{"prompt": 1' + b"0" * 5000 + b"}", "not readable as JSON"),
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
