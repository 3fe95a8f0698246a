"""The examples, and the Python of README.md and docs/python.md, run as they stand."""

import json
import re
import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_pages import FENCED

import jllama
from jllama.bundled import convert_sample
from jllama.folders.run import RunFolder

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
ANSWER = "The capital of Canada is Ottawa."


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A folder in which `models/sample` is."""
    pytest.importorskip("torch")  # Meta's files are read with it
    place = tmp_path_factory.mktemp("sample")
    convert_sample(place / "models" / "sample")
    return place


@pytest.fixture
def here(sample, tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(sample / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python_of(page):
    """The blocks of Python of a page."""
    return [code for kind, code in FENCED.findall(page.read_text()) if kind == "python"]


def test_every_example_has_a_test():
    assert {file.name for file in EXAMPLES.iterdir()} == {
        "custom_loop.py", "custom_objective.py", "finetune.ipynb", "logprobs.py",
    }  # fmt: skip


def test_a_loop_of_ones_own_learns_to_answer(here, capsys):
    runpy.run_path(str(EXAMPLES / "custom_loop.py"))
    assert capsys.readouterr().out.splitlines()[-1] == ANSWER


def test_an_objective_of_ones_own_is_learned(here, capsys):
    runpy.run_path(str(EXAMPLES / "custom_objective.py"))
    said = capsys.readouterr().out.splitlines()[-1]
    first, last = map(float, re.findall(r"\d+\.\d+", said))
    assert last < first / 2
    (run,) = (here / "runs").glob("sample-*")
    record = RunFolder(run).read_record()
    assert record["given"] == {"loss": "smoothed", "windows": "Windows"}
    assert record["data"]["windows"] == record["steps"] == 82


def test_answers_come_with_their_log_probabilities(here, capsys):
    runpy.run_path(str(EXAMPLES / "logprobs.py"))
    said = capsys.readouterr().out
    sums = [float(x) for x in re.findall(r"(-?\d+\.\d+) nats  ", said)]
    assert len(sums) == 4
    assert sums == sorted(sums, reverse=True)
    assert said.count("the whole: -") == 2


def test_the_snippet_of_the_readme_runs(here, capsys):
    (snippet,) = (code for code in python_of(ROOT / "README.md") if "Trainer" in code)
    exec(snippet, {})
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{ANSWER} (")
    assert (here / "runs" / "latest" / "rows.jsonl").is_file()


def test_the_python_of_the_page_runs(here, capsys):
    found: dict = {}
    exec("\n".join(python_of(ROOT / "docs" / "python.md")), found)  # one after the other
    assert len(found["result"].losses) == 20
    lines = RunFolder(found["trainer"].run).read_metrics().values
    assert found["best"].loss == min(x["eval_loss"] for x in lines if "eval_loss" in x)
    assert "saved runs/" in capsys.readouterr().out


def test_the_notebook_runs_and_is_kept_without_outputs(sample, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for what the kernel starts, too
    monkeypatch.setenv("XLA_FLAGS", "")
    notebook = nbformat.read(EXAMPLES / "finetune.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in outputs]
    bars = [data for data in shown if "<progress" in data.get("text/html", "")]
    assert [bar["text/plain"].split("  ")[0] for bar in bars] == ["train 150/150 steps"]
    assert any("image/png" in data for data in shown)
    assert any("661 rows in memory" in data.get("text/plain", "") for data in shown)
    said = "".join(output.get("text", "") for output in outputs)
    tuned = re.findall(r"  tuned +'(.*)'", said)
    right = [row["output"] for row in json.loads((jllama.SAMPLE / "heldout.json").read_text())[:4]]
    assert sum(answer == output for answer, output in zip(tuned, right, strict=True)) >= 3
    assert "wrote exported" in said
    assert (tmp_path / "exported" / "config.json").is_file()
