"""Runs from data as people have it: a table with names of its own, a file for evaluation."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from random_models import BASE
from train_runs import lines, settings, small_place

from eval.score import ScoreConfig, complete
from jllama.errors import InputError
from jllama.folders.run import RunFolder
from train.config import TrainConfig, read_defaults
from train.data.lint import main as lint
from train.fine_tune import fine_tune

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
    fine_tune(config(place))
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
    fine_tune(same)
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
    assert (scored.data, scored.rows) == (str((place / "val").absolute()), "all")
    assert (scored.columns, scored.max_rows) == (COLUMNS, 0)
    learned = complete(ScoreConfig(run=str(place / "run"), rows="training"))
    assert (learned.data, learned.rows) == (str((place / "table.csv").absolute()), "all")
    assert (learned.columns, learned.max_rows) == (COLUMNS, 40)
    other = complete(ScoreConfig(run=str(place / "run"), data=str(place / "rows.json")))
    assert (other.columns, other.max_rows) == ("", 0)


def test_another_file_for_evaluation_is_no_resume(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run", ignore=lambda *_: ["adapter"])
    shutil.copytree(place / "val", tmp_path / "val")
    (tmp_path / "val/b.csv").rename(tmp_path / "val/c.csv")
    words = ["--resume", str(tmp_path / "run"), "--val-data", str(tmp_path / "val")]
    with pytest.raises(InputError, match="val_data_sha256 differ"):
        fine_tune(read_defaults(words)[0])


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
