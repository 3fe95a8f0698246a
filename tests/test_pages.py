"""README.md and the documentation: commands that parse, links that lead somewhere, true figures."""

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from jllama.cli import command
from jllama.cli.script import COMMANDS
from jllama.cli.settings import take_flag
from jllama.config import PRESETS
from train.recipes import plans, recipe_file, recipe_names

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/guides").glob("*.md")),
]  # fmt: skip
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
MODULES = {module.removesuffix(".command"): name for name, (module, _) in COMMANDS.items()}
MODULES |= {"train.data": "lint", "train.sample": "sample"}  # whose door is not their command
# Modules that are started, but are no commands of jllama.
OTHERS = ("pytest", "tests.faults", "eval.harness.cli")


def commands(page: Path) -> list[str]:
    """Lines of blocks, and text in backticks, that begin with `jllama` or `python -m`."""
    text = page.read_text()
    blocks = [block for kind, block in FENCED.findall(text) if kind in ("", "sh", "bash")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.strip().removeprefix("$ ") for line in lines]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", text))]
    return [line for line in lines if re.match(r"(jllama|python -m) \S", line)]


OF_RECIPES = {
    line
    for name in recipe_names()
    for line in re.findall(r"^# \w+: (jllama .*)$", recipe_file(name).read_text(), re.MULTILINE)
}
ALL = sorted({line for page in PAGES for line in commands(page)} | OF_RECIPES)


class Parsed(BaseException):
    """The flags of a command were read."""


@pytest.fixture
def parse(monkeypatch):
    """Reads the flags of a command as it would, and does nothing else."""
    read = command._parse

    def only(settings, **how):
        read(settings, **how)
        raise Parsed

    monkeypatch.setattr(command, "_parse", only)
    monkeypatch.chdir(ROOT)

    def call(name, words):
        if name == "launch" and "--" in words:
            launched = words[words.index("--") + 1 :]
            call(launched[0], launched[1:])
        if name == "train":  # the settings of a run, and of a file that is but an example
            words, _ = take_flag("--resume", words)
            rest, file = take_flag("--config", words)
            there = file and (Path(file).exists() or file in recipe_names())
            words = words if there else rest
        with pytest.raises(Parsed):
            import_module(COMMANDS[name].module).main(words)

    return call


def named(line: str) -> tuple[str, list[str]] | None:
    """The command that a line starts and its flags; None for one that is not ours."""
    words = shlex.split(re.sub(r" > \S+", "", line), comments=True)
    if words[:2] == ["python", "-m"]:
        return None if words[2] in OTHERS else (MODULES[words[2]], words[3:])
    if words[1] in ("COMMAND", "--help", "--version", "..."):
        return None
    assert words[1] in COMMANDS, line
    return words[1], words[2:]


@pytest.mark.integration
@pytest.mark.parametrize("line", ALL)
def test_every_command_of_the_pages_is_one(line, parse, capsys):
    found = named(line)
    if found is None or (found[0] not in ("train", "plan") and not found[1]):
        return  # the name of a command alone
    if "--help" not in found[1]:
        parse(*found)


# With the bundled sample, in this order: later ones read what earlier ones wrote.
OF_THE_SAMPLE = ("from-meta", "lint", "train", "chat", "prompts", "score", "report")


def run_without_weights() -> list[str]:
    """Lines that need no weights but the sample's: its whole way, plans of presets, dry runs."""
    ours = [(line, found) for line in ALL if (found := named(line))]
    way = [
        next(line for line, (name, words) in ours
             if name == step and words in ([], ["--run", "runs/latest"]))
        for step in OF_THE_SAMPLE
    ]  # fmt: skip
    presets = [
        line for line, (name, words) in ours
        if "--dry-run" in words or (name == "plan" and PRESETS.keys() & set(words))
    ]  # fmt: skip
    return ["jllama --help", *way, *presets]


@pytest.mark.slow
@pytest.mark.integration
def test_commands_that_need_no_weights_run(tmp_path):
    lines = run_without_weights()
    assert len(lines) > 15
    for line in lines:
        first, *words = shlex.split(line, comments=True)
        program = {"jllama": [Path(sys.executable).with_name("jllama")], "python": [sys.executable]}
        place = ROOT if "--dry-run" in words else tmp_path  # it reads a recipe and writes nothing
        done = subprocess.run([*program[first], *words], cwd=place, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
    assert (tmp_path / "runs/latest/report.html").is_file()


def test_the_pages_name_every_command():
    called = {found[0] for line in ALL if (found := named(line))}
    assert not COMMANDS.keys() - called


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s#]+)", FENCED.sub("", page.read_text()))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_what_the_pages_make_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z0-9.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = {name for page in PAGES for name in re.findall(r"^make ([a-z]\S*)|`make ([a-z][^\s`]*)",
            page.read_text(), re.MULTILINE) for name in name if name}  # fmt: skip
    assert "docs" in made
    assert made <= targets


