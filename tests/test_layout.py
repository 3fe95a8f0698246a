"""The house rules that a reader relies on, held by parsing the imports."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "jllama": {"jllama"},
    "convert": {"convert", "jllama"},
    "train": {"train", "jllama"},
    "eval": {"eval", "jllama"},
}
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).glob("*.py"))]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_packages_meet_on_disk_not_by_import(path):
    own = set(MAY_IMPORT) & imported(path)
    assert own <= MAY_IMPORT[path.parent.name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_torch_stays_in_convert_and_optax_in_train(path):
    names, package = imported(path), path.parent.name
    assert "torch" not in names or package == "convert"
    assert "optax" not in names or package == "train"


def test_no_file_outgrows_a_reading():
    long = {p.name: n for p in FILES if (n := len(p.read_text().splitlines())) > 320}
    assert not long


def test_commands_start_quietly_where_the_plan_extra_is_but_no_driver():
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    script = "from jllama.machine import pass_over_absent_gpu; pass_over_absent_gpu(); import jax; print(jax.devices())"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr
