"""The train command as a user meets it: runs, resumes, kills, signals, and wrong input."""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from flax import nnx
from random_models import BASE, model_folder, with_a_nan
from train_runs import FACTS, Killed, adapter, after_step, as_flags, lines

from eval.prompts import main as answer
from jllama.config import tensor_shapes
from jllama.errors import InputError
from jllama.folders.json_files import read_json
from jllama.folders.load import load_model
from jllama.folders.manifest import read_manifest, tensor_sha256
from jllama.folders.model import read_block
from jllama.folders.model import read_config as read_model_config
from jllama.model import named_arrays
from train.config import TrainConfig, read_defaults
from train.lora import main, train
from train.run import signals
from train.run.folder import run_folder
from train.run.metrics import Metrics
from train.run.signals import StopSignal
from train.step import eval_step, train_step

pytestmark = pytest.mark.integration

PARAMS = BASE | {"n_kv_heads": 2, "n_layers": 1}
WORDS = ("red", "green", "blue", "seven", "eight", "a much longer answer than the others")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and thirty rows of uneven length."""
    root = tmp_path_factory.mktemp("place")
    model_folder(root, PARAMS)
    rows = [{"prompt": f"Say {WORDS[i % 6]} {i}.", "completion": WORDS[i % 6]} for i in range(30)]
    (root / "rows.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def forks():
    """Makes processes to kill, from one that has imported all: a second each instead of five."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.lora"])
    return context


def flags(place, output, **more):
    settings = {
        "model": place / "model", "data": place / "rows.json", "output_dir": output,
        "precision": "fp32", "max_seq_len": 64, "micro_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "epochs": 2, "val_size": 2,
        "lora_rank": 4,
    }  # fmt: skip
    return as_flags(settings | more)


def start(arguments, cwd, **more):
    root = str(Path(__file__).parents[1])  # this copy of the code, not the installed one
    environment = os.environ | {"PYTHONPATH": root}
    return subprocess.Popen(
        [sys.executable, "-m", "train.lora", *arguments], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more,
    )  # fmt: skip


def steps(run):
    return [line for line in lines(run) if "rows" in line]


