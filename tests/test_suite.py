"""The suite of measurements: its parts, its files, and the page made from them."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from eval.speed.command import main
from eval.speed.suite import run
from eval.speed.suite.bench import OutOfMemory
from eval.speed.suite.parts import Part, parts
from eval.speed.suite.settings import CARD, TINY
from eval.speed.suite.tables import tables
from jllama.cli import children
from jllama.errors import InputError

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/performance.md", ROOT / "docs/results/suite-h200"
WHEELS = ROOT / "eval/speed/suite/wheels/list.txt"


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Runs the command with parts of a test's own: its exit code, and the files it wrote."""
    monkeypatch.setattr(run, "device", lambda: "cpu")

    def call(*chosen, more=("--tiny",)):
        monkeypatch.setattr(run, "parts", lambda sizes: iter(chosen))
        code = 0
        try:
            main(["suite", "--json", str(tmp_path / "out"), *more])
        except SystemExit as ended:
            code = ended.code
        files = (tmp_path / "out").glob("*.json")
        return code, {file.stem: json.loads(file.read_text()) for file in files}

    return call


def raises(error):
    def part(bench):
        raise error

    return part


def part(name, outcome, **more):
    return Part(name, "something", (lambda bench: outcome) if type(outcome) is dict else outcome,
                **more)  # fmt: skip


def test_parts_survive_each_others_failures_and_the_failed_are_named(suite, capsys):
    code, files = suite(
        part("first", raises(InputError("no such file"))),
        part("second", raises(KeyError("x"))),
        part("third", raises(OutOfMemory("RESOURCE_EXHAUSTED"))),
        part("fourth", {}, needs=("no-such-package", "nor-this")),
        part("fifth", {"answer": 42}),
    )
    assert code == 2
    assert {name: file["state"] for name, file in files.items()} == {
        "first": "failed", "second": "failed", "third": "out of memory", "fourth": "skipped",
        "fifth": "done",
    }  # fmt: skip
    assert files["first"]["reason"] == "no such file"
    assert files["second"]["reason"] == "KeyError: 'x'"
    assert files["fourth"]["reason"] == "no-such-package and nor-this are not installed"
    assert files["fifth"]["figures"] == {"answer": 42}
    for file in files.values():
        assert {"date", "command", "device", "versions", "flags", "part", "seconds"} <= file.keys()
    said = capsys.readouterr()
    assert "2 parts failed: first, second" in said.err
    assert "tables.md" in said.out


def test_a_card_too_small_and_a_missing_package_are_no_failure(suite):
    code, _ = suite(part("a", raises(OutOfMemory("x"))), part("b", {}, needs=("no-such-package",)))
    assert code == 0


def test_a_part_that_takes_too_long_is_ended_and_the_next_one_runs(suite, monkeypatch):
    monkeypatch.setattr(run, "LIMIT", 1)
    started = time.monotonic()
    asleep = ["-n1", "-r1", "__import__('time').sleep(60)"]
    slow = part("slow", lambda bench: bench.child("timeit", asleep))
    code, files = suite(slow, part("next", {}))
    assert time.monotonic() - started < 30
    assert code == 2
    assert "took longer than 1 s" in files["slow"]["reason"]
    assert files["next"]["state"] == "done"


def test_what_does_not_fit_into_the_minutes_is_left_and_named(suite, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 45))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    code, files = suite(*(part(name, {}) for name in "abcd"), more=("--tiny", "--minutes", "3"))
    assert code == 0
    left = [name for name in "abcd" if name not in files]
    assert left
    assert len(files) >= 1
    assert f"--only {','.join(left)} --tiny" in capsys.readouterr().out


def test_a_name_or_its_first_words_choose_parts():
    known = list(parts(CARD))

    def chosen(only):
        return [part.name for part in run.choose(known, only)]

    assert chosen("") == [part.name for part in known]
    assert chosen("repeat,ceilings") == ["ceilings", "repeat", "repeat-deterministic"]
    remats = ("none", "block", "none-packed", "dots")
    assert chosen("train-4x4096") == [f"train-4x4096-{remat}" for remat in remats]
    with pytest.raises(InputError, match="--only trian: no part"):
        chosen("start,trian")


def test_a_part_has_a_name_of_its_own_and_the_tiny_ones_are_of_every_kind():
    names = [part.name for part in parts(CARD)]
    assert len(set(names)) == len(names)

    def kinds(sizes):
        return {part.name.split("-")[0] for part in parts(sizes)}

    assert kinds(TINY) == kinds(CARD)


def test_without_a_gpu_only_plans_and_tiny_parts_run(suite, capsys):
    assert suite(part("a", {}), more=())[0] == 2
    assert "JAX sees no GPU here" in capsys.readouterr().err
    assert suite(part("plans", {"x": {"gpu": {"name": "h200"}}}, device=False), more=())[0] == 0


