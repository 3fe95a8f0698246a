"""Ablation: known answers in words, cells that are trained and planned, and what is resumed."""

import functools
import json
import math
import signal
import threading
from itertools import product
from pathlib import Path

import pytest
import tyro
from random_models import BASE, model_folder

from eval.ablate import cells
from eval.ablate import command as ablate
from eval.ablate.accuracy import Trial, accuracies, mean_and_range, methods_of, more_seeds, sweep
from eval.ablate.analysis import AXES as ALL_AXES
from eval.ablate.analysis import PEAKS, analyse
from eval.ablate.cells import Children, Done, grid, name_of, out_of_memory
from eval.ablate.command import AblateConfig, main
from eval.ablate.store import CELLS, DESCRIPTION, TRIALS, opened
from jllama.errors import InputError
from jllama.folders.json_files import read_json_lines
from jllama.folders.manifest import read_sealed
from train.plan import planner
from train.plan.cards import find_gpu
from train.plan.command import PlanConfig, as_json

SEVEN = Path(__file__).parents[1] / "docs/results/ablation-llama-2-7b-a100-40gb"
AXES = {"precision": ["fp32", "bf16"], "accumulation": ["1", "8"],
        "remat": ["none", "ffn", "block"], "tune": ["full", "lora"],
        "base": ["stored"]}  # fmt: skip


real_device = functools.cache(ablate.device)


@pytest.fixture(autouse=True)
def device_asked_once(monkeypatch):
    found = real_device()  # before a test changes how children run
    monkeypatch.setattr(ablate, "device", lambda: found)


def read_ablation(folder):
    """(ablation.json, cells)"""
    return read_sealed(folder / DESCRIPTION, ""), read_json_lines(folder / CELLS).values


def measured(change=None, axes=AXES):
    """Cells with round figures: each technique divides or multiplies in its own way."""
    found = []
    for cell in grid(axes, 8):
        memory, seconds = 1000.0, 1.0
        memory *= 0.25 if cell.tune == "lora" else 1
        memory *= 0.5 if cell.precision == "bf16" else 1
        seconds *= 2.0 if cell.precision == "bf16" else 1
        memory *= {"none": 1, "ffn": 0.8, "block": 0.5}[cell.remat]
        memory *= cell.micro_batch_size / 8
        seconds *= cell.accumulation
        figures = {
            "planned_memory_mib": memory, "step_seconds": seconds, "loss": 2.0,
            "trainable_parameters": 10 if cell.tune == "lora" else 1000,
            "peak_memory_mib": 500.0 + (10 if cell.tune == "lora" else 0),
            "repeats": {"step_seconds": [seconds * 0.99, seconds * 1.01], "loss": [2.0, 2.0],
                        "peak_memory_mib": [490.0, 530.0]},
        }  # fmt: skip
        found.append(cell.__dict__ | figures | (change(cell) if change else {}))
    return found


def finding(found, technique, figure):
    (one,) = (x for x in found if x.technique.startswith(technique) and x.figure == figure)
    return one


def test_the_grid_has_every_combination_with_the_same_sequences():
    cells_ = grid(AXES, 8)
    plain = [cell for cell in cells_ if not cell.reference]
    assert len({(c.precision, c.accumulation, c.remat, c.tune) for c in plain}) == len(plain) == 24
    assert {c.micro_batch_size * c.accumulation for c in plain} == {8}
    assert [(c.micro_batch_size, c.accumulation) for c in cells_ if c.reference] == [(1, 1)] * 2
    assert not [c for c in grid(AXES | {"accumulation": ["1"]}, 8) if c.reference]