def test_the_table_of_models_has_the_presets():
    text = (ROOT / "README.md").read_text()
    table = text.split("\n## Models\n")[1].strip().split("\n\n")[0]
    contexts = {
        name: int(context.replace(",", ""))
        for names, context in re.findall(r"\| (`.+`) \| ([\d,]+) \|", table)
        for name in re.findall(r"`([^`]+)`", names)
    }
    known = {name: config.max_seq_len for name, config in PRESETS.items() if name != "sample"}
    assert contexts == known


def test_what_fits_is_what_was_planned():
    site = runpy.run_path(str(ROOT / "docs/site/picture.py"))
    rows = list(site["rows"]())
    table = (ROOT / "README.md").read_text().split("\n## What fits\n")[1].split("\n## ")[0]
    assert len(rows) == table.count(" MiB |\n") >= 10
    for row in rows:
        plan = site["plan_of"](row)
        assert (round(plan["peak_mib"]), round(plan["free_mib"])) == (row.peak, row.left), row
        assert row.left > 0
    assert site["picture"]() == (ROOT / "docs/what-fits.svg").read_text()


def test_the_table_of_several_cards_is_what_was_planned():
    site = runpy.run_path(str(ROOT / "docs/site/scaling.py"))
    assert site["table"]() in (ROOT / "docs/scaling.md").read_text()
    plans = json.loads(site["FILE"].read_text())["plans"]
    asked = [plan["settings"] for plan in plans]
    assert {x["model"] for x in asked} == {*site["MODELS"]}
    assert {x["gpu"] for x in asked} == {*site["CARDS"]}
    (of_eight,) = (
        plan for plan in plans
        if plan["settings"]["model"] == "llama-2-70b" and plan["settings"]["mesh"] == "fsdp=8"
        and plan["settings"]["micro_batch_size"] == 1
    )  # fmt: skip
    assert of_eight["peak_mib"] < 19_740


def test_the_advice_on_settings_is_what_was_trained():
    site = runpy.run_path(str(ROOT / "docs/site/settings.py"))
    page = (ROOT / "docs/settings.md").read_text()
    tables = site["tables"]()
    assert tables
    assert not [table for table in tables if table not in page]
    runs = json.loads(site["FILE"].read_text())["runs"]
    losses = {
        tuple(run["settings"].values()): run["held_out_loss"]
        for run in runs
        if run["settings"]["model"] == "sample"
    }
    fixed = (16, 32.0, 5, 4, 0)  # rank, alpha, sequences a step, epochs, seed
    best = {
        targets: min((losses["sample", targets, rate, *fixed], rate) for rate in (1e-3, 3e-3, 1e-2))
        for targets in site["TARGETS"]
    }
    assert {rate for _, rate in best.values()} == {3e-3}
    assert best["all"][0] < 0.55 * best["wq,wv"][0]
    assert best["all"][0] < best["wq,wk,wv,wo"][0] < best["w1,w2,w3"][0]


def test_figures_of_the_guides_are_those_of_the_plans():
    site = runpy.run_path(str(ROOT / "docs/site/picture.py"))
    planned = {f"{row.peak:,} MiB" for row in site["rows"]()} | {"7,048 MiB"}
    recipes = {f"{plan['peak_mib']:,.0f} MiB" for plan in plans.planned().values()}
    for name, count in (("24-gb", 1), ("8-gb", 3)):
        peaks = re.findall(r"[\d,]+\sMiB", (ROOT / f"docs/guides/{name}.md").read_text())
        found = {" ".join(peak.split()) for peak in peaks}
        assert len(found & planned) == count, found
        assert len(found & recipes) == 1, found
        assert found - planned - recipes <= {"1,437 MiB"}  # the margin of a card with 24 GB


def texts() -> list[str]:
    """Every text in the source, with a mark where a value is put in."""
    found = []
    for package in ("jllama", "convert", "train", "eval"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(
                        str(part.value) if isinstance(part, ast.Constant) else "\0"
                        for part in node.values
                    ))  # fmt: skip
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_the_messages_of_troubleshooting_are_in_the_source():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert re.findall(r"^### (\d+)\. ", page, re.MULTILINE) == [str(n) for n in range(1, 21)]
    blocks = [block for kind, block in FENCED.findall(page) if kind == "text"]
    assert len(blocks) == 20
    templates = [
        (re.compile("[^\n]+?".join(map(re.escape, text.strip().split("\0")))), text)
        for source in texts()
        for text in source.splitlines()
        if len(text.replace("\0", "")) >= 15
    ]
    for line in "".join(blocks).splitlines():
        said = re.sub(r"^jllama \S+: ", "", line.strip())
        fixed = max(
            (len(text.replace("\0", "")) for form, text in templates if form.search(said)),
            default=0,
        )
        assert fixed >= max(15, 0.15 * len(said)), line


@pytest.mark.integration
def test_the_page_of_settings_has_every_flag_in_words(monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    page = runpy.run_path(str(ROOT / "docs/site/hooks.py"))["settings_page"]()
    assert str(ROOT) not in page  # defaults as in a clone, not of this machine
    assert re.findall(r"^## jllama (\S+)$", page, re.MULTILINE) == list(COMMANDS)
    assert (
        "| `--lora-rank` | `16` | Rank R of the adapters. Takes a whole number, at least 1. |"
        in (page.splitlines())
    )
    assert "None" not in page
