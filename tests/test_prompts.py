"""The answering command, from a run and from a model with an adapter."""

import json

import jax
import jax.numpy as jnp
import pytest
from random_models import BASE, model_folder

import jllama
from eval.prompts import REPORT_PROMPTS, main, show
from jllama.cli.terminal import console
from jllama.decode.generate import decode, prefill
from jllama.lora import adapted_linears
from jllama.text.prompt import prompt_ids
from train.lora import main as train

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    for name, seed in (("model", 0), ("other", 1)):
        model_folder(root, BASE, name=name, seed=seed)
    rows = [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(8)]
    (root / "rows.json").write_text(json.dumps(rows))
    train([
        "--model", str(root / "model"), "--data", str(root / "rows.json"), "--precision", "fp32",
        "--output-dir", str(root / "run"), "--prompt-style", "report", "--epochs", "1",
    ])  # fmt: skip
    return root


def test_what_commands_a_terminal_is_shown_as_pictures_side_by_side(capsys, monkeypatch):
    for width in (120, 40):
        monkeypatch.setattr(console, "_width", width)
        show([{"prompt": "a\x1b[2J", "base": "b\x9b1m", "x_answer": "c\x1b]8;;u\x07"}], ["base"])
        said = capsys.readouterr().out
        assert not set(said) & {"\x1b", "\x9b", "\x07"}
        assert "a␛[2J" in said
        assert "c␛]8;;u␇" in said


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_answers_the_reports_prompts_from_one_compilation(place, capsys):
    prefill.clear_cache()
    decode.clear_cache()
    main(["--run", str(place / "run"), "--precision", "fp32", "--max-new-tokens", "8"])
    lines = answers(place / "run" / "generations.jsonl")
    prompts = json.loads(REPORT_PROMPTS.read_text())["prompts"]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in prompts]
    assert all({"base", "tuned", "base_ids", "tuned_ids"} <= set(line) for line in lines)
    assert all(0 < len(line["tuned_ids"]) <= 8 for line in lines)
    assert (prefill._cache_size(), decode._cache_size()) == (1, 1)
    assert "wrote" in capsys.readouterr().out


def test_seeds_repeat_and_references_become_columns(place, tmp_path, capsys):
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps([{"prompt": "Say 3.", "report_tuned_answer": "three"}]))
    arguments = [
        "--model", str(place / "model"), "--adapter", str(place / "run" / "adapter"),
        "--prompts", str(place / "rows.json"), "--reference", str(reference), "--precision", "fp32",
        "--max-new-tokens", "6", "--temperature", "1",
    ]  # fmt: skip
    main([*arguments, "--output", str(tmp_path / "a.jsonl")])
    main([*arguments, "--output", str(tmp_path / "b.jsonl")])
    assert answers(tmp_path / "a.jsonl") == answers(tmp_path / "b.jsonl")
    assert answers(tmp_path / "a.jsonl")[3]["report_tuned_answer"] == "three"
    assert answers(tmp_path / "a.jsonl")[3]["expected"] == "3"
    assert "exact answers, tuned: " in capsys.readouterr().out


def test_merged_answers_are_those_of_the_adapter_beside_the_base(place, tmp_path, monkeypatch):
    real, asked, found = jllama.generate, [], {}

    def generate(model, *arguments, adapter_scale, **more):
        asked.append((len(adapted_linears(model)), adapter_scale))
        return real(model, *arguments, adapter_scale=adapter_scale, **more)

    monkeypatch.setattr(jllama, "generate", generate)
    for name, more in (("apart", []), ("merged", ["--merge"])):
        output = tmp_path / f"{name}.jsonl"
        main([
            "--run", str(place / "run"), "--max-new-tokens", "24", "--temperature", "0",
            "--batch-size", "4", "--output", str(output), *more,
        ])  # fmt: skip
        found[name] = answers(output)
    assert asked == [(4, 0), (4, 1)] * 2 + [(4, 0)] * 2 + [(0, 1)] * 2
    assert found["merged"] == found["apart"]
    assert any(line["base_ids"] != line["tuned_ids"] for line in found["merged"])