def test_each_technique_is_judged_by_the_pairs_that_differ_in_it_alone():
    cells_ = measured()
    found = analyse(cells_)
    for technique, axis, change in (
        ("LoRA instead", "tune", -0.75),
        ("bf16 instead", "precision", -0.5),
        ("ffn remat", "remat", -0.2),
        ("block remat", "remat", -0.5),
        ("8 micro-batches of 1 instead of 1 micro-batch of 8", "accumulation", -0.875),
    ):
        one = finding(found, technique, "planned_memory_mib")
        assert one.change == pytest.approx(change)
        assert one.words == (f"{100 * change:+.0f} %",
                             f"{100 * change:+.0f} to {100 * change:+.0f} %")  # fmt: skip
        assert one.pairs == (8 if "remat" in technique else 12)
        before, after = cells_[one.before], cells_[one.after]
        assert {name for name in ALL_AXES if before[name] != after[name]} == {axis}
        assert after["planned_memory_mib"] == before["planned_memory_mib"] * (1 + change)


def test_what_did_not_help_is_said():
    found = analyse(measured())
    slower = finding(found, "bf16 instead", "step_seconds")
    assert slower.words == ("+100 %", "+100 to +100 %")
    peak = finding(found, "LoRA instead", "peak_memory_mib")
    assert peak.spread == pytest.approx(0.08)
    assert peak.words == ("(+2.0 %)", "+2.0 to +2.0 %")  # it does not pass the spread
    # What no pair changed is not told, nor the loss of so few steps at one rate.
    told = {one.figure for one in found if one.technique.startswith("bf16")}
    assert told == {"planned_memory_mib", "step_seconds"}


def test_pairs_that_go_another_way_are_in_the_range():
    cells_ = measured(
        lambda cell: (
            {"planned_memory_mib": 9999.0} if (cell.tune, cell.remat) == ("lora", "ffn") else {}
        )
    )
    one = finding(analyse(cells_), "LoRA instead", "planned_memory_mib")
    assert one.words == ("-75 %", "-75 to +19,898 %")


def test_accumulating_itself_is_compared_with_the_small_batch():
    name = "8 micro-batches of 1 instead of a single one, "
    found = analyse(measured())
    assert finding(found, f"{name}full", "step_seconds").change == 7
    assert not [x for x in found if x.technique.startswith(name) and x.figure in PEAKS]
    dear = measured(lambda cell: {"planned_memory_mib": 1.0} if cell.reference else {})
    one = finding(analyse(dear), f"{name}lora", "planned_memory_mib")
    assert dear[one.before]["reference"]
    assert one.change == 15.625 / 2 - 1


def test_cells_without_memory_are_not_averaged():
    cells_ = measured()
    for cell in cells_:
        if cell["tune"] == "full" and cell["precision"] == "fp32":
            for name in ("planned_memory_mib", "step_seconds", "loss", "peak_memory_mib"):
                del cell[name]
            cell["failed"] = "out of memory: "
    assert finding(analyse(cells_), "LoRA", "planned_memory_mib").pairs == 6


def test_one_run_of_each_cell_has_no_spread():
    cells_ = measured()
    for cell in cells_:
        cell["repeats"] = {name: values[:1] for name, values in cell["repeats"].items()}
    one = finding(analyse(cells_), "LoRA instead", "peak_memory_mib")
    assert one.spread is None
    assert one.words[0] == "+2.0 %"


# --- what a method learns ---