def test_a_run_leaves_what_it_says(place, tmp_path, capsys):
    main(flags(place, tmp_path / "run"))
    said = capsys.readouterr().out
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        ".lock", "adapter", "best", "config.yaml", "metrics.jsonl", "run.json", "state",
        "tensorboard",
    }  # fmt: skip
    found = lines(run)
    losses = [line["epoch_loss"] for line in found if "epoch_loss" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    for epoch, loss in enumerate(losses, start=1):
        assert f"epoch {epoch}: average loss {loss:.4f}" in said
    assert [line["step"] for line in found if "eval_loss" in line] == [0, 7, 14]
    first = [line for line in steps(run) if line["step"] <= 7]
    average = sum(x["loss_sum"] for x in first) / sum(x["tokens"] for x in first)
    assert average == pytest.approx(losses[0])
    assert "2 sequences x 2 micro-batches = 4; 14 optimizer steps in 2 epochs" in said
    assert "row 0: " in said or "row 1: " in said
    assert "train 0/14 steps  compiling the step\n" in said
    assert re.search(r"compiled the step in \d+\.\d s\n", said)
    assert "⟦" in said  # lesson 11
    assert re.search(
        r"peak memory [1-9][\d,]* MiB for the whole Python process \(training step alone: "
        r"\d+ MiB planned\)", " ".join(said.split()),
    )  # lesson 15  # fmt: skip
    assert f"next: jllama prompts --run {run}" in said
    tensors = safetensors.numpy.load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(np.any(x) for name, x in tensors.items() if "lora_B" in name)
    for block in tensor_shapes(read_model_config(place / "model")):  # the base is untouched
        for name, tensor in read_block(place / "model", block).items():
            recorded = read_manifest(place / "model")["tensors"][name]["sha256"]
            assert tensor_sha256(tensor) == recorded
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["learning_rate"] == 1e-2
    assert len(read_json(run / "run.json")["data_sha256"]) == 64


def test_a_run_repeats_from_its_config_bit_by_bit(place, tmp_path, monkeypatch):
    main(flags(place, tmp_path / "a"))
    monkeypatch.chdir(tmp_path)
    main(["--config", "a/config.yaml"])  # from elsewhere, into a folder of its own
    assert (tmp_path / "runs" / "latest" / "adapter").is_dir()
    assert adapter(tmp_path / "a") == adapter(next((tmp_path / "runs").glob("model-*")))


@pytest.mark.parametrize("packing", [False, True])
def test_training_and_evaluation_are_compiled_once_each(place, tmp_path, packing):  # lesson 19
    train_step.clear_cache()
    eval_step.clear_cache()
    main(flags(place, tmp_path / "run", **{"packing": True} if packing else {}))
    assert [line["compilations"] for line in steps(tmp_path / "run")][-1] == 2


def test_each_length_bucket_is_compiled_once(place, tmp_path):
    train_step.clear_cache()
    eval_step.clear_cache()
    main(flags(place, tmp_path / "run", length_buckets=2))
    assert [line["compilations"] for line in steps(tmp_path / "run")][-1] == 2 + 1


@pytest.mark.as_stored
def test_full_tuning_leaves_a_model_folder(place, tmp_path, capsys):
    more = {"tune": "full", "learning_rate": 1e-3}
    main(flags(place, tmp_path / "run", **more))
    assert "(100.00 %)" in capsys.readouterr().out
    losses = [line["loss"] for line in steps(tmp_path / "run")]
    assert losses[-1] < losses[0]
    base, tuned = (load_model(x, "fp32") for x in (place / "model", tmp_path / "run" / "model"))
    assert base.config == tuned.config
    for name, x in named_arrays(nnx.state(tuned)).items():
        assert np.any(x != named_arrays(nnx.state(base))[name]), name
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": "Say red 0."}]))
    arguments = ["--run", str(tmp_path / "run"), "--prompts", str(prompts), "--temperature", "0"]
    answer(arguments)
    (line,) = (tmp_path / "run" / "generations.jsonl").read_text().splitlines()
    assert json.loads(line)["tuned_ids"] != json.loads(line)["base_ids"]
    with pytest.raises(SystemExit):
        main(["--resume", str(tmp_path / "run")])
    assert f"its result is in {tmp_path / 'run' / 'model'}" in capsys.readouterr().err


def test_full_tuning_refuses_what_only_adapters_have():
    with pytest.raises(InputError, match=r"tune full and lora_plus_ratio.*tune full and ffn_bias"):
        TrainConfig(tune="full", ffn_bias=True, lora_plus_ratio=2.0)


def test_held_out_loss_is_weighted_by_tokens_whatever_the_batch(place, tmp_path):  # lesson 17
    found = []
    for batch in (1, 6):
        run = tmp_path / str(batch)
        main(flags(place, run, micro_batch_size=batch, max_steps=1, val_size=6))
        found += [line for line in lines(run) if line.get("eval_tokens")][:1]
    assert [line["step"] for line in found] == [0, 0]
    assert found[0]["eval_tokens"] == found[1]["eval_tokens"]
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-6)


def test_patience_ends_a_run_and_the_best_adapter_is_kept(place, tmp_path, capsys):  # lesson 17
    more = {"learning_rate": 0.3, "epochs": 20, "eval_steps": 2, "patience": 3, "val_size": 6}
    main(flags(place, tmp_path / "run", **more))
    losses = [line["eval_loss"] for line in lines(tmp_path / "run") if "eval_loss" in line]
    assert len(losses) - 1 - losses.index(min(losses)) == 3
    said = capsys.readouterr().out
    assert "no better for 3 evaluations" in said
    assert f"best/ (held-out loss {min(losses):.4f})" in said
    assert (tmp_path / "run" / "best" / "adapter_model.safetensors").read_bytes() != adapter(
        tmp_path / "run"
    )


def test_peak_memory_is_the_processs_own_and_not_its_parents():
    parent = (
        "import subprocess, sys; import numpy as np; held = np.ones(200_000_000);"
        "child = 'from jllama.machine import peak_memory_mib as p; print(p())';"
        "sys.exit(subprocess.run([sys.executable, '-c', child]).returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=True
    )
    assert 50 < float(done.stdout) < 1200  # MiB; the parent held 1,526


