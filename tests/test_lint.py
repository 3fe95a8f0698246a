"""The view and the counts of `python -m train.data`."""

import ast
import inspect
import json
import re

import numpy as np
import pytest
from random_models import BASE, model_folder
from train_runs import as_flags

import jllama
from jllama.cli.terminal import console
from train.config import TrainConfig
from train.data.lint.command import LintConfig, main
from train.data.lint.findings import histogram
from train.data.lint.show import duration, histogram_lines
from train.data.load import load_examples
from train.plan import planner
from train.plan.command import main as plan
from train.prepare import plan_batches


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


def found(arguments, capsys):
    """The JSON object, of which standard output holds nothing else; and the exit code."""
    try:
        main([*arguments, "--json"])
        code = 0
    except SystemExit as ended:
        code = ended.code
    return json.loads(capsys.readouterr().out), code


MIXED = [
    {"instruction": "a", "input": "", "output": "b", "id": 1},
    {"prompt": "c", "completion": "d<|eot_id|>"},
    {"messages": [{"role": r, "content": t} for r, t in
                  (("user", "e"), ("assistant", "f"), ("user", "g"), ("assistant", "h</s>"))]},
    {"text": "all of it"},
    {"prompt": "i", "completion": "j " * 40},
    {"prompt": "c", "completion": ""},
    {"prompt": "a", "completion": "b"},
    {"prompt": "a", "completion": "b"},
]  # fmt: skip


def test_all_that_is_found_is_one_json_object(tmp_path, capsys):
    file = rows_file(tmp_path, MIXED)
    said, code = found([file, "--max-seq-len", "24", "--epochs", "2"], capsys)
    assert code == 1
    assert said["errors"] == ["1 rows with nothing to learn"]
    assert (said["rows"], said["examples"], said["unusable"]["rows"]) == (8, 7, 1)
    assert said["unusable"]["first"] == ["row 5: the answer is empty"]
    assert said["kinds"] == {
        "prompt/completion": 5, "instruction/output": 1, "messages": 1, "text": 1,
    }  # fmt: skip
    assert said["ignored_columns"] == {"id": 1}
    assert said["answers"] == {"1": 7, "2": 1}
    tokenizer = jllama.load_tokenizer(jllama.SAMPLE)
    specials = said["special_tokens"]
    assert {name: (of["rows"], of["known"]) for name, of in specials.items()} == {
        "<|eot_id|>": (1, False), "</s>": (1, True),
    }  # fmt: skip
    read = [tokenizer.piece(token) for token in tokenizer.encode("</s>")]
    assert specials["</s>"]["read_as"] == read
    assert len(read) > 1
    assert said["duplicates"] == {"rows": 1, "copies": 2}
    whole = 2 + len(tokenizer.encode("i\n")) + len(tokenizer.encode("j " * 40))
    assert said["truncated"] == {"rows": 1, "tokens": whole - 24, "longest": whole}
    assert said["tokens"]["row"]["most"] == 24
    assert (
        said["tokens"]["learned"]["all"] + said["tokens"]["not_learned"]["all"]
        == (said["tokens"]["row"]["all"])
    )
    assert sum(count for _, _, count in said["histogram"]) == 7
    assert said["cost"]["steps"] == 2  # 7 rows are one step of 16 sequences
    assert said["cost"]["positions"] == 2 * 16 * 24
    assert said["cost"]["tokens_an_epoch"] == said["tokens"]["row"]["all"]
    assert said["settings"]["max_seq_len"] == 24


@pytest.mark.parametrize(
    "how", [{}, {"packing": True}, {"length_buckets": 3}, {"max_steps": 2}], ids=str
)
def test_steps_and_positions_are_those_of_training(how, tmp_path, capsys):
    how = how | {"max_seq_len": 128}
    file = rows_file(tmp_path, [{"prompt": "a " * n, "completion": "b"} for n in range(1, 120)])
    said, _ = found([file, *as_flags(how)], capsys)
    config = TrainConfig(data=file, model=str(jllama.SAMPLE), **how)
    training, held_out = load_examples(config, jllama.load_tokenizer(jllama.SAMPLE))
    batches, _ = plan_batches(config, training, held_out)
    steps = min(config.max_steps or len(batches), len(batches))
    assert said["cost"]["steps"] == steps
    positions = [batches.window(step).tokens.size for step in range(len(batches))]
    assert said["cost"]["positions"] == round(sum(positions) * steps / len(batches))


def test_weights_and_files_are_those_of_training(tmp_path, capsys):
    for name, words in (("a", "1 2 3 4"), ("b", "5 6")):
        rows = [{"prompt": word, "completion": word} for word in words.split()]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    both, _ = found([str(tmp_path / "a.json"), f"{tmp_path / 'b.json'}:0.5"], capsys)
    one, _ = found([str(tmp_path / "a.json")], capsys)
    assert (both["rows"], one["rows"]) == (6, 4)
    share = both["cost"]["tokens_an_epoch"] / one["cost"]["tokens_an_epoch"]
    assert share == 5 / 4