def test_each_method_is_compared_at_its_own_best_rate_over_seeds():
    methods = methods_of(measured())
    assert methods == [("fp32", "full", "stored"), ("bf16", "full", "stored"),
                       ("bf16", "lora", "stored")]  # fmt: skip
    trials = sweep(methods, 0.003, seed=5)
    assert [x.learning_rate for x in trials if x.tune == "lora"] == [0.01, 0.03, 0.09]
    assert [x.learning_rate for x in trials if x.tune == "full"] == [0.001, 0.003, 0.009] * 2
    reached = {0.001: 0.5, 0.003: 0.25, 0.009: 9.0, 0.01: 0.75, 0.03: 1.0}
    lines = [
        trial.__dict__
        | ({"eval_loss": reached[trial.learning_rate]} if trial.learning_rate < 0.09
           else {"failed": "diverged"})
        for trial in trials
    ]  # fmt: skip
    more = more_seeds(lines, [6, 7])
    assert more[:2] == [Trial("fp32", "full", "stored", 0.003, seed) for seed in (6, 7)]
    assert len(more) == 6
    # A lower loss with another seed is no reason to take another rate.
    lines += [trial.__dict__ | {"eval_loss": 0.1 * trial.seed} for trial in more]
    full, _, lora = accuracies(lines)
    assert (full.name, full.learning_rate, full.at_the_edge) == ("fp32, full tuning", 0.003, False)
    assert (lora.name, lora.learning_rate, lora.at_the_edge) == ("bf16, LoRA", 0.01, True)
    assert mean_and_range(lines, full) == pytest.approx(((0.25 + 0.6 + 0.7) / 3, 0.45))
    assert accuracies([line for line in lines if "failed" in line]) == []


# --- trained ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    model_folder(root, BASE | {"n_layers": 1})
    rows = [{"prompt": f"Say {i}.", "completion": "x" * (1 + i % 9)} for i in range(40)]
    (root / "rows.json").write_text(json.dumps(rows))
    return root


