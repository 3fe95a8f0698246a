"""Runs from data as people have it: a table with names of its own, a file for evaluation."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from random_models import BASE
from train_runs import Killed, adapter, after_step, lines, settings, small_place

from eval.score import ScoreConfig, complete
from jllama.errors import InputError
from jllama.folders.run import RunFolder
from jllama.text.row_formats import source_of
from train.config import TrainConfig, read_defaults
from train.data import load
from train.data.batches import rows_of_epoch
from train.data.lint.command import main as lint
from train.trainer import Trainer

pytestmark = pytest.mark.integration
COLUMNS = "prompt=Question,completion=Reply"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run from 40 of a table's rows, with a folder of three rows for evaluation."""
    place = small_place(tmp_path_factory.mktemp("data"), BASE)
    rows = json.loads((place / "rows.json").read_text())
    (place / "val").mkdir()
    write_table(rows[:60], place / "table.csv")
    write_table(rows[60:62], place / "val/a.csv")
    write_table(rows[62:63], place / "val/b.csv")
    Trainer(config=config(place)).train()
    return place


def write_table(rows, file):
    with file.open("w", newline="") as table:
        csv.writer(table).writerows(
            [["Question", "Reply"], *([row["prompt"], row["completion"]] for row in rows)]
        )


def config(place, **more):
    of_run = {"max_steps": 2, "epochs": 2, "eval_steps": 1, "val_size": 0} | more
    return TrainConfig(
        **settings(place, **of_run) | {"data": str(place / "table.csv")},
        columns=COLUMNS, val_data=str(place / "val"), max_rows=40, output_dir=str(place / "run"),
    )  # fmt: skip


