"""What an adapter and a run folder know of their origin, and who is refused for it."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy
import yaml
from random_models import GROUPED, model_folder

from eval.prompts import main as answer
from jllama.folders.adapter import read_passport
from jllama.folders.json_files import read_json
from jllama.folders.manifest import manifest_sha256
from train.lora import main

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, twelve rows, and a finished run on the first model."""
    root = tmp_path_factory.mktemp("place")
    model_folder(root, GROUPED, transformers_name="org/tiny")
    model_folder(root, GROUPED, name="other", seed=1)
    rows = [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(12)]
    (root / "rows.json").write_text(json.dumps(rows))
    main(flags(root, root / "run", model="model"))
    return root


def flags(root, output, *more, model):
    return [
        "--model", str(root / model), "--data", str(root / "rows.json"), "--output-dir",
        str(output), "--precision", "fp32", "--max-seq-len", "256", "--micro-batch-size", "2",
        "--gradient-accumulation-steps", "1", "--epochs", "1", "--save-steps", "2",
        "--lora-targets", "q_proj,down_proj", "--lora-rank", "4", "--rslora",
        "--prompt-style", "alpaca", "--seed", "7", *more,
    ]  # fmt: skip


def arrays(run):
    return safetensors.numpy.load_file(run / "adapter" / "adapter_model.safetensors")


def test_an_adapter_says_where_it_comes_from(place):
    passport = read_passport(place / "run" / "adapter")
    tokenizer = (place / "model" / "tokenizer.model").read_bytes()
    expected = {
        "base_manifest_sha256": manifest_sha256(place / "model"),
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        "data_sha256": hashlib.sha256((place / "rows.json").read_bytes()).hexdigest(),
        "prompt_style": "alpaca",
        "seed": 7,
    }
    assert {name: passport[name] for name in expected} == expected
    assert passport["versions"]["jax"]
    config = read_json(place / "run" / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == "org/tiny"
    settings = passport["lora"]
    assert (settings["rank"], settings["alpha"], settings["rslora"]) == (4, 32.0, True)
    assert settings["targets"] == ["wq", "w2"]
    assert settings["scale"] == 16.0  # 32 / sqrt(4)


def test_training_starts_from_an_adapter_and_not_from_another_bases(place, tmp_path, capsys):
    adapter = str(place / "run" / "adapter")
    still = ["--init-adapter", adapter, "--max-steps", "1", "--learning-rate", "1e-12"]
    main(flags(place, tmp_path / "same", *still, model="model"))
    for name, array in arrays(place / "run").items():
        np.testing.assert_allclose(arrays(tmp_path / "same")[name], array, rtol=0, atol=1e-9)

    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(flags(place, tmp_path / "other", *still, model="other"))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "jllama.json: this adapter was trained on org/tiny (manifest" in said
    assert not (tmp_path / "other").exists()
    main(flags(place, tmp_path / "other", *still, "--force", model="other"))


def test_answering_wants_the_adapters_own_base(place, tmp_path, capsys):
    command = ["--model", str(place / "other"), "--adapter", str(place / "run" / "adapter"),
               "--limit", "1", "--max-new-tokens", "2", "--output", str(tmp_path / "g.jsonl"),
               "--precision", "fp32"]  # fmt: skip
    with pytest.raises(SystemExit):
        answer(command)
    assert "jllama.json: this adapter was trained on org/tiny (manifest" in capsys.readouterr().err
    answer([*command, "--force"])
    assert (tmp_path / "g.jsonl").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [("config.yaml", "config.yaml was changed after the run began"),
     ("run.json", "run.json: damaged or edited")],
)  # fmt: skip
def test_a_run_folder_that_was_changed_is_not_resumed(file, message, place, tmp_path, capsys):
    """Reliability 5, for what a resume reads besides the state."""
    main(flags(place, tmp_path / "run", model="model"))
    for result in (tmp_path / "run" / "adapter").iterdir():
        result.unlink()
    (tmp_path / "run" / "adapter").rmdir()
    path = tmp_path / "run" / file
    good = path.read_text()
    if file == "config.yaml":
        path.write_text(yaml.safe_dump(yaml.safe_load(good) | {"learning_rate": 1e-3}))
    else:
        path.write_text(json.dumps(read_json(path) | {"device": "TPU"}))
    with pytest.raises(SystemExit):
        main(["--resume", str(tmp_path / "run")])
    assert message in capsys.readouterr().err
    path.write_text(good)
    main(["--resume", str(tmp_path / "run")])
    assert arrays(tmp_path / "run").keys() == arrays(place / "run").keys()
