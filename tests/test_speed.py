import json
import statistics

import pytest
from random_models import BASE, model_folder

from eval.speed.command import main
from eval.speed.generate import RANDOM, compare_ids, write_random
from jllama.config import LlamaConfig
from jllama.folders.manifest import manifest_sha256
from jllama.folders.model import read_config

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    model_folder(root, BASE)
    rows = [{"prompt": f"Say {i}.", "completion": "x" * (1 + 7 * (i % 9))} for i in range(40)]
    (root / "rows.json").write_text(json.dumps(rows))
    return root


def flags(place, **more):
    settings = {"model": place / "model", "data": place / "rows.json", "max-seq-len": 96} | more
    return ["train", *(w for name, value in settings.items() for w in (f"--{name}", str(value)))]


def test_packing_is_compared_in_two_runs_of_the_same_rows(place, tmp_path, capsys):
    output = tmp_path / "speed.json"
    main(flags(place, steps=6, **{"warmup-steps": 2}, output=output))
    said = json.loads(output.read_text())
    padded, packed = said["figures"]["padded"], said["figures"]["packed"]
    assert padded["ratio"] == 1
    assert packed["padding_share"] < padded["padding_share"] - 0.2
    for figure in (padded, packed):
        tokens, seconds = figure["supervised_tokens_per_second"], figure["median_step_seconds"]
        assert figure["ratio"] == tokens / padded["supervised_tokens_per_second"]
        assert tokens * seconds > 20  # learned tokens in a step
    assert {"date", "command", "device", "versions", "settings"} <= said.keys()
    assert "packed" in capsys.readouterr().out


