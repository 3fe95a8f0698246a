"""The fault campaign (`python -m tests.faults`): a short one, the whole one nightly, and itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.table import tables

ROOT = Path(__file__).parents[1]
FIGURES, PAGE = ROOT / "docs/results/faults-cpu.json", ROOT / "docs/reliability.md"


def campaign(tmp_path, *flags):
    """Its figures. Nothing is left behind, in files or processes; no fault was lost."""
    place = tmp_path / "place"
    place.mkdir()
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *flags, "--output", str(figures)],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(place)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(place.iterdir())
    return json.loads(figures.read_text())["figures"]


@pytest.mark.integration
def test_some_faults_of_every_kind_are_survived(tmp_path):
    """Those of training are test_run.py's."""
    commands = "from-meta|to-meta|to-hf|verify|train --resume"
    texts = "rows.json, lint|hf/config.json, from-hf|meta/params.json, from-meta"
    some = ["--jobs", "1", "--kills", "4", "--flips", "6", "--texts", "12"]
    found = campaign(tmp_path, *some, "--only", f"^({commands}|{texts})$")
    assert found["kills"]["survived"] >= 9
    assert found["flips"]["survived"] == 4 * 6
    assert found["texts"]["survived"] == 3 * 12


# A process of its own: it forks, which one with JAX's threads must not.
SABOTAGE = """
import subprocess, sys, time
from pathlib import Path
from faults.call import Watched, adopt_orphans, in_fork, in_process
from faults.moments import Fault, with_fault
from faults.verdict import after_damage, ended_well

folder = Path(sys.argv[1])
adopt_orphans()

def writes():
    for name in "abc":
        (folder / name).write_text(name)
    (folder / "c").rename(folder / "d")

def call(function, *fault):
    found = in_fork(with_fault(function, folder, *fault), folder, limit=2)
    names = sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        path.unlink()
    return found, names

def show(*words):
    print(*words, sep=" | ")

for fault in (Fault("kill", 2), Fault("torn", 2), Fault("kill", 4), Fault("full disk", 3),
              Fault("SIGTERM", 1), Fault("kill", 5)):
    found, names = call(writes, fault)
    show(fault.kind, int(fault.at), found.code, *names)
show("orphans", call(lambda: subprocess.Popen(["sleep", "9"]), Fault("kill", 1))[0].orphans)
show("hung", call(lambda: time.sleep(9))[0].hung)

def main(argv):
    (word,) = argv
    if word == "raise":
        raise LookupError("x")
    if word == "name":
        print("jllama x: a.txt: wrong", file=sys.stderr)
    if word == "control":
        print("\\x1b[2J")
    sys.exit(0 if word in ("right", "other", "control") else 2)

def case(word):
    found = in_process(main, [word])
    found.result = word
    return found

for word, found in Watched(case, "right", 5).run(["other", "raise", "name", "mum", "control"]):
    show(word, after_damage(found, "x", ["a.txt"], "right").partition(" (")[0])
"""


def test_the_campaign_notices_losses_tracebacks_orphans_and_hanging(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SABOTAGE, str(tmp_path)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"},
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "kill | 2 | -9 | a",
        "torn | 2 | -9 | a | b",
        "kill | 4 | -9 | a | b | c",
        "full disk | 3 | 1 | a | b",
        "SIGTERM | 1 | -15",
        "kill | 5 | 0 | a | b | d",
        "orphans | 1",
        "hung | True",
        "right | ",
        "other | loss: another result, not a word",
        "raise | traceback: LookupError: 'x'",
        "name | ",
        "mum | other words than one message: ''",
        "control | raw control character '\\x1b' on the terminal",
    ], done.stderr


def test_the_page_shows_the_figures_that_were_counted():
    result = json.loads(FIGURES.read_text())
    assert tables(result) in PAGE.read_text()
    figures = result["figures"]
    assert all(found["survived"] == found["injected"] for found in figures.values())
    assert figures["kills"]["injected"] >= 300
    assert figures["flips"]["injected"] >= 1000
    assert all(found["injected"] >= 100 for found in figures["texts"]["commands"].values())


@pytest.mark.slow
@pytest.mark.integration
def test_every_fault_of_the_campaign_is_survived(tmp_path):
    found = campaign(tmp_path)
    assert found["kills"]["survived"] >= 300
    assert found["flips"]["survived"] >= 1000
    assert all(x["survived"] >= 100 for x in found["texts"]["commands"].values())
