"""The recipes: found by name, printed as they are, and planned for the cards that they are for."""

from pathlib import Path

import pytest
import yaml

import jllama
from eval.score import main as score
from jllama.config import PRESETS
from jllama.folders.manifest import read_sealed
from train.lora import main as train
from train.plan.arithmetic import memory_classes
from train.plan.cards import GPUS
from train.plan.compiled import Request
from train.plan.planner import can_compile, estimate, make_plans
from train.recipes import RECIPES, recipe_names
from train.recipes.command import main
from train.recipes.plans import CARDS, MODELS, card_of, described, model_of, planned, step_of

MIB = 2**20
FOR_CARDS = [f"{model}-{memory}" for model in MODELS for memory in CARDS]


def printed(capsys, *words):
    main(list(words))
    return capsys.readouterr().out


def refused(command, words, capsys):
    with pytest.raises(SystemExit) as ended:
        command(words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_every_card_has_its_recipes_and_every_recipe_a_file():
    assert recipe_names() == [*FOR_CARDS, "report", "sample", "smollm2"]
    assert sorted(planned()) == sorted(FOR_CARDS)


@pytest.mark.parametrize("name", FOR_CARDS)
def test_the_plan_is_of_the_recipes_own_step_and_fits(name):
    """docs/site/recipes.py plans anew what was changed."""
    plan, step, gpu = planned()[name], step_of(name), card_of(name)
    assert plan["step"] == described(step)
    assert (plan["model"], plan["gpu"]) == (model_of(name), gpu.name)
    assert plan["peak_mib"] + plan["free_mib"] == pytest.approx(gpu.room / MIB)
    assert sum(memory_classes(step).values()) / MIB < plan["peak_mib"]
    assert estimate(step, gpu).peak / MIB == pytest.approx(plan["peak_mib"], rel=0.05)
    gigabytes = int(name.partition("-")[2].removesuffix("gb"))
    alike = [gpu for gpu in GPUS.values() if 0.85 < gpu.memory_mib / 1024 / gigabytes < 1.05]
    assert gpu in alike
    for other in alike:
        assert plan["peak_mib"] < 0.98 * other.room / MIB, other.name
    assert plan["predicted_tokens_per_second"] > 100


@pytest.mark.parametrize("name", FOR_CARDS)
def test_recipes_for_cards_learn_alike(name):
    """The same tokens in a step at the same rate, on all linears, whatever the card."""
    step = step_of(name)
    assert step.micro_batch_size * step.accumulation * step.max_seq_len == 8192
    assert step.max_seq_len <= PRESETS[model_of(name)].max_seq_len
    assert len(step.lora.targets) == 7
    settings = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert settings["learning_rate"] == 2e-4


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(not can_compile(), reason="the packages of jllama[plan] are not installed")
@pytest.mark.parametrize("name", FOR_CARDS)
def test_planned_again_a_recipe_takes_as_much(name):
    gpu = card_of(name)
    (plan,) = make_plans([Request(step_of(name), gpu, whole=False)], gpu)
    assert plan.peak / MIB == pytest.approx(planned()[name]["peak_mib"], rel=0.01)
    assert plan.predicted == pytest.approx(planned()[name]["predicted_tokens_per_second"], rel=0.05)


def test_the_list_has_every_recipe_with_its_memory_and_speed(capsys):
    said = printed(capsys)
    for name in recipe_names():
        assert f"│ {name} " in said
    plan = planned()["7b-24gb"]
    (line,) = (line for line in said.splitlines() if line.startswith("│ 7b-24gb "))
    assert f"{plan['peak_mib']:,.0f}" in line
    assert f"{plan['predicted_tokens_per_second']:,.0f}" in line
    assert plan["gpu"] in line


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_printed_as_it_is_and_nothing_else(name, capsys):
    assert printed(capsys, name) == (RECIPES / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "answer"),
    [("7b-24bg", "did you mean 7b-24gb?"), ("xyz", "the recipes are 7b-8gb, 7b-12gb, 7b-24gb")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, answer, capsys):
    assert f"no recipe '{name}'; {answer}" in refused(main, [name], capsys)
    said = refused(train, ["--config", name, "--dry-run"], capsys)
    assert f"--config {name}: there is no such file, and no recipe '{name}'; {answer}" in said


def test_a_file_that_is_not_there_is_no_misspelt_recipe(capsys):
    for name in ("7b-24bg.yaml", "runs/7b-24bg"):
        assert f"{name}: no such file; expected lines" in refused(train, ["--config", name], capsys)


@pytest.mark.parametrize(("name", "learned"), [("7b", "39,976,960"), ("8b", "41,943,040")])
def test_a_recipe_trains_by_its_name_or_as_a_file_of_its_own(
    name, learned, tmp_path, monkeypatch, capsys
):
    """r 16 on all linears of 7B: 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008)) parameters."""
    monkeypatch.chdir(tmp_path)
    more = ["--model", MODELS[name], "--dry-run"]
    train(["--config", f"{name}-24gb", *more])
    by_name = capsys.readouterr().out
    assert f"{learned} trainable" in by_name
    Path("my.yaml").write_text(printed(capsys, f"{name}-24gb"))
    train(["--config", "my.yaml", *more])
    assert capsys.readouterr().out == by_name


def test_a_file_of_a_recipes_name_wins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("7b-24gb").write_text("lora_rank: 3\n")
    train(["--config", "7b-24gb", "--model", "sample", "--dry-run"])
    assert "│ lora_rank                   │ 3" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.integration
def test_the_sample_answers_what_it_was_not_taught(tmp_path, monkeypatch):
    """As `make demo` trains it: at least 95 % of the held-out instructions, to the letter."""
    monkeypatch.chdir(tmp_path)
    train(["--config", "sample", "--output-dir", "run"])
    held_out = str(jllama.SAMPLE / "heldout.json")
    score(["--run", "run", "--data", held_out, "--output", "score.json"])
    result = read_sealed(Path("score.json"), "")
    assert result["base"]["exact"] == {"rows": 156, "share": 0.0}
    assert result["tuned"]["exact"]["rows"] == 156
    assert result["tuned"]["exact"]["share"] >= 0.95