def test_an_adapter_is_asked_in_the_style_it_was_trained_in(place, tmp_path):  # lesson 22
    found = {}
    for style in ("", "report", "plain"):
        output = tmp_path / f"{style}.jsonl"
        main([
            "--model", str(place / "model"), "--adapter", str(place / "run" / "adapter"),
            "--prompts", str(place / "rows.json"), "--precision", "fp32",
            "--max-new-tokens", "4", "--output", str(output),
            *(["--prompt-style", style] if style else []),
        ])  # fmt: skip
        found[style] = answers(output)
    assert found[""] == found["report"] != found["plain"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nowhere"], "nowhere: no config.yaml; expected a run folder"),
        (
            ["--model", "{place}/other", "--adapter", "{place}/run/adapter"],
            "give the right --model",
        ),
        (["--model", "{place}/model", "--prompts", "nowhere.json"], "nowhere.json: no such file"),
        (["--model", "{place}/model", "--run", "{place}/run"], "drop --model or --run"),
        (["--model", "{place}/model", "--merge"], "--merge, but no adapter to fold in"),
    ],
)
def test_wrong_pairs_are_refused(place, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main([word.format(place=place) for word in arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_each_answer_says_how_it_ended_and_how_likely_both_models_find_it(place, tmp_path):
    arguments = [
        "--model", str(place / "model"), "--adapter", str(place / "run" / "adapter"),
        "--prompts", str(place / "rows.json"), "--precision", "fp32", "--max-new-tokens", "6",
        "--temperature", "1", "--prompt-style", "plain",
    ]  # fmt: skip
    main([*arguments, "--output", str(tmp_path / "a.jsonl")])
    tokenizer = jllama.load_tokenizer(place / "model")
    model = jllama.load_model(place / "model", "fp32")
    base = jllama.load_model(place / "model", "fp32")
    jllama.load_adapter(model, place / "run" / "adapter")
    rows = json.loads((place / "rows.json").read_text())
    for row, line in zip(rows, answers(tmp_path / "a.jsonl"), strict=True):
        for who in ("base", "tuned"):
            new = line[f"{who}_ids"]
            assert line[f"{who}_stopped"] == (new[-1] in tokenizer.stop_ids)
            prompt = prompt_ids("plain", row, tokenizer)
            ids = jnp.array([[*prompt, *new]])
            logs = {
                name: jax.nn.log_softmax(each(ids)[0, len(prompt) - 1 : -1])
                for name, each in (("base", base), ("tuned", model))
            }
            score = line[f"{who}_score"]
            assert score["tokens"] == len(new)
            for name, log in logs.items():
                nll = -float(jnp.mean(log[jnp.arange(len(new)), jnp.array(new)]))
                assert score["nll_per_token"][name] == pytest.approx(nll, abs=1e-4)
            kl = jnp.sum(jnp.exp(logs["tuned"]) * (logs["tuned"] - logs["base"]), axis=-1)
            assert score["kl_per_token"] == pytest.approx(float(jnp.mean(kl)), abs=1e-5)


def test_answers_are_on_the_disk_before_two_models_are_loaded_to_score_them(
    place, tmp_path, monkeypatch
):
    def too_little_memory(_):
        raise MemoryError

    monkeypatch.setattr("eval.prompts.load_voices", too_little_memory)
    monkeypatch.setattr("eval.subject.read_passport", lambda _: {})
    output = tmp_path / "a.jsonl"
    with pytest.raises(SystemExit):
        main([
            "--model", str(place / "model"), "--tuned", str(place / "other"), "--prompts",
            str(place / "rows.json"), "--precision", "fp32", "--max-new-tokens", "4", "--output",
            str(output),
        ])  # fmt: skip
    assert not output.exists()  # a report would take it for the whole
    lines = answers(tmp_path / "a.unscored.jsonl")
    assert [line["expected"] for line in lines] == [str(i) for i in range(8)]
    assert all(line["base_ids"] and line["tuned_ids"] for line in lines)
    assert not any("base_score" in line for line in lines)


def test_an_answer_that_its_budget_cut_is_not_exact(place, tmp_path, capsys):
    output, prompts = tmp_path / "a.jsonl", tmp_path / "rows.jsonl"
    arguments = [
        "--model", str(place / "model"), "--precision", "fp32", "--max-new-tokens", "4",
        "--temperature", "0", "--output", str(output), "--prompts",
    ]  # fmt: skip
    main([*arguments, str(place / "rows.json")])
    cut = [line for line in answers(output) if not line["base_stopped"]]
    assert cut
    rows = [{"prompt": line["prompt"], "completion": line["base"]} for line in cut]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    main([*arguments, str(prompts)])
    assert [line["base"] for line in answers(output)] == [
        line["expected"] for line in answers(output)
    ]
    assert f"exact answers, base: 0 of {len(cut)} (0 %)" in capsys.readouterr().out


def test_prompts_that_are_too_long_are_named_before_a_model_is_loaded(
    place, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(jllama, "load_model", lambda *_: pytest.fail("loaded"))
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": "a"}] * 16 + [{"prompt": "long " * 9999}]))
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(place / "model"), "--prompts", str(prompts)])
    assert ended.value.code == 2
    assert "row 16: its prompt has 49,997 tokens" in capsys.readouterr().err