def test_the_run_is_that_of_the_same_rows_in_json(place, tmp_path):
    rows = json.loads((place / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(rows[:40]))
    (tmp_path / "val.json").write_text(json.dumps(rows[60:63]))
    same = dataclasses.replace(
        config(place), data=str(tmp_path / "rows.json"), val_data=str(tmp_path / "val.json"),
        columns="", max_rows=0, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    Trainer(config=same).train()
    figures = [
        [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines(run)]
        for run in (place / "run", tmp_path / "run")
    ]
    assert figures[0] == figures[1]
    assert np.isfinite(figures[0][-1][-1] or 0)
    record = RunFolder(place / "run").read_record()
    assert (record["data"]["rows"], record["data"]["held_out_rows"]) == (40, 3)


def test_a_run_is_scored_on_its_file_for_evaluation(place):
    scored = complete(ScoreConfig(run=str(place / "run")))
    assert (scored.data, scored.rows) == ((str((place / "val").absolute()),), "all")
    assert (scored.columns, scored.max_rows) == (COLUMNS, 0)
    learned = complete(ScoreConfig(run=str(place / "run"), rows="training"))
    assert (learned.data, learned.rows) == ((str((place / "table.csv").absolute()),), "all")
    assert (learned.columns, learned.max_rows) == (COLUMNS, 40)
    other = complete(ScoreConfig(run=str(place / "run"), data=str(place / "rows.json")))
    assert (other.columns, other.max_rows) == ("", 0)


def test_another_file_for_evaluation_is_no_resume(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run", ignore=lambda *_: ["adapter"])
    shutil.copytree(place / "val", tmp_path / "val")
    (tmp_path / "val/b.csv").rename(tmp_path / "val/0.csv")  # they come in another order
    words = ["--resume", str(tmp_path / "run"), "--val-data", str(tmp_path / "val")]
    with pytest.raises(InputError, match="val_data_sha256 differ"):
        Trainer(config=read_defaults(words)[0]).train()


def test_one_way_to_hold_rows_out(place):
    with pytest.raises(InputError, match="val_data and val_size, expected one of them"):
        config(place, val_size=4)


def test_the_lint_reads_as_the_run_does(place, capsys):
    words = [str(place / "table.csv"), "--model", str(place / "model"), "--columns", COLUMNS]
    lint([*words, "--max-rows", "40", "--max-seq-len", "25", "--long-rows", "drop"])
    said = capsys.readouterr().out
    assert "40 rows, no errors" in said
    assert "rows are longer than 25 tokens, and left out" in said
    with pytest.raises(SystemExit):
        lint([*words[:-1], "prompt=Question,completion=Answer"])
    assert "no row has the column Answer; found: Question, Reply" in capsys.readouterr().err


WEIGHTS = np.repeat(np.array([1, 0.5, 2.25, 0.01], np.float32), [5, 6, 8, 3])


def test_an_epoch_has_each_row_as_often_as_its_weight_says():
    epochs = [rows_of_epoch(WEIGHTS, 7, epoch) for epoch in range(8)]
    for rows in epochs:
        assert np.array_equal(rows, np.sort(rows))
        counts = np.bincount(rows, minlength=len(WEIGHTS))
        assert counts[:5].tolist() == [1] * 5
        assert (counts[5:11].sum(), counts[11:19].sum(), counts[19:].sum()) == (3, 18, 1)
        assert {*counts[11:19].tolist()} == {2, 3}
    for first, second in zip(epochs[::2], epochs[1::2], strict=True):
        assert (np.bincount(np.concatenate([first, second]))[5:11] == 1).all()
    assert (np.bincount(np.concatenate(epochs[:4]))[11:19] == 9).all()
    assert any(not np.array_equal(epochs[0], rows) for rows in epochs)
    assert np.array_equal(rows_of_epoch(WEIGHTS, 7, 3), epochs[3])
    in_order = rows_of_epoch(WEIGHTS, None, 3)
    assert in_order.tolist() == [*range(5), 5, 6, 7, *sorted([*range(11, 19)] * 2 + [11, 12]), 19]


@pytest.fixture(scope="module")
def mixed(place):
    """Settings of a run over two files, of which an epoch has 40 rows and 10 of 20."""
    rows = json.loads((place / "rows.json").read_text())
    (place / "a.json").write_text(json.dumps(rows[:40]))
    (place / "b.json").write_text(json.dumps(rows[40:60]))
    data = (str(place / "a.json"), str(place / "b.json:0.5"))
    return settings(place, epochs=2, max_steps=0, val_size=0, save_steps=3) | {"data": data}


def whole_run(mixed, place, packing):
    """One that nothing stops; made once."""
    run = place / f"whole-{packing}"
    if not run.exists():
        Trainer(config=TrainConfig(**mixed, packing=packing, output_dir=str(run))).train()
    return run


def rows_of(run):
    return [line["rows"] for line in lines(run) if "rows" in line]


@pytest.mark.parametrize(("packing", "stored"), [(False, False), (True, False), (True, True)])
def test_a_mixed_run_goes_on_bit_by_bit_in_its_second_epoch(
    packing, stored, mixed, place, monkeypatch, tmp_path
):
    """Also one whose rows come from the cache, as those of large files do."""
    whole, cut = whole_run(mixed, place, packing), place / f"cut-{packing}-{stored}"
    if stored:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(load, "LARGE", 0)
    steps = max(line["step"] for line in lines(whole))
    with monkeypatch.context() as patch:
        after_step(patch, steps - 1)
        with pytest.raises(Killed):
            Trainer(config=TrainConfig(**mixed, packing=packing, output_dir=str(cut))).train()
    if stored:
        monkeypatch.setattr(load, "read_sources", None)  # it is not read again
    Trainer(config=read_defaults(["--resume", str(cut)])[0]).train()
    assert adapter(cut) == adapter(whole)
    seen = np.bincount(np.concatenate(rows_of(whole)), minlength=60)
    assert (seen[:40] == 2).all()
    assert (seen[40:] == 1).all()


def test_mixed_files_may_move_but_keep_their_weights(mixed, place, tmp_path, monkeypatch):
    run = place / "moved"
    with monkeypatch.context() as patch:
        after_step(patch, 4)
        with pytest.raises(Killed):
            Trainer(config=TrainConfig(**mixed, output_dir=str(run))).train()
    assert RunFolder(run).read_settings()["data"] == list(mixed["data"])
    for name, new in (("a.json", "a b.json"), ("b.json", "b.json")):
        shutil.copyfile(place / name, tmp_path / new)
    moved = [str(tmp_path / "a b.json"), str(tmp_path / "b.json")]
    with pytest.raises(InputError, match="data_sha256 differ"):
        Trainer(config=read_defaults(["--resume", str(run), "--data", *moved])[0]).train()
    moved[1] += ":0.5"
    Trainer(config=read_defaults(["--data", *moved, "--resume", str(run)])[0]).train()
    assert adapter(run) == adapter(whole_run(mixed, place, False))
    assert RunFolder(run).read_settings()["data"] == moved
    assert complete(ScoreConfig(run=str(run))).data == tuple(moved)


def test_what_is_wrong_with_a_row_is_told_with_its_file(mixed, place, tmp_path, monkeypatch):
    (tmp_path / "c.json").write_text('[{"prompt": "a", "completion": "b"}, {"prompt": "a"}]')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/d.json").write_text('{"prompt": "a", "completion": ""}')
    (tmp_path / "folder/e.json").write_text('{"prompt": 3}')
    sources = [mixed["data"][0], str(tmp_path / "c.json"), str(tmp_path / "folder")]
    with pytest.raises(InputError) as error:
        Trainer(**mixed | {"data": sources}, output_dir=tmp_path / "run").train()
    said = str(error.value)
    assert "c.json: row 1: no answer" in said
    assert "folder/d.json: row 0: the answer is empty" in said
    assert "folder/e.json: row 0: 'prompt' is a number" in said
    monkeypatch.chdir(tmp_path)
    for weight in ("0", "-1", "nan", "inf", "half", ""):
        with pytest.raises(InputError, match="expected a number above 0"):
            source_of(f"c.json:{weight}")
    (tmp_path / "c.json:2").write_text("")
    assert source_of("c.json:2") == (Path("c.json:2"), 1.0)
