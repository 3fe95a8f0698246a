"""The view and the counts of `python -m train.data`."""

import json

import pytest
from random_models import BASE, model_folder

import jllama
from train.config import TrainConfig
from train.data.lint import main
from train.data.load import load_examples


def rows_file(tmp_path, rows):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    return str(file)


def test_the_sample_is_clean_and_its_first_row_is_shown(capsys):
    main([])
    said = capsys.readouterr().out
    first = json.loads((jllama.SAMPLE / "train.json").read_text())[0]
    assert f"⟦ {first['output']}</s>⟧" in said
    assert "BOS: 661 in 661 rows; 661 rows end in a stop token" in said
    assert "661 rows, no errors" in said


def test_control_characters_of_rows_and_names_are_shown_as_pictures(tmp_path, capsys):
    row = {"prompt": "a\x1b[31mRED\x1b]0;owned\x07", "completion": "\x1b[2Jb\x9b31m"}
    file = tmp_path / "rows\x1b.jsonl"
    file.write_text(json.dumps(row) + "\n")
    main([str(file), "--model", str(model_folder(tmp_path, BASE | {"n_layers": 1}))])
    said = capsys.readouterr().out
    assert "a␛[31mRED␛]0;owned␇" in said
    assert "␛[2Jb" in said
    assert not set(said) & {"\x1b", "\x07", "\x9b"}
    assert r"rows\x1b.jsonl'" in said  # in the next command, as a shell takes it


def test_rows_that_teach_nothing_end_in_code_1(tmp_path, capsys):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}]
    with pytest.raises(SystemExit) as ended:
        main([rows_file(tmp_path, rows)])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "row 1: the answer is empty" in said
    assert "error: 1 rows with nothing to learn" in said


def test_held_out_copies_of_training_rows_are_a_leak(tmp_path, capsys):
    rows = [{"prompt": "same", "completion": "b"}] * 6
    with pytest.raises(SystemExit):
        main([rows_file(tmp_path, rows), "--val-size", "2"])
    said = capsys.readouterr().out
    assert "2 held-out rows are also trained on" in said
    assert "duplicates: 1 rows occur more than once" in said


def test_a_second_bos_in_the_text_is_an_error(tmp_path, capsys, monkeypatch):
    from jllama.text.tokenizer import SentencePieceTokenizer

    encode = SentencePieceTokenizer.encode
    monkeypatch.setattr(
        SentencePieceTokenizer, "encode", lambda self, text: [1, *encode(self, text)]
    )
    with pytest.raises(SystemExit):
        main([rows_file(tmp_path, [{"prompt": "a", "completion": "b"}])])
    assert "1 rows with BOS twice: [0]" in capsys.readouterr().out  # lesson 9


def test_what_rows_do_not_say_or_show_is_told_and_no_control_character_is_raw(tmp_path, capsys):
    rows = [
        {"prompt": "a\x1b[31mRED", "completion": "\x1b[2Jb\x9b31m", "id\x1b": 1},
        {"prompt": "c", "completion": "d</s>", "id\x1b": 2},
        {"prompt": "e", "history": [["f", "g"]], "completion": "h", "input": None},
        {"messages": [{"role": "user", "content": "i"}, {"role": "assistant", "content": "j"},
                      {"role": "user", "content": "k"}]},
    ]  # fmt: skip
    main([rows_file(tmp_path, rows)])
    said = capsys.readouterr().out
    for line in (
        "ignored: column 'id␛' of 2 rows",
        "warning: 1 rows spell out special tokens such as </s>, which are read as plain text: [1]",
        "warning: 1 rows end with a turn that nothing answers, which is dropped: [3]",
        "4 rows, no errors",
    ):
        assert line in said
    assert "\x1b" not in said
    assert "\x9b" not in said


def test_an_empty_answer_before_the_last_is_an_error_with_its_row(tmp_path, capsys):
    turns = [{"role": r, "content": t} for r, t in (("user", "a"), ("assistant", ""))]
    turns += [{"role": r, "content": t} for r, t in (("user", "b"), ("assistant", "c"))]
    rows = [{"prompt": "a", "completion": "b"}, {"messages": turns}]
    with pytest.raises(SystemExit) as ended:
        main([rows_file(tmp_path, rows)])
    assert ended.value.code == 1
    assert "row 1: message 1: the answer is empty" in capsys.readouterr().out


def test_training_prints_one_line_of_what_the_lint_lists(tmp_path, capsys):
    turns = [{"role": r, "content": t} for r, t in (("user", "a"), ("assistant", "b</s>"))]
    rows = [{"messages": [*turns, {"role": "user", "content": "c"}]}] * 2
    data = rows_file(tmp_path, rows)
    config = TrainConfig(data=data, model=str(jllama.SAMPLE))
    load_examples(config, jllama.load_tokenizer(jllama.SAMPLE))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("2 rows end with a turn that nothing answers, which is dropped; 2 rows ")
    *_, words, _, _ = line.rpartition(f"jllama lint {data} --model {jllama.SAMPLE}")
    assert words
