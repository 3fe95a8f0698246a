"""What a file of prompts may say, and that all that is wrong with it is said before any answer."""

import json

import pytest
from random_models import TOKENIZER

from eval.prompt_file import read_prompts, read_references
from jllama.errors import InputError
from jllama.text.tokenizer import load_tokenizer


@pytest.fixture
def read(tmp_path):
    """Reads prompts with a context of 64 tokens."""
    (tmp_path / "tokenizer.model").write_bytes(TOKENIZER)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")

    def call(content, **more):
        file = tmp_path / "prompts.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        settings = {"context": 64, "flags": {}} | more
        return read_prompts(file, tokenizer, "plain", **settings)

    return call


def test_flags_come_before_the_file_and_the_file_before_the_defaults(read):
    content = {"temperature": 0, "seed": 7, "top_k": 3, "about": {}, "max_new_tokens": 9,
               "prompts": [{"prompt": "a"}, {"prompt": "b", "max_new_tokens": 4},
                           {"prompt": "c", "max_total_tokens": 20}]}  # fmt: skip
    found = read(content, flags={"seed": 8, "temperature": None, "model": "x"})
    decoding = found.decoding
    assert (decoding.temperature, decoding.seed, decoding.top_k) == (0, 8, 3)
    assert decoding.top_p == 0.9
    assert found.budgets == [9, 4, 20 - len(found.ids[2])]
    assert read(content, flags={"max_new_tokens": 5}).budgets == [5, 5, 5]
    assert len(read(content, limit=2).rows) == 2


@pytest.mark.parametrize("content", ['{"prompt": "a"}\n{"prompt": "b"}', '[{"prompt": "a"}]'])
def test_prompts_are_rows_as_for_training(content, read):
    assert read(content).rows[0] == {"prompt": "a"}


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ('"temperature": "hot"', "beside its rows: temperature hot, expected a number, at least 0"),
        ('"seed": -1', "beside its rows: seed -1, expected a whole number, at least 0"),
        ('"top_p": 0, "max_new_tokens": 0', "top_p 0, expected .*; max_new_tokens 0, expected"),
        ('"temperature": 1' + "0" * 5000, "temperature inf, expected"),
        ('"seed": [[[]]]', "seed .*, expected a whole number"),
    ],
)
def test_wrong_settings_beside_the_rows_are_named(beside, message, read):
    with pytest.raises(InputError, match=message):
        read(f'{{"prompts": [{{"prompt": "a"}}], {beside}}}')


def test_all_that_is_wrong_with_rows_is_said_together_by_their_numbers(read):
    rows = [
        {"prompt": "a"},
        {"prompt": "x" * 64},
        {"prompt": "b", "max_new_tokens": "x", "max_total_tokens": -1},
        {"prompt": "c", "temperature": 0.5},
        {"text": "d"},
        {"prompt": 5},
        {"prompt": "y" * 62},
    ]
    with pytest.raises(InputError) as error:
        read(rows)
    _, *lines = str(error.value).replace("prompts.json: ", "prompts.json:\n").splitlines()
    for line, part in zip(lines, [
        "row 1: its prompt has 66 tokens, which leaves an answer no room in the model's context of",
        "row 2: max_new_tokens x, expected a whole number, at least 1; max_total_tokens -1, expect",
        "row 3: temperature: one for all rows",
        "row 4: a row of text has no prompt",
        "row 5: 'prompt' is a number, expected text",
        "row 6: its prompt has 64 tokens",
    ], strict=True):  # fmt: skip
        assert part in line


def test_references_are_texts_of_rows_with_a_prompt(tmp_path):
    file = tmp_path / "reference.jsonl"
    file.write_text('{"prompt": "a ", "our_answer": "b", "their_answer": 3}\n{"prompt": "c"}')
    assert read_references(file) == {"a": {"our_answer": "b"}, "c": {}}
    file.write_text('{"prompt": "a"}\n{"prompt": 5}\n{"x": 1}')
    with pytest.raises(InputError, match=r"row 1: no text in 'prompt'\n  row 2: "):
        read_references(file)