def record(run):
    """All that two equal runs have in common, to the bit."""
    found = lines(run)
    names = ("step", "rows", "loss_sum", "tokens", "grad_norm", "eval_loss", "epoch_loss")
    figures = [{name: line[name] for name in names if name in line} for line in found]
    return {"adapter": adapter(run), "figures": figures} | state_bytes(run)


def test_resumed_runs_equal_the_whole_one_bit_by_bit(place, tmp_path, monkeypatch):  # lesson 14
    more = {"save_steps": 1, "lora_dropout": 0.2}
    main(flags(place, tmp_path / "whole", **more))
    total = len(steps(tmp_path / "whole"))
    for number, cut in enumerate((1, 3, total // 2 + 1, total - 1)):  # 1: before any save
        again = ["--resume", str(tmp_path / "cut")]
        after_step(monkeypatch, cut)
        with pytest.raises(Killed):
            main(again if number else flags(place, tmp_path / "cut", **more))
        monkeypatch.undo()
    main(["--resume", str(tmp_path / "cut")])
    assert record(tmp_path / "whole") == record(tmp_path / "cut")


def test_100_steps_are_50_and_50_are_10_times_10_bit_by_bit(place, tmp_path, monkeypatch, capsys):
    """Reliability 2: packed, with dropout, accumulation, epochs' ends and evaluations between."""
    more = {
        "max_steps": 100, "epochs": 40, "save_steps": 10, "eval_steps": 15, "packing": True,
        "lora_dropout": 0.2, "micro_batch_size": 1,
    }  # fmt: skip
    main(flags(place, tmp_path / "whole", **more))
    whole = record(tmp_path / "whole")
    assert [line["step"] for line in steps(tmp_path / "whole")] == list(range(1, 101))
    ends = {line["step"] for line in lines(tmp_path / "whole") if "epoch_loss" in line}
    assert len(ends - {*range(0, 101, 10)}) > 5  # most epochs end inside a part
    for part in (50, 10):
        run = tmp_path / str(part)
        arguments = flags(place, run, **more)
        for cut in range(part, 100, part):
            after_step(monkeypatch, cut + 1)  # the state after step `cut` is the newest
            with pytest.raises(Killed):
                main(arguments)
            monkeypatch.undo()
            arguments = ["--resume", str(run)]
            assert max(int(path.name) for path in (run / "state").iterdir()) == cut
        capsys.readouterr()
        main(arguments)
        assert f"resumed after step {cut}\n" in capsys.readouterr().out
        assert record(run) == whole


def state_bytes(run):
    """Adapters, moments, accumulator and step of the newest state."""
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager((run / "state").absolute())
    how = ocp.args.Composite(arrays=ocp.args.PyTreeRestore())
    stored = manager.restore(manager.latest_step(), args=how)
    manager.close()
    return {name: np.asarray(x).tobytes() for name, x in stored.arrays.items()}


def kill_and_resume(forks, place, tmp_path, kills):
    """Kills a run that saves every step `kills` times, each time further on, then finishes it.

    Every second kill waits for a half-written state. Returns how many kills left one behind.
    """
    main(flags(place, tmp_path / "whole", epochs=kills))
    run, draw, left_half = tmp_path / "run", random.Random(0), 0
    half = "state/*.orbax-checkpoint-tmp*"
    for number in range(kills):
        arguments = (
            ["--resume", str(run)] if number else flags(place, run, epochs=kills, save_steps=1)
        )
        further = len(steps(run)) + draw.randint(1, 3)
        process = forks.Process(target=main, args=(arguments,))
        process.start()
        while process.is_alive() and len(steps(run)) < further:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.05)
        while number % 2 and process.is_alive() and not any(run.glob(half)):
            pass
        process.kill()
        process.join()
        # Neither finished nor failed: it was killed while it trained.
        assert process.exitcode == -signal.SIGKILL
        assert not (run / "adapter").exists()
        assert further <= len(steps(run)) < len(steps(tmp_path / "whole"))
        left_half += any(run.glob(half))
    main(["--resume", str(run)])
    assert record(run) == record(tmp_path / "whole")
    return left_half


def test_sigkill_while_saving_leaves_a_run_that_resumes_bit_equal(forks, place, tmp_path):
    """Reliability 1."""
    assert kill_and_resume(forks, place, tmp_path, kills=10) >= 3


@pytest.mark.slow
def test_two_hundred_sigkills_leave_no_unusable_run(forks, place, tmp_path):
    left_half = 0
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        left_half += kill_and_resume(forks, place, folder, kills=20)
    assert left_half >= 60


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_answered_within_a_step(number, monkeypatch):
    """Python's own handlers wait for the end of such a call, as of a compiled step."""
    answered = []
    monkeypatch.setattr(signals.console, "print", lambda words: answered.append(words))
    before = signal.getsignal(number)
    with StopSignal() as stop:
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_500_000)  # about a second of C without the GIL
        assert answered == [
            f"{signal.Signals(number).name}: stopping after this step; again to abort"
        ]
    assert stop.number == number
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_clock_that_jumps_changes_nothing(place, tmp_path, monkeypatch):
    more = {"epochs": 1, "save_steps": 1}
    main(flags(place, tmp_path / "steady", **more))
    now, calls = time.time, itertools.count()

    def jumping():
        """Where Orbax waits for a save to end, which it does by this clock."""
        waits = sys._getframe(1).f_code.co_filename.endswith(
            "orbax/checkpoint/_src/futures/future.py"
        )
        return now() + (3600 * next(calls) if waits else 0)

    monkeypatch.setattr(time, "time", jumping)
    main(flags(place, tmp_path / "jumps", **more))
    assert next(calls) > 10
    assert adapter(tmp_path / "jumps") == adapter(tmp_path / "steady")
    assert [x["loss"] for x in steps(tmp_path / "jumps")] == [
        x["loss"] for x in steps(tmp_path / "steady")
    ]
    assert all(x["step_seconds"] > 0 for x in steps(tmp_path / "jumps"))