def test_a_failing_run_is_shown_and_no_steps_are_refused(place, capsys):
    for more, message in (({"model": "nowhere"}, "nowhere"), ({"steps": 3}, "leaves nothing")):
        with pytest.raises(SystemExit) as ended:
            main(flags(place, **more))
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_random_models_are_the_same_for_the_same_seed(tmp_path):
    config = LlamaConfig(16, 1, 2, 2, 24, 64, tied=True, max_seq_len=32)
    one, again, other = (
        write_random(tmp_path / name, config, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert manifest_sha256(one) == manifest_sha256(again) != manifest_sha256(other)
    assert read_config(one) == config
    assert RANDOM["110m"].parameter_count == 109_529_856


def test_generation_is_compared_with_transformers_on_the_same_weights(place, tmp_path, capsys):
    output = tmp_path / "speed.json"
    main(
        ["generate", "--model", str(place / "model"), "--prompt-tokens", "5", "--new-tokens", "8",
         "--batch-size", "2", "--threads", "1", "--repeats", "2", "--peer", "transformers",
         "--output", str(output)]
    )  # fmt: skip
    said = json.loads(output.read_text())
    assert {"date", "command", "device", "load_average_before", "settings"} <= said.keys()
    found = said["models"][str(place / "model")]
    assert found["ids"] == {"equal": True}
    ours, theirs = found["figures"]["jllama"], found["figures"]["transformers"]
    bandwidth = 1e9 * max(x["measured_bandwidth_gb_per_second"] for x in (ours, theirs))
    for figure in (ours, theirs):
        first, rest = (statistics.median(x) for x in figure["repeats"].values())
        assert figure["seconds_to_first_token"] == first
        assert figure["prompt_tokens_per_second"] == pytest.approx(2 * 5 / first)
        assert figure["decode_tokens_per_second"] == pytest.approx(2 * 7 / rest)
        used = figure["weight_bytes_per_token"] * figure["decode_tokens_per_second"] / 2
        assert figure["fraction_of_bandwidth"] == pytest.approx(used / bandwidth)
        assert figure["peak_memory_mib"] > 50
    unread = 512 * 32  # the embeddings: a token reads one row
    assert ours["weight_bytes_per_token"] == 4 * (found["parameters"] - unread)
    assert theirs["weight_bytes_per_token"] == ours["weight_bytes_per_token"]
    assert theirs["cache"] in ("static", "dynamic")
    ratio = ours["decode_tokens_per_second"] / theirs["decode_tokens_per_second"]
    assert found["ratio"]["decode_tokens_per_second"] == ratio
    assert f"jllama decodes {ratio:.2f}x as fast" in capsys.readouterr().out


def test_generation_is_compared_with_llama_cpp_in_turns(tmp_path, capsys):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    output = tmp_path / "speed.json"
    main(
        ["generate", "--prompt-tokens", "5", "--new-tokens", "8", "--threads", "1", "--repeats",
         "1", "--rounds", "2", "--peer", "llama.cpp", "--output", str(output)]
    )  # fmt: skip
    (found,) = json.loads(output.read_text())["models"].values()
    assert found["ids"] == {"equal": True}
    ours, theirs = found["figures"]["jllama"], found["figures"]["llama.cpp"]
    for figure in (ours, theirs):
        assert len(figure["rounds"]) == 2
        name = "decode_tokens_per_second"
        assert figure[name] == statistics.median(x[name] for x in figure["rounds"])
    assert theirs["weight_bytes_per_token"] == pytest.approx(ours["weight_bytes_per_token"])
    assert theirs["says_decode_tokens_per_second"] > 0
    assert theirs["versions"]["xllamacpp"]
    ratio = ours["decode_tokens_per_second"] / theirs["decode_tokens_per_second"]
    assert found["ratio"]["decode_tokens_per_second"] == ratio
    assert "llama.cpp itself says" in capsys.readouterr().out


def test_llama_cpp_that_cannot_be_compared_with_is_refused(capsys, monkeypatch):
    arguments = ["generate", "--threads", "1", "--peer", "llama.cpp"]
    with pytest.raises(SystemExit):
        main([*arguments, "--batch-size", "2"])
    said = capsys.readouterr().err
    assert "one prompt at a time, not 2" in said or "pip install xllamacpp" in said
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "which is not installed: pip install xllamacpp" in capsys.readouterr().err


def test_the_first_different_id_is_named():
    assert compare_ids([[5, 6], [7, 8]], [[5, 6], [7, 8]]) == {"equal": True}
    assert compare_ids([[5, 6], [7, 8]], [[5, 6], [7, 9]]) == {
        "equal": False, "row": 1, "token": 1, "jllama": 8, "peer": 9
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--new-tokens", "1"], "--new-tokens 1, expected a whole number, at least 2"),
        (["--threads", "4096"], "--threads 4096, but this process may use"),
        (["--prompt-tokens", "4090"], "context 4096"),
        (["--model", "nowhere"], "nowhere: no config.json"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_what_cannot_be_measured_is_refused(place, capsys, flags, message):
    model = [] if "--model" in flags else ["--model", str(place / "model")]
    threads = [] if "--threads" in flags else ["--threads", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["generate", *model, *threads, *flags])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_training_beside_transformers_and_peft_begins_with_the_same_loss(tmp_path, capsys, place):
    output = tmp_path / "speed.json"
    main(["train", "--peer", "transformers-peft", "--model", str(place / "model"), "--steps", "4",
          "--warmup-steps", "1", "--max-seq-len", "24", "--micro-batch-size", "2", "--threads", "1",
          "--repeats", "1", "--output", str(output)])  # fmt: skip
    said = json.loads(output.read_text())
    ours, theirs = said["figures"]["jllama"], said["figures"]["transformers-peft"]
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-5)
    for side, figures in said["figures"].items():
        (turn,) = said["turns"][side]
        assert len(turn["seconds_of_each_step"]) == 3
        assert turn["losses"][-1] < turn["losses"][0]  # the same rows again and again
        median = statistics.median(turn["seconds_of_each_step"])
        assert figures["tokens_per_second"] == pytest.approx(2 * 24 / median)
        assert (
            said["ratio"]["peak_memory_mib"] == ours["peak_memory_mib"] / theirs["peak_memory_mib"]
        )
    assert f"{said['ratio']['tokens_per_second']:.2f}x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peer", "transformers-peft", "--compare", "remat"], "drop --compare and --data"),
        (["--random", "60m"], "--random is for a comparison with a --peer"),
        (["--peer", "transformers-peft", "--threads", "4096"], "but this process may use"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_flags_of_a_peer_are_not_mixed_with_others(capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        main(["train", *flags])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
