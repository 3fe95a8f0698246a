"""The house rules that a reader relies on, held by parsing the imports."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "jllama": {"jllama"},
    "convert": {"convert", "jllama"},
    "train": {"train", "jllama"},
    "eval": {"eval", "jllama"},
}
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    """jllama/text/rows.py -> jllama.text.rows"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def imported(path: Path, *, nested: bool = True) -> set[str]:
    """The modules that a file imports; without `nested` only those it needs to be imported."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & MODULES.keys()) or {node.module}
    return names


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_packages_meet_on_disk_not_by_import(path):
    assert set(MAY_IMPORT) & tops(path) <= MAY_IMPORT[package(path)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_torch_stays_in_convert_and_optax_in_train(path):
    assert "torch" not in tops(path) or package(path) == "convert"
    assert "optax" not in tops(path) or package(path) == "train"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_people_are_told_through_the_console_alone(path):
    """Only it makes control characters visible; children answer their parents in JSON."""
    if name_of(path) in ("jllama.cli.terminal", "jllama.machine", "train.plan.compiled",
                         "convert.speed.side"):  # fmt: skip
        return
    called = {x.func.id for x in ast.walk(ast.parse(path.read_text()))
              if isinstance(x, ast.Call) and isinstance(x.func, ast.Name)}  # fmt: skip
    assert "print" not in called
    assert not {"rich.table", "rich.console"} & imported(path)


def test_no_file_imports_itself_by_way_of_others():
    graph = {name: imported(path, nested=False) & MODULES.keys() for name, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)  # CycleError names one


def test_no_folder_is_flat():
    counts = {folder: len(list(folder.glob("*.py"))) for folder in {path.parent for path in FILES}}
    assert not {folder.name: n for folder, n in counts.items() if n > 13}


def test_a_wing_that_is_a_command_has_a_door():
    for wing in ("train/data", "train/plan", "train/sample", "eval/ablate", "eval/harness",
                 "eval/report", "eval/speed", "convert/speed"):  # fmt: skip
        door = (ROOT / wing / "__main__.py").read_text().splitlines()
        assert len([line for line in door if line]) <= 5


@pytest.mark.parametrize(
    ("home", "words"),
    [
        ("jllama.folders.run", ("run.json", "config.yaml", "metrics.jsonl", "generations.jsonl",
                                "score.json", "harness.json")),
        ("jllama.names", ("q_proj", "down_proj", "self_attn", "lm_head.weight", "lora_A.weight")),
    ],
)  # fmt: skip
def test_a_name_is_written_in_one_file(home, words):
    def strings(path):
        return {x.value for x in ast.walk(ast.parse(path.read_text()))
                if isinstance(x, ast.Constant) and isinstance(x.value, str)}  # fmt: skip

    for word in words:
        assert [name for name, path in MODULES.items() if word in strings(path)] == [home], word


def test_no_file_outgrows_a_reading():
    long = {p.name: n for p in FILES if (n := len(p.read_text().splitlines())) > 320}
    assert not long