def test_leaks_into_a_file_of_held_out_rows(tmp_path, capsys):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(6)]
    file = rows_file(tmp_path, rows)
    held = [
        rows[3],
        {"prompt": "q4", "completion": "another"},
        {"prompt": "new", "completion": "b"},
    ]
    (tmp_path / "held.json").write_text(json.dumps(held))
    said, code = found([file, "--val-data", str(tmp_path / "held.json")], capsys)
    assert code == 1
    assert said["errors"] == ["1 held-out rows are also trained on: [0]"]
    asked = said["warnings"]["are held out, and asked in training with another answer"]
    assert asked == {"rows": 1, "first": [1]}
    (tmp_path / "held.json").write_text(json.dumps(held[2:]))
    said, code = found([file, "--val-data", str(tmp_path / "held.json")], capsys)
    assert (code, said["errors"], said["held_out"]) == (0, [], 1)


@pytest.mark.parametrize("long_rows", ["cut", "split"])
def test_lengths_are_those_of_whole_rows(long_rows, tmp_path, capsys):
    rows = [{"prompt": "a", "completion": "b " * n} for n in (2, 30, 60)]
    file = rows_file(tmp_path, rows)
    whole, _ = found([file, "--max-seq-len", "999"], capsys)
    cut, _ = found([file, "--max-seq-len", "20", "--long-rows", long_rows], capsys)
    assert cut["histogram"] == whole["histogram"]
    assert cut["truncated"]["rows"] == (2 if long_rows == "cut" else 0)


def test_a_histogram_holds_each_row_once_in_80_columns(monkeypatch):
    lengths = np.random.default_rng(0).integers(3, 3000, 500)
    bars = histogram(lengths)
    assert len(bars) <= 16
    assert bars[0][0] <= lengths.min() <= bars[0][1]
    assert bars[-1][0] <= lengths.max() <= bars[-1][1]
    for first, last, count in bars:
        assert count == np.count_nonzero((lengths >= first) & (lengths <= last))
    assert max(map(len, histogram_lines(bars))) <= 80
    assert histogram(np.array([5])) == [(5, 5, 1)]
    monkeypatch.setattr(type(console), "encoding", "ascii")
    lines = histogram_lines([(1, 16, 512), (17, 32, 1)], width=30)
    assert lines == [" 1-16 #################### 512", "17-32 # 1"]


def test_a_picture_and_the_next_command(tmp_path, capsys):
    file = rows_file(tmp_path, MIXED[:5])
    for name, begin in (("a.svg", b"<?xml"), ("b.PNG", b"\x89PNG")):
        main([file, "--picture", str(tmp_path / name), "--learn", "last", "--packing",
              "--max-seq-len", "40"])  # fmt: skip
        assert (tmp_path / name).read_bytes().startswith(begin)
        said = capsys.readouterr().out
        assert f"--data {file} --max-seq-len 40 --learn last --packing\n" in said
        assert re.search(r"learned: \d+ % of the tokens; --learn last: the last answer", said)
        assert re.search(r"^row 0: \d+ tokens, \d+ \(\d+ %\) learned", said, re.MULTILINE)
        assert "answers: 1 in 4 rows, 2 in 1 rows" in said
    for wrong in ("a.jpg", "nowhere/a.svg"):
        with pytest.raises(SystemExit) as ended:
            main([file, "--picture", wrong])
        assert ended.value.code == 2


def test_the_time_on_a_card_is_that_of_its_plan(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planner, "can_compile", lambda: False)
    file = rows_file(tmp_path, MIXED[:5])
    model = str(model_folder(tmp_path, BASE))
    said, _ = found([file, "--model", model, "--gpu", "rtx-4090"], capsys)
    card = said["cost"]["card"]
    assert not card["compiled"]
    assert card["seconds"] * card["tokens_per_second"] == pytest.approx(said["cost"]["positions"])
    assert card["free_mib"] > 20_000
    main([file, "--model", model, "--gpu", "rtx-4090"])
    assert "at least, by the card's data sheet" in capsys.readouterr().out
    assert [duration(s) for s in (40, 99.6, 700)] == ["40 s", "100 s", "12 min"]
    assert duration(11_520) == "3 h 12 min"


@pytest.mark.slow
@pytest.mark.integration
def test_the_predicted_time_is_what_plan_says(tmp_path, capsys):
    pytest.importorskip("jax_cuda13_plugin")
    file, model = rows_file(tmp_path, MIXED[:5]), str(model_folder(tmp_path, BASE))
    said, _ = found([file, "--model", model, "--gpu", "rtx-4090", "--max-seq-len", "64"], capsys)
    length = str(said["cost"]["positions"] // (3 * 16))
    plan(["--model", model, "--gpu", "rtx-4090", "--max-seq-len", length, "--json"])
    planned = json.loads(capsys.readouterr().out)
    card = said["cost"]["card"]
    assert card["compiled"]
    assert card["tokens_per_second"] == planned["predicted_tokens_per_second"]
    assert card["peak_mib"] == planned["peak_mib"]


def documented(settings):
    """{field: its words} of a class of settings."""
    (tree,) = ast.parse(inspect.getsource(settings)).body
    pairs = zip(tree.body, tree.body[1:], strict=False)
    return {
        a.target.id: " ".join(b.value.value.split())
        for a, b in pairs
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
    }


def test_flags_are_trainings_by_name_default_and_words():
    ours, theirs = documented(LintConfig), documented(TrainConfig)
    shared = ours.keys() & theirs.keys() - {"model", "base", "remat", "micro_batch_size"}
    assert len(shared) > 18
    assert ours.pop("data").removesuffix(" By default the bundled sample's.") == theirs.pop("data")
    assert {n: ours[n] for n in shared - {"data"}} == {n: theirs[n] for n in shared - {"data"}}
    for name in shared - {"data"}:
        assert getattr(LintConfig, name) == getattr(TrainConfig, name)