def test_a_second_signal_ends_the_process_at_once(place, tmp_path):  # reliability 3
    more = {"epochs": 9, "val_size": 0, "gradient_accumulation_steps": 2000}  # seconds a step
    process = start(flags(place, tmp_path / "run", **more), tmp_path)
    while process.poll() is None and not (tmp_path / "run" / "state" / "1").exists():
        time.sleep(0.02)
    time.sleep(0.3)  # into the second step
    process.send_signal(signal.SIGTERM)
    said = next(line for line in process.stdout if "again to abort" in line)
    assert said == "SIGTERM: stopping after this step; again to abort\n"
    assert process.poll() is None  # the first signal waits for the step
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130  # not the loop's own exit code 143
    assert "stopped after" not in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_resume(place, tmp_path, number, code):  # reliability 3
    more = {"epochs": 200}
    process = start(flags(place, tmp_path / "run", **more), tmp_path)
    while process.poll() is None and len(steps(tmp_path / "run")) < 3:
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code, said
    assert f"continue with: jllama train --resume {tmp_path / 'run'}" in said
    assert "Traceback" not in said
    stopped = int(said.split("stopped after step ")[1].split(";")[0])
    assert (tmp_path / "run" / "state" / str(stopped)).is_dir()


def test_a_second_process_is_refused_and_told_who_holds_the_run(place, tmp_path):  # reliability 6
    config = TrainConfig(str(place / "model"), str(place / "rows.json"), str(tmp_path / "run"))
    with run_folder(config, FACTS) as run:
        process = start(["--resume", str(run.path)], tmp_path)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 2
        assert f"is in use by process {os.getpid()}" in said
    (tmp_path / "run" / ".lock").write_text("12345 on a machine that crashed")
    with run_folder(TrainConfig(**vars(config) | {"resume": str(run.path)}), FACTS):
        pass