@pytest.mark.integration
def test_several_devices_are_measured_beside_their_plans(tmp_path):
    children.run("eval.speed", ["suite", "--json", tmp_path, "--only", "devices", "--tiny"])
    found = json.loads((tmp_path / "devices.json").read_text())
    assert found["state"] == "done", found
    assert list(found["figures"]["steps"]) == ["one", "data=2", "fsdp=2", "tensor=2"]
    one, *others = (way["losses"] for way in found["figures"]["runs"].values())
    for losses in others:
        np.testing.assert_allclose(losses, one, rtol=0, atol=1e-5)
    number = r"[\d,]+"
    row = rf"\| tensor=2 \| {number} \| {number} \| {number} MiB \| {number} MiB \|"
    assert re.search(row, tables(tmp_path))


def test_the_list_runs_nothing(suite, capsys):
    code, files = suite(part("a", raises(InputError("run"))), more=("--list",))
    assert (code, files) == (0, {})
    assert "something" in capsys.readouterr().out


def test_tables_put_planned_and_measured_side_by_side(tmp_path):
    def write(name, figures):
        content = {"date": "2026-01-02", "versions": {"jax": "1"}, "tiny": False, "state": "done",
                   "gpu": {"name": "A card"}, "device": "x", "figures": figures}  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    gpu = {"gpu": {"name": "h200"}}
    write("plans", {
        "train-4x4096-none": {**gpu, "peak_mib": 1000, "predicted_tokens_per_second": 200,
                              "time_us_by_class": {"matmuls": 5, "loss": 2}},
        "generate-1": [gpu, {**gpu, "predicted_tokens_per_second": 300}],
    })  # fmt: skip
    write("ceilings", {"copy_gb_per_second": 4000.0, "bf16_tflops": 790.0, "fp32_tflops": 50.0})
    write("train-4x4096-none", {
        "tokens_per_second": 180, "planned_mib": 1010, "peak_memory_mib": 1050,
        "peak_memory_of": "device", "time_us_by_class": {"matmuls": 6},
    })  # fmt: skip
    write("peer-train-4x4096", {"tokens_per_second": 90})
    write("generate-1", {"decode_tokens_per_second": 250, "weight_bytes_per_token": 13e9})
    write("peer-generate-1", {"decode_tokens_per_second": 125, "cache": "static"})
    (tmp_path / "start.json").write_text(json.dumps(
        {"state": "skipped", "reason": "torch is not installed", "tiny": False}))  # fmt: skip
    said = tables(tmp_path)
    setting = "llama-2-7b, 4 x 4096, no remat"
    missing = ("not planned yet", "not measured yet")
    for line in (
        "Measured 2026-01-02 on A card; jax 1.",
        "Planned 2026-01-02 for h200; jax 1.",
        "`start`: skipped (torch is not installed).",
        f"| {setting} | 1,000 MiB | 1,010 MiB | 1,050 MiB | 1.05 |",
        f"| {setting} | {missing[0]} | 200 | 180 | 0.90 | 90 | 2.00x |",
        f"| llama-2-7b, 1 x 512, block remat | {missing[0]} | {missing[1]} | {missing[1]} |  |",
        f"### Time of a step by class: {setting}",
        "| matmuls | 5 | 6 |",
        "| loss | 2 | 0 |",
        "| 1 together | 300 | 250 | not measured yet | 0.81 | 125 (static) | 2.00x |",
    ):  # fmt: skip
        assert line in said.splitlines(), said


def test_the_page_has_the_tables_of_the_committed_results():
    assert tables(RESULTS) in PAGE.read_text()


def test_the_wheels_are_those_of_the_pins():
    pins = (ROOT / "pins/3.12.txt").read_text().lower().replace("_", "-").splitlines()
    wheels = [line for line in WHEELS.read_text().splitlines() if not line.startswith("#")]
    assert len(wheels) >= 8
    assert set(wheels) <= set(pins)


@pytest.mark.integration
def test_a_tiny_training_step_is_measured_beside_transformers_and_peft(tmp_path):
    pytest.importorskip("peft")
    main(["suite", "--json", str(tmp_path), "--tiny", "--only", "train-2x64-block,peer-train-2x64"])
    ours, its = (json.loads((tmp_path / f"{name}.json").read_text())["figures"]
                 for name in ("train-2x64-block", "peer-train-2x64-checkpointed"))  # fmt: skip
    for figures in (ours, its):
        assert figures["tokens_per_second"] == pytest.approx(2 * 64 / figures["step_seconds"])
        assert len(figures["losses"]) == 2 + TINY.steps
        assert figures["peak_memory_of"] == "process"
        assert figures["peak_memory_mib"] > 50
    assert ours["planned_mib"] < ours["peak_memory_mib"]
    assert "| sample, 2 x 64, block remat |" in (tmp_path / "tables.md").read_text()


@pytest.mark.slow
@pytest.mark.integration
def test_the_whole_tiny_suite_runs(tmp_path):
    main(["suite", "--json", str(tmp_path), "--tiny"])
    states = {file.stem: json.loads(file.read_text())["state"] for file in tmp_path.glob("*.json")}
    assert states.keys() == {part.name for part in parts(TINY)}
    assert set(states.values()) <= {"done", "skipped"}