def flags(place, output, **more):
    settings = {
        "model": place / "model", "data": place / "rows.json", "output": output, "steps": 2,
        "precision": "fp32", "accumulation": "1", "remat": "none,block", "tune": "lora",
        "sequences": 2, "repeats": 1, "max-seq-len": 32, "val-size": 2, "accuracy-steps": 3,
        "seeds": 2,
    } | more  # fmt: skip
    return [w for name, value in settings.items() for w in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def trained(place):
    output = place / "ablation"
    main(flags(place, output))
    return output


@pytest.mark.integration
def test_cells_are_trained_and_their_figures_read_back(trained):
    description, found = read_ablation(trained)
    assert description["kind"] == "measured"
    assert {"date", "command", "device", "versions", "inputs"} <= description.keys()
    assert description["settings"]["remat"] == "none,block"
    block, none = sorted(found, key=lambda cell: cell["remat"])
    assert (block["remat"], none["remat"]) == ("block", "none")
    for cell in found:
        assert cell["peak_memory_mib"] > 50
        assert cell["planned_memory_mib"] > 0.1
        assert cell["step_seconds"] > 0
        assert cell["repeats"]["loss"] == [cell["loss"]]
        assert cell["trainable_parameters"] == 16 * 2 * (32 + 32)
    assert block["planned_memory_mib"] <= none["planned_memory_mib"]
    # Recomputing gives the same numbers, but for rounding.
    assert block["loss"] == pytest.approx(none["loss"], rel=1e-5)
    trials = read_json_lines(trained / TRIALS).values
    assert [(t["learning_rate"], t["seed"]) for t in trials[3:]] == [
        (min(trials[:3], key=lambda t: t["eval_loss"])["learning_rate"], 1)
    ]
    assert sorted(t["learning_rate"] for t in trials[:3]) == [0.00333, 0.01, 0.03]
    assert all(t["eval_loss"] > 0 and t["steps"] == 3 for t in trials)
    assert len({t["tokens"] for t in trials[:3]}) == 1  # the same budget


@pytest.mark.integration
def test_only_missing_cells_run_again(place, trained, monkeypatch, capsys):
    file = trained / "cells.jsonl"
    first, second = file.read_text().splitlines(keepends=True)
    file.write_text(first + second[: len(second) // 2])  # killed while it wrote
    asked = []
    run = Children.run
    monkeypatch.setattr(
        Children, "run", lambda self, module, c: asked.append(c) or run(self, module, c)
    )
    main(flags(place, trained))
    assert [c[c.index("--remat") + 1] for c in asked] == [json.loads(second)["remat"]]
    assert len(read_json_lines(trained / TRIALS).values) == 4
    assert file.read_text().startswith(first)
    assert {cell["remat"] for cell in read_ablation(trained)[1]} == {"none", "block"}
    said = capsys.readouterr().out
    assert "has 1 of 2 cells" in said
    assert f"next: jllama report --run runs/latest --ablation {trained}" in said
    assert "block remat instead of none" in said
    asked.clear()
    main(flags(place, trained))  # all there: a table and no process
    assert not asked


def refused(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.integration
def test_other_settings_and_other_rows_need_another_folder(place, trained, capsys, tmp_path):
    before = (trained / "cells.jsonl").read_text()
    said = refused(capsys, flags(place, trained, steps=3, seed=1))
    assert "settings.seed 0 there, 1 now; settings.steps 2 there, 3 now" in said
    rows = tmp_path / "rows.json"
    rows.write_text((place / "rows.json").read_text().replace("Say", "Ask"))
    assert "inputs.data_sha256" in refused(capsys, flags(place, trained, data=rows))
    assert (trained / "cells.jsonl").read_text() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    assert "holds something else" in refused(capsys, flags(place, tmp_path / "mine"))


@pytest.mark.integration
def test_one_process_fills_a_folder(place, trained, capsys):
    description = read_ablation(trained)[0]
    with opened(trained, description):
        assert "being filled by another process" in refused(capsys, flags(place, trained))


KILLED = Done(-signal.SIGKILL, "", "")
FULL = Done(2, "", "jllama train: out of memory: RESOURCE_EXHAUSTED: 9 bytes\nless: ...")


@pytest.mark.integration
@pytest.mark.parametrize("done", [KILLED, FULL], ids=["killed", "said"])
def test_running_out_of_memory_is_a_result(place, tmp_path, monkeypatch, capsys, done):
    monkeypatch.setattr(Children, "run", lambda self, module, flags: done)
    main(flags(place, tmp_path / "ablation", remat="none"))
    (cell,) = read_ablation(tmp_path / "ablation")[1]
    assert cell["failed"].startswith("out of memory: ")
    assert "peak_memory_mib" not in cell
    assert {t["failed"] for t in read_json_lines(tmp_path / "ablation" / TRIALS).values} == {
        "none of its cells ended"
    }
    assert "no memory" in capsys.readouterr().out
    main(flags(place, tmp_path / "ablation", remat="none"))  # a result: it is not tried again
    assert len(read_ablation(tmp_path / "ablation")[1]) == 1


@pytest.mark.integration
def test_another_failure_ends_the_command_with_its_words(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Children, "run", lambda self, *_: Done(2, "", "no such file: rows.json"))
    said = refused(capsys, flags(place, tmp_path / "ablation", remat="none"))
    assert "the cell fp32 lora none 2 x 1 failed (code 2):\n  no such file: rows.json" in said
    assert read_ablation(tmp_path / "ablation")[1] == []


def test_memory_is_told_from_other_failures():
    assert out_of_memory(Done(1, "", "numpy.ArrayMemoryError: Unable to allocate"))
    assert not out_of_memory(Done(1, "", "ValueError: no"))
    assert not out_of_memory(Done(0, "", "out of memory"))
    assert not out_of_memory(Done(-signal.SIGTERM, "", ""))


@pytest.mark.integration
def test_an_interruption_ends_the_children_and_says_how_to_go_on(
    place, tmp_path, monkeypatch, capsys
):
    """As Ctrl-C does: the main thread is interrupted while a child runs."""
    started, seen, codes = threading.Event(), [], []

    run = Children.run

    def noted(self, module, flags):
        seen.append(self)
        started.set()
        done = run(self, "timeit", ["-s", "import time", "time.sleep(60)"])
        codes.append(done.code)
        return done

    def interrupted(futures):
        started.wait(20)
        while not seen[0].running:
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(Children, "run", noted)
    monkeypatch.setattr(cells, "as_completed", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(flags(place, tmp_path / "ablation"))
    assert ended.value.code == 130
    assert "0 of 2 cells are in" in capsys.readouterr().out
    assert seen[0].stopped
    assert not seen[0].running
    assert codes
    assert set(codes) == {-signal.SIGKILL}  # also one that was being started just then


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "fp16"], "--precision fp16, expected some of bf16, fp32"),
        (["--remat", "none,none"], "each once"),
        (["--accumulation", "1,3"], "--accumulation 1,3, expected whole"),
        (["--accumulation", "0"], "--accumulation 0, expected whole"),
        (["--steps", "1"], "--steps 1, expected a whole number, at least 2"),
        (["--repeats", "0"], "--repeats 0, expected a whole number, at least 1"),
        (["--model", "nowhere"], "--data FILE is missing"),
        (["--val-size", "0"], "--val-size 0 leaves no rows to compare methods on"),
        (["--model", "nowhere", "--data", "rows.json"], "nowhere"),
        (["--gpu", "a100-40gb", "--data", "rows.json"], "reads no rows"),
        (["--gpu", "rtx-9090"], "--gpu rtx-9090, expected rtx-3060"),
    ],
)
def test_what_cannot_be_compared_is_refused(capsys, tmp_path, words, message):
    assert message in refused(capsys, [*words, "--output", tmp_path / "ablation"])


# --- planned ---


@pytest.fixture
def estimated(monkeypatch):
    """Plans in this process, by the closed formulas."""
    one = threading.Lock()  # tyro's caches are not for two threads at a time

    def run(self, module, flags):
        assert module == "train.plan"
        with one:
            config = tyro.cli(PlanConfig, args=flags)
        gpu = find_gpu(config.gpu)
        return Done(0, json.dumps(as_json(planner.estimate(config.step, gpu), config)), "")

    monkeypatch.setattr(Children, "run", run)


def test_a_card_is_planned_for_in_all_24_cells(estimated, tmp_path, capsys):
    output = tmp_path / "planned"
    words = ["--gpu", "a100-40gb", "--model", "llama-2-7b", "--output", str(output)]
    main(words)
    description, found = read_ablation(output)
    assert description["kind"] == "planned"
    assert description["settings"]["max_seq_len"] == 512
    assert "steps" not in description["settings"]
    assert len([cell for cell in found if not cell["reference"]]) == 24
    for cell in found:
        assert cell["peak_mib"] == pytest.approx(sum(cell["classes_mib"].values()))
        assert cell["compiled"] is False
    said = capsys.readouterr().out
    assert "not compiled, but estimated" in said
    assert "optimizer state, MiB" in said
    assert_order_of_memory(found)
    full = {cell["free_mib"] for cell in found if cell["tune"] == "full"}
    assert max(full) < 0  # negative, and a result


def test_classes_of_memory_have_sentences_of_their_own(estimated, tmp_path):
    output = tmp_path / "planned"
    main(["--gpu", "h200", "--model", "llama-2-7b", "--output", str(output), "--remat", "none"])
    found = analyse(read_ablation(output)[1])
    moments = finding(found, "LoRA", "optimizer_state_mib")
    assert moments.change == pytest.approx(8_388_608 / 6_738_415_616 - 1)
    assert finding(found, "bf16", "weights_mib").least == pytest.approx(-0.5, abs=0.01)
    # With full tuning a layer also adds its gradients: its activations are not known apart.
    assert finding(found, "bf16", "activations_mib").pairs == 2
    assert finding(found, "bf16", "working_mib").pairs == 4
    assert not [x for x in found if x.technique.startswith("LoRA") and "activations_" in x.figure]


def assert_order_of_memory(cells):
    """fp32 full > fp32 LoRA > bf16 LoRA, and no remat > ffn > block, wherever compared."""
    known = {tuple(cell[axis] for axis in ALL_AXES if axis in cell): cell for cell in cells
             if not cell["reference"]}  # fmt: skip
    compared = 0
    for more, less in (
        ({"tune": "full", "precision": "fp32"}, {"tune": "lora", "precision": "fp32"}),
        ({"tune": "lora", "precision": "fp32"}, {"tune": "lora", "precision": "bf16"}),
        ({"remat": "none"}, {"remat": "ffn"}),
        ({"remat": "ffn"}, {"remat": "block"}),
    ):
        for cell in known.values():
            if more.items() <= cell.items():
                other = known[tuple((cell | less)[axis] for axis in ALL_AXES if axis in cell)]
                # The peak of full tuning can be that of the update, which has no activations.
                ties = "remat" in less and cell["tune"] == "full"
                most = 1.001 * cell["peak_mib"] if ties else math.nextafter(cell["peak_mib"], 0)
                assert other["peak_mib"] <= most, (name_of(other), name_of(cell))
                compared += 1
    assert compared == 6 + 6 + 8 + 8


def lines_of(file):
    return len(file.read_text().splitlines()) if file.is_file() else 0


@pytest.mark.skipif(lines_of(SEVEN / "cells.jsonl") < 26, reason="7B is not planned in every cell")
def test_the_compiled_7b_cells_keep_the_order_of_memory():
    description, found = read_ablation(SEVEN)
    plain = [cell for cell in found if not cell["reference"]]
    axes = ("precision", "accumulation", "remat", "tune")
    assert {tuple(cell[name] for name in axes) for cell in plain} == set(
        product(("fp32", "bf16"), (1, 8), ("none", "ffn", "block"), ("full", "lora"))
    )
    assert all(cell["compiled"] for cell in found)
    assert_order_of_memory(found)
    assert description["settings"]["model"] == "llama-2-7b"


@pytest.mark.integration
def test_a_folder_without_cells_takes_other_settings(place, tmp_path, monkeypatch, capsys):
    """As after a first call that failed at once."""
    monkeypatch.setattr(Children, "run", lambda self, *_: Done(2, "", "no such card"))
    for steps in (2, 3):
        refused(capsys, flags(place, tmp_path / "ablation", steps=steps))
    assert read_ablation(tmp_path / "ablation")[0]["settings"]["steps"] == 3


def test_a_kill_before_the_description_had_its_name_is_gone_on_from(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"{DESCRIPTION}.new").write_text('{"kind": "mea')
    with opened(tmp_path / "a", {"kind": "measured"}) as lines:
        assert lines == {CELLS: [], TRIALS: []}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [DESCRIPTION]


def test_the_defaults_are_24_cells():
    plain = [cell for cell in grid(AblateConfig().axes, 8) if not cell.reference]
    assert len(plain) == 24
    with pytest.raises(InputError, match="sequences"):
        AblateConfig(sequences=0)


def test_bases_in_codes_are_a_fifth_axis_of_lora_alone():
    cells = grid(AXES | {"base": ["stored", "int4"]}, 8)
    coded = [cell for cell in cells if cell.base == "int4"]
    assert len(coded) == 12
    assert {cell.tune for cell in coded} == {"lora"}
    found = measured(axes=AXES | {"base": ["stored", "int4"]})
    for cell in found:
        cell["planned_memory_mib"] *= 0.3 if cell["base"] == "int4" else 1
    (finding,) = [
        x for x in analyse(found)
        if x.technique.startswith("an int4 base") and x.figure == "planned_memory_mib"
    ]  # fmt: skip
    assert finding.technique == "an int4 base instead of weights as stored"
    assert finding.pairs == 12
    assert finding.change == pytest.approx(-0.7)
    assert found[finding.after]["base"] == "int4"
    # Cells from before there was such an axis say the same as those of stored weights.
    before = [{k: v for k, v in cell.items() if k != "base"} for cell in measured()]
    assert analyse(before) == analyse(measured())