def test_a_full_disk_keeps_the_last_state_and_exits_with_a_message(place, tmp_path):
    """Reliability 4, by a limit on the size of a file."""
    process = start(flags(place, tmp_path / "run", lora_rank=32), tmp_path)
    # Room for the lines of metrics.jsonl, not for 57 KB of adapters, moments and accumulator.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    said = process.communicate(timeout=120)[0]
    assert process.returncode not in (0, None)
    assert "a state could not be written" in said
    assert "File too large" in said
    assert process.returncode == 2
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.as_stored
def test_a_nan_ends_the_run_and_leaves_the_state_before_it(place, tmp_path, capsys):
    """Reliability 7, lesson 23: the embedding of `~` is NaN, and only the last rows hold one."""
    with_a_nan(place / "model", tmp_path / "model")
    rows = json.loads((place / "rows.json").read_text())
    bad = [*rows[:12], *({"prompt": "~", "completion": "x"} for _ in rows)]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    more = {
        "model": tmp_path / "model", "val_size": 0, "no-shuffle": True, "save_steps": 1,
        "lr_scheduler": "constant", "warmup_ratio": 0,
    }  # fmt: skip
    main(flags(place, tmp_path / "good", max_steps=3, **more))

    run, message = tmp_path / "run", "no finite gradient in steps 4 to 8 (rows [28, 29, 30, 31])"
    for arguments in (flags(place, run, data=tmp_path / "bad.json", **more), ["--resume", run]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in arguments])
        said = capsys.readouterr()
        assert ended.value.code == 2
        assert f"{message}; the state before them is kept" in said.err
        lines = steps(run)
        assert [line["skipped"] for line in lines] == [False] * 3 + [True] * 5
        assert lines[3]["loss"] is None
        assert {path.name for path in (run / "state").iterdir()} == {"2", "3"}
        assert state_bytes(run) == state_bytes(tmp_path / "good")
    assert "resumed after step 3\n" in said.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "nowhere: no config.json here; expected a model folder"),
        ({"data": "nowhere.json"}, "nowhere.json: no such file"),
        ({"epochs": 0}, "--epochs 0, expected a whole number, at least 1"),
        ({"lora_targets": "wq,wx"}, "--lora-targets wq,wx, expected some of wq, wk"),
        ({"lora_dropout": 1.5}, "--lora-dropout 1.5, expected a number, at least 0 and below 1"),
        ({"init_adapter": "nowhere"}, "nowhere/adapter_config.json: no such file"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ({"val_size": 99}, "holds out all 30 rows"),
    ],
)
def test_wrong_arguments_end_in_one_message_and_code_2(place, tmp_path, capsys, change, message):
    with pytest.raises(SystemExit) as ended:
        main(flags(place, tmp_path / "run", **change))
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert message in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "run").exists()


GOOD = {"prompt": "Say red.", "completion": "red"}
LONG = {"prompt": "x" * 99, "completion": "never reached"}
BAD_ROWS = [GOOD, {"texts": "?"}, {"prompt": "a", "completion": " "}, LONG, GOOD]


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("[\n  {\n]", ["row 0 (line 2): invalid JSON"]),
        (
            '{"prompt": "a"}\n{"prompt"\n{}\n{bad\n',
            ["row 1 (line 2): invalid JSON"],
        ),
        ("", ["empty; expected rows: a JSON list, or one JSON object a line"]),
        (b'[{"prompt": "\xff"}]', ["byte 13 is not UTF-8"]),
        (
            json.dumps(BAD_ROWS),
            [
                "3 unusable of 5 rows",
                "--skip-bad-rows 3",
                "row 1: columns 'texts'",
                "row 2: the answer is empty",
                "row 3: its prompt fills all 64 tokens",
            ],
        ),
    ],
)
def test_bad_data_ends_in_one_message_that_lists_all(place, tmp_path, capsys, content, messages):
    """Reliability 8."""
    data = tmp_path / "rows.json"
    data.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as ended:
        main(flags(place, tmp_path / "run", data=data, skip_bad_rows=2))
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"jllama train: {data}: ")
    for message in messages:
        assert message in said
    assert not (tmp_path / "run").exists()


def test_tolerated_rows_are_named_and_not_trained_on(place, tmp_path, capsys):
    """Reliability 8, lesson 10: rows that teach nothing, and one that loses its end."""
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([*BAD_ROWS, {"prompt": "Count.", "completion": "1 2 " * 99}]))
    main(flags(place, tmp_path / "run", data=data, skip_bad_rows=3, val_size=0))
    said = capsys.readouterr().out
    for row, reason in (
        (1, "columns 'texts'"),
        (2, "the answer is empty"),
        (3, "its prompt fills"),
    ):
        assert f"left out: row {row}: {reason}" in said
    assert "1 rows are longer than 64 tokens and lose their end" in said
    assert [sorted(line["rows"]) for line in steps(tmp_path / "run")] == [[0, 4, 5]] * 2


def test_a_run_is_never_overwritten(place, tmp_path):
    main(flags(place, tmp_path / "run"))
    before = adapter(tmp_path / "run")
    for arguments in (flags(place, tmp_path / "run"), ["--resume", str(tmp_path / "run")]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert adapter(tmp_path / "run") == before


def test_changed_data_is_refused_at_resume(place, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text((place / "rows.json").read_text())
    after_step(monkeypatch, 2)
    with pytest.raises(Killed):
        main(flags(place, tmp_path / "run", data=rows, save_steps=1))
    rows.write_text(rows.read_text().replace("red", "pink"))
    with pytest.raises(SystemExit):
        main(["--resume", str(tmp_path / "run")])
    assert "data_sha256 differ from run.json" in capsys.readouterr().err


def test_a_damaged_state_is_passed_over_for_the_one_before_it(
    place, tmp_path, monkeypatch, capsys
):  # lesson 24
    more = {"save_steps": 1}
    main(flags(place, tmp_path / "whole", **more))
    after_step(monkeypatch, 9)
    with pytest.raises(Killed):
        main(flags(place, tmp_path / "run", **more))
    monkeypatch.undo()
    newest = max((tmp_path / "run" / "state").iterdir(), key=lambda path: int(path.name))
    for file in newest.glob("arrays/**/d/*"):  # Orbax keeps some bytes twice
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 16
        file.write_bytes(content)
    capsys.readouterr()
    main(["--resume", str(tmp_path / "run")])
    assert f"{newest.name} is damaged; trying the state before it" in capsys.readouterr().out
    assert adapter(tmp_path / "whole") == adapter(tmp_path / "run")


def test_a_state_whose_hash_differs_is_not_trusted(place, tmp_path, capsys):
    main(flags(place, tmp_path / "run", save_steps=1))
    shutil.rmtree(tmp_path / "run" / "adapter")
    certificate = tmp_path / "run" / "state" / "14" / "sha256" / "metadata"
    hashes = json.loads(certificate.read_text())
    certificate.write_text(json.dumps(hashes | {next(iter(hashes)): "0" * 64}))
    capsys.readouterr()
    main(["--resume", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "14 is damaged; trying the state before it" in said
    assert "resumed after step 13" in said


def test_a_run_killed_before_its_adapter_was_written_is_finished_by_resume(place, tmp_path):
    main(flags(place, tmp_path / "run"))
    written = adapter(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    main(["--resume", str(tmp_path / "run")])
    assert adapter(tmp_path / "run") == written


def test_a_run_that_cannot_load_its_model_leaves_no_folder(place, tmp_path, capsys):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "blocks" / "head.safetensors").unlink()
    with pytest.raises(SystemExit) as ended:
        main(flags(place, tmp_path / "run", model=tmp_path / "model"))
    assert ended.value.code == 2
    assert "head.safetensors: block missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_sample_has_its_recipe_however_it_is_named():
    for words in ([], ["--model", "models/sample"], ["--model=models/sample"]):
        defaults, _ = read_defaults(words)
        assert defaults is not None
        assert (defaults.epochs, defaults.packing) == (8, True)
    assert read_defaults(["--model", "other"])[0] is None


def test_yaml_numbers_are_read_as_the_fields_types(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 5e-5\nlora_alpha: 8\n")
    defaults, _ = read_defaults(["--config", str(tmp_path / "a.yaml")])
    assert defaults is not None
    assert (defaults.learning_rate, defaults.lora_alpha) == (5e-5, 8.0)
    (tmp_path / "b.yaml").write_text("epochs: three\npacking: 1\n")
    with pytest.raises(
        InputError, match="packing 1, expected true or false; epochs three, expected a"
    ):
        read_defaults(["--config", str(tmp_path / "b.yaml")])


def test_resume_takes_no_other_flags():
    with pytest.raises(InputError, match=r"drop --seed 3\. Beside it go only --model, --data"):
        read_defaults(["--resume", "latest", "--epochs", "3", "--seed", "3"])


def test_flags_override_a_recipe_and_unknown_fields_are_refused(tmp_path):
    recipe = Path(__file__).parents[1] / "train" / "recipes" / "report.yaml"
    defaults, rest = read_defaults(["--config", str(recipe), "--epochs", "1"])
    assert defaults is not None
    assert (defaults.ffn_bias, defaults.gradient_accumulation_steps, rest) == (
        True, 8, ["--epochs", "1"],
    )  # fmt: skip
    (tmp_path / "bad.yaml").write_text("epoch: 3\n")
    with pytest.raises(InputError, match=r"epoch is no such field; did you mean epochs\?"):
        read_defaults([f"--config={tmp_path / 'bad.yaml'}"])


def test_report_recipe_prints_the_reports_counts_from_shapes_alone(tmp_path):
    recipe = Path(__file__).parents[1] / "train" / "recipes" / "report.yaml"
    arguments = ["--config", str(recipe), "--model", "llama-2-7b", "--dry-run"]
    peak = "import sys; from train.lora import main; main(sys.argv[1:]);"
    peak += "print(open('/proc/self/status').read())"
    done = subprocess.run(
        [sys.executable, "-c", peak, *arguments], capture_output=True, text=True, check=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert "8,388,608 trainable of 6,747,639,808 (0.12 %)" in done.stdout
    assert "8,388,608 trainable of 6,746,804,224" in done.stdout
    assert int(done.stdout.split("VmHWM:")[1].split()[0]) < 1e6  # KiB at the peak
    assert not list(tmp_path.iterdir())


@pytest.mark.real
def test_stories_learns_from_alpaca_and_keeps_its_base(assets, tmp_path):
    from convert.from_meta import FromMeta, convert

    convert(FromMeta(assets / "stories260K-meta", tmp_path / "model"))
    config = TrainConfig(
        model=str(tmp_path / "model"),
        data=str(assets / "alpaca" / "alpaca_data_200.json"),
        output_dir=str(tmp_path / "run"),
        precision="fp32",
        max_seq_len=192,
        skip_bad_rows=5,
        learning_rate=1e-3,
        epochs=5,
        packing=True,
        remat="none",
    )
    train(config)
    losses = [line["epoch_loss"] for line in lines(tmp_path / "run") if "epoch_loss" in line]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    tensors = safetensors.numpy.load_file(
        tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    )
    assert all(np.any(x) for name, x in tensors.items() if "lora_B" in name)


@pytest.mark.slow
def test_ten_thousand_steps_keep_memory_descriptors_and_buffers_flat(place, tmp_path, monkeypatch):
    """Reliability 12."""
    samples = []
    record = Metrics.step

    def sample(self, step, *args, **more):
        if step % 1000 == 250:  # half-way between two saves
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
            descriptors = len(list(Path("/proc/self/fd").iterdir()))
            samples.append((resident, descriptors, len(jax.live_arrays())))
        return record(self, step, *args, **more)

    monkeypatch.setattr(Metrics, "step", sample)
    more = {"epochs": 2000, "max_steps": 10_000, "learning_rate": 1e-4, "save_steps": 500}
    main(flags(place, tmp_path / "run", **more))
    assert len(samples) == 10
    early, late = samples[2], samples[-1]
    assert late[0] - early[0] < 30e6, samples
    # Orbax's threads hold a few more now and then; a leak of 20 saves would lift the least of them.
    descriptors = [sample[1] for sample in samples]
    assert min(descriptors[5:]) <= max(descriptors[:5]), samples
    assert late[2] <= early[2]
