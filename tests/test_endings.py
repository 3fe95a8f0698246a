"""Every way a run begins and ends, crossed with a kill there: nothing is lost, nothing is false."""

import contextlib
import json
import os
import shutil
import signal
import threading

import numpy as np
import pytest
import safetensors.numpy
from random_models import BASE, model_folder, with_a_nan
from train_runs import FACTS, Killed, adapter, after_step, as_flags, lines, recorded

import train.loop
import train.run.folder
from jllama.errors import InputError
from jllama.folders.json_files import as_line, read_json_lines
from jllama.folders.manifest import write_sealed
from jllama.folders.run import RunFolder
from train.config import TrainConfig
from train.lora import main
from train.run.folder import check_folder, run_folder
from train.run.state import Checkpoints

pytestmark = pytest.mark.integration

PARAMS = BASE | {"n_kv_heads": 2, "n_layers": 1}
WORDS = ("red", "green", "blue", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and sixteen rows."""
    root = tmp_path_factory.mktemp("place")
    model_folder(root, PARAMS)
    rows = [{"prompt": f"Say {WORDS[i % 6]} {i}.", "completion": WORDS[i % 6]} for i in range(16)]
    (root / "rows.json").write_text(json.dumps(rows))
    return root


def flags(place, output, **more):
    settings = {
        "model": place / "model", "data": place / "rows.json", "output_dir": output,
        "precision": "fp32", "max_seq_len": 32, "micro_batch_size": 4,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "epochs": 2, "lora_rank": 2,
        "lr_scheduler": "constant", "warmup_ratio": 0, "remat": "none",
    }  # fmt: skip
    return as_flags(settings | more)


def history(run):
    names = ("step", "rows", "loss_sum", "eval_loss", "epoch_loss", "learning_rate", "skipped")
    return [{name: line[name] for name in names if name in line} for line in lines(run)]


def ended(arguments, capsys):
    """The exit code of a command that fails, and what it said."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in arguments])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return end.value.code, said.out + said.err


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A run of two epochs of three steps, two of them warm-up."""
    run = tmp_path_factory.mktemp("runs") / "run"
    main(flags(place, run, val_size=4, warmup_ratio=0.4))
    return run


PATIENCE = {"learning_rate": 0.3, "epochs": 30, "eval_steps": 2, "patience": 3, "val_size": 4}
ENDINGS = {"last step": {}, "max steps": {"max_steps": 5}, "patience": PATIENCE}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_killed_at_its_end_resumes_to_the_same_bytes(
    place, tmp_path, monkeypatch, ending
):  # reliability 13
    whole = tmp_path / "whole"
    main(flags(place, whole, **ENDINGS[ending]))
    last = lines(whole)[-1]["step"]
    assert max(int(state.name) for state in (whole / "state").iterdir()) == last
    for moment in ("before the result", "before the last save"):
        run = tmp_path / moment
        shutil.copytree(whole, run)
        shutil.rmtree(run / "adapter")
        if moment == "before the last save":
            shutil.rmtree(run / "state" / str(last))
        main(["--resume", str(run)])
        assert history(run) == history(whole)
        assert adapter(run) == adapter(whole)
    after_step(monkeypatch, last, lambda: os.kill(os.getpid(), signal.SIGTERM))
    main(flags(place, tmp_path / "stopped", **ENDINGS[ending]))  # has nothing left but to end
    assert adapter(tmp_path / "stopped") == adapter(whole)


def test_a_run_stopped_before_its_end_says_so_and_resumes(place, tmp_path, monkeypatch, capsys):
    main(flags(place, tmp_path / "whole", **PATIENCE))
    last = lines(tmp_path / "whole")[-1]["step"]
    after_step(monkeypatch, last - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, said = ended(flags(place, tmp_path / "run", **PATIENCE), capsys)
    monkeypatch.undo()
    assert code == 143
    assert f"continue with: jllama train --resume {tmp_path / 'run'}" in said
    main(["--resume", str(tmp_path / "run")])
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_a_damaged_newest_state_is_removed_and_saved_anew(place, tmp_path, capsys):
    """Reliability 14."""
    run = tmp_path / "run"
    main(flags(place, run, save_steps=1))
    whole = adapter(run)
    shutil.rmtree(run / "adapter")
    for file in (run / "state" / "8").glob("arrays/**/d/*"):
        file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    capsys.readouterr()
    main(["--resume", str(run)])
    assert "8 is damaged; trying the state before it" in capsys.readouterr().out
    assert adapter(run) == whole
    shutil.rmtree(run / "adapter")
    main(["--resume", str(run)])
    assert "resumed after step 8\n" in capsys.readouterr().out  # it is whole again


def test_a_save_that_writes_nothing_is_an_error(place, tmp_path, monkeypatch, capsys):
    save = Checkpoints.save

    def twice(self, state):
        save(self, state)
        self._manager.wait_until_finished()
        save(self, state)

    monkeypatch.setattr(Checkpoints, "save", twice)
    code, said = ended(flags(place, tmp_path / "run"), capsys)
    assert code == 2
    assert "no state of step 4 could be saved" in said


def config(place, **more):
    return TrainConfig(model=str(place / "model"), data=str(place / "rows.json"), **more)


def begun(config):
    """The folder of a run that ends before its first step."""
    with run_folder(config, FACTS) as run, recorded(run):
        return run


def test_a_disk_that_fills_during_a_save_ends_the_run_with_one_message(
    place, tmp_path, monkeypatch, capsys
):
    make = os.mkdir

    def full(path, *args, **more):
        if "sha256.orbax" in str(path):
            raise OSError(28, "No space left on device", str(path))
        make(path, *args, **more)

    monkeypatch.setattr(os, "mkdir", full)
    code, said = ended(flags(place, tmp_path / "run", max_steps=1), capsys)
    assert code == 2
    assert "a state could not be written ([Errno 28] No space left on device" in said
    assert "ERROR" not in said
    waiting = [
        x for x in threading.enumerate() if not x.daemon and x is not threading.main_thread()
    ]
    assert not [thread for thread in waiting if "Signaling" in type(thread).__name__]


@pytest.mark.parametrize("moment", ["write_config", "write_sealed", "_link_latest"])
@pytest.mark.parametrize("end", [Killed, OSError(28, "No space left on device")])
def test_a_run_killed_in_its_first_moments_is_begun_again_by_the_same_command(
    place, tmp_path, monkeypatch, moment, end
):
    monkeypatch.chdir(tmp_path)
    folder = "" if moment == "_link_latest" else "run"  # a link is made of runs in runs/

    def ends(*_):
        raise end

    monkeypatch.setattr(train.run.folder, moment, ends)
    with pytest.raises((Killed, OSError)):
        begun(config(place, output_dir=folder))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run = begun(config(place, output_dir=folder, max_steps=1))
    assert run.read_settings()["max_steps"] == 1


def test_what_a_disk_kept_of_the_first_files_is_no_obstacle(place, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").write_bytes(b"\xff on a machine")
    (run / "config.yaml.new").write_text("model: /tmp/mod")
    assert begun(config(place, output_dir=str(run))).read_settings()["model"]
    assert not list(run.glob("*.new"))


@pytest.mark.parametrize(
    "keep", [{"state", "config.yaml", "run.json"}, {"metrics.jsonl"}, {"best"}, {"my thesis"}]
)
def test_a_folder_with_anything_else_is_not_begun_in(place, finished, tmp_path, capsys, keep):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "my thesis").write_text("...")
    for entry in run.iterdir():
        if entry.name not in keep:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    before = sorted(run.rglob("*"))
    code, said = ended(flags(place, run), capsys)
    assert (code, sorted(run.rglob("*"))) == (2, before)
    assert f"{run} exists; choose another --output-dir" in said


def test_latest_that_is_a_folder_is_left_alone(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "latest").mkdir(parents=True)
    (tmp_path / "runs" / "latest" / "mine").write_text("")
    (tmp_path / "runs" / f".latest-{os.getpid()}").symlink_to("gone")  # of an earlier container
    made = {begun(config(place)).path for _ in range(3)}  # of one process, in one second
    assert len(made) == 3
    assert "runs/latest is a folder and no link; this run is runs/model-" in capsys.readouterr().out
    assert (tmp_path / "runs" / "latest" / "mine").exists()
    shutil.rmtree(tmp_path / "runs" / "latest")
    last = begun(config(place)).path
    assert (tmp_path / "runs" / "latest").resolve() == last.resolve()


# Values that are not finite


def test_rows_without_a_finite_gradient_at_the_end_leave_what_was_learned_before(
    place, tmp_path, capsys
):
    rows = json.loads((place / "rows.json").read_text())
    bad = [*rows[:8], *({"prompt": "~", "completion": "x"} for _ in range(8))]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    more = {
        "model": with_a_nan(place / "model", tmp_path / "model"),
        "no_shuffle": True,
        "epochs": 1,
    }
    main(flags(place, tmp_path / "good", max_steps=2, **more))
    capsys.readouterr()
    main(flags(place, tmp_path / "run", data=tmp_path / "bad.json", **more))
    said = capsys.readouterr().out
    assert "the last 2 steps had no finite gradient and changed nothing" in said
    assert "what was learned up to step 2" in said
    assert adapter(tmp_path / "run") == adapter(tmp_path / "good")


def diverge_after(monkeypatch, step):
    """From this step on the weights that learn are finite but too large for any finite loss."""
    fit = train.loop.Programs.__call__

    def call(self, state, *rest):
        state, measured = fit(self, state, *rest)
        if int(state.step) == step + 1:
            import jax

            learned = jax.tree.map(lambda x: x * 0 + 1e30, state.learned)
            state = state._replace(learned=learned)
        return state, measured

    monkeypatch.setattr(train.loop.Programs, "__call__", call)


def test_a_run_that_diverges_in_its_last_steps_leaves_the_last_finite_state(
    place, tmp_path, monkeypatch, capsys
):
    more = {"save_steps": 1, "save_total_limit": 9, "epochs": 1}
    main(flags(place, tmp_path / "good", **(more | {"max_steps": 2})))
    diverge_after(monkeypatch, 2)  # step 3 makes them so, and is saved; step 4 is skipped
    capsys.readouterr()
    main(flags(place, tmp_path / "run", **more))
    said = capsys.readouterr().out
    assert "the last 1 steps had no finite gradient" in said
    assert "what was learned up to step 2" in said
    assert adapter(tmp_path / "run") == adapter(tmp_path / "good")


def test_a_run_without_any_finite_state_writes_no_result(place, tmp_path, monkeypatch, capsys):
    diverge_after(monkeypatch, 2)
    code, said = ended(flags(place, tmp_path / "run", epochs=1), capsys)
    assert code == 2
    assert "no saved state has a finite loss" in said
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    "rates",
    [{"learning_rate": 1e30}, {"learning_rate": 1e38}],
)
def test_rates_that_overflow_never_write_a_result(place, tmp_path, capsys, rates):
    code, said = ended(flags(place, tmp_path / "run", **rates), capsys)
    assert code == 2
    assert "no finite gradient" in said or "moved nothing" in said or "finite loss" in said
    for file in (tmp_path / "run").rglob("adapter_model.safetensors"):
        arrays = safetensors.numpy.load_file(file)
        assert all(np.isfinite(array).all() for array in arrays.values())


def test_the_logged_learning_rate_after_a_skipped_step_is_the_one_applied(place, tmp_path):
    rows = json.loads((place / "rows.json").read_text())
    bad = [*rows[:4], *({"prompt": "~", "completion": "x"} for _ in range(4)), *rows[:8]]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    model = with_a_nan(place / "model", tmp_path / "model")
    main(flags(place, tmp_path / "run", model=model, data=tmp_path / "bad.json", epochs=1,
               no_shuffle=True, lr_scheduler="linear"))  # fmt: skip
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [line["skipped"] for line in steps] == [False, True, False, False]
    assert [line["learning_rate"] for line in steps] == pytest.approx([1e-2, 7.5e-3, 7.5e-3, 5e-3])


def test_a_held_out_loss_that_is_not_finite_is_null_and_never_the_best(place, tmp_path, capsys):
    run = RunFolder(tmp_path)
    with recorded(run) as metrics:
        assert [
            metrics.evaluation(step, loss, 3)
            for step, loss in enumerate((np.nan, np.inf, 2.0, np.nan, 3.0))
        ] == [False, False, True, False, False]
    assert metrics.evaluations_since_best == 2
    assert [line["eval_loss"] for line in run.read_metrics().values] == [None, None, 2, None, 3]
    with recorded(run):
        pass


# Moved files, more epochs


def test_a_run_whose_files_moved_is_resumed_where_they_are(
    place, finished, tmp_path, monkeypatch, capsys
):
    old, new, run = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    shutil.copytree(place, old)
    shutil.copytree(finished / "adapter", old / "initial")
    monkeypatch.chdir(old)
    after_step(monkeypatch, 5)
    with pytest.raises(Killed):
        main(flags(old, run, init_adapter="initial"))
    monkeypatch.undo()
    old.rename(new)
    assert ended(["--resume", run], capsys)[0] == 2
    monkeypatch.chdir(new)
    main(
        ["--resume", str(run), "--model", "model", "--data=rows.json", "--init-adapter", "initial"]
    )
    shutil.rmtree(run / "adapter")
    monkeypatch.chdir(tmp_path)
    main(["--resume", "run"])  # which remembers where they are
    assert RunFolder(run).read_settings()["data"] == str(new / "rows.json")
    main(flags(place, tmp_path / "whole", init_adapter=new / "initial"))
    assert adapter(run) == adapter(tmp_path / "whole")


def test_other_files_in_place_of_moved_ones_are_refused(place, finished, tmp_path):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    first, other = tmp_path / "first", tmp_path / "other"
    shutil.copytree(finished / "adapter", first)
    shutil.copytree(finished / "adapter", other)
    (other / "adapter_model.safetensors").write_bytes(b"other weights")
    (tmp_path / "other.json").write_text((place / "rows.json").read_text() + "\n")
    model_folder(tmp_path, PARAMS, name="other model", seed=1)
    run = begun(config(place, output_dir=str(tmp_path / "run"), init_adapter=str(first)))
    for name, file in (("data", "other.json"), ("model", "other model"), ("init_adapter", "other")):
        settings = run.read_settings() | {name: str(tmp_path / file)}
        with pytest.raises(InputError, match=r"was trained on other files: .*_sha256 differ"):
            check_folder(TrainConfig(**settings | {"resume": str(run.path)}))


def test_more_epochs_continue_a_finished_run_to_the_bytes_of_a_longer_one(
    place, tmp_path, monkeypatch
):
    more = {"val_size": 4, "lora_dropout": 0.1}
    run = tmp_path / "run"
    main(flags(place, run, **more))
    first = adapter(run)
    after_step(monkeypatch, 8)
    with pytest.raises(Killed):
        main(["--resume", str(run), "--epochs", "3"])
    monkeypatch.undo()
    assert adapter(run) == first  # until there is a better one
    main(["--resume", str(run)])  # which remembers how many
    main(flags(place, tmp_path / "three", **more, epochs=3))
    assert history(run) == history(tmp_path / "three")
    assert adapter(run) == adapter(tmp_path / "three")


def test_more_epochs_keep_the_warm_up_that_the_run_had(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    main(["--resume", str(run), "--epochs", "4"])  # 0.4 of 12 steps would be 5
    rates = [line["learning_rate"] for line in lines(run) if "loss" in line]
    assert rates == pytest.approx([5e-3, *[1e-2] * 11])


def test_a_finished_run_says_how_to_go_on(place, finished, tmp_path, capsys):
    code, said = ended(["--resume", finished], capsys)
    assert code == 2
    assert f"is finished; its result is in {finished / 'adapter'}" in said
    assert f"jllama train --init-adapter {finished / 'adapter'} --model {place / 'model'}" in said
    assert (
        "--epochs 1, but the run is of 2"
        in ended(["--resume", finished, "--epochs", "1"], capsys)[1]
    )
    run = begun(config(place, output_dir=str(tmp_path / "run"), lr_scheduler="cosine"))
    code, said = ended(["--resume", run.path, "--epochs", "9"], capsys)
    assert code == 2
    assert "only a constant one goes on. To train on from its result: jllama train" in said


# Flags that do nothing


def test_flags_that_do_nothing_say_so(place, tmp_path, capsys):
    main(flags(place, tmp_path / "a", max_steps=1, val_size=0.01, patience=2, eval_steps=3,
               max_seq_len=9999, epochs=1))  # fmt: skip
    said = capsys.readouterr().out
    assert "note: --val-size 0.01 holds out no row" in said
    assert "note: --patience 2 does nothing without held-out rows" in said
    assert "note: --eval-steps 3 does nothing without held-out rows" in said
    assert "note: --max-seq-len 9999 is beyond the " in said
    main(flags(place, tmp_path / "b", max_steps=99, init_adapter=tmp_path / "a" / "adapter",
               lora_rank=7, lora_targets="wo", epochs=1))  # fmt: skip
    said = capsys.readouterr().out
    assert "note: --max-steps 99 does nothing; 1 epochs end before it" in said
    assert f"note: --lora-rank 7 does nothing; {tmp_path / 'a' / 'adapter'} brings 2" in said
    assert "note: --lora-targets wo does nothing" in said
    assert "lora_targets" in said.split("parameters:")[0].split("lora_rank")[1]
    assert RunFolder(tmp_path / "b").read_settings()["lora_rank"] == 2
    assert "note:" not in said.partition("note: --max-steps")[2]


@pytest.mark.parametrize(
    "words", [["--data", "a", "--data", "b"], ["--max_steps=1", "--max-steps", "2"]]
)
def test_a_flag_given_twice_is_refused(capsys, words):
    code, said = ended(words, capsys)
    assert code == 2
    assert "given more than once" in said


# Files of a run


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "run.json"])
def test_a_flipped_bit_of_a_runs_files_is_named_or_harmless(finished, tmp_path, name):
    """Reliability 15, for every byte; what the commands do with them is the campaign's."""
    run = RunFolder(tmp_path)
    for file in ("metrics.jsonl", "config.yaml", "run.json"):
        shutil.copy(finished / file, tmp_path)
    whole = (tmp_path / name).read_bytes()

    def read():
        return run.read_metrics() if name == "metrics.jsonl" else run.read_settings()

    right, named = read(), 0
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        (tmp_path / name).write_bytes(flipped)
        found = None
        with contextlib.suppress(InputError):
            found = read()
        assert found in (right, None), (place, bytes(flipped[place - 20 : place + 20]))
        named += found is None
    assert named > 0.9 * len(whole)


def test_only_a_last_line_that_was_cut_is_passed_over(tmp_path):
    file = tmp_path / "lines.jsonl"
    text = as_line({"step": 1}) + as_line({"step": 2, "text": 'crc32": "00000000"}'})
    for end in range(len(text) + 1):
        file.write_text(text[:end])
        found = read_json_lines(file)
        whole = text[:end].count("}\n") + text[:end].endswith("}")
        first, second = len(as_line({"step": 1})), len(text)
        whole = (end >= first - 1) + (end >= second - 1)
        assert [line["step"] for line in found.values] == [1, 2][:whole]
        assert found.cut == (end not in (0, first - 1, first, second - 1, second))
    file.write_text(text[:-1] + "!")
    with pytest.raises(InputError, match="line 2 is damaged"):
        read_json_lines(file)


def test_a_record_with_a_right_hash_and_wrong_fields_is_refused(finished, tmp_path):
    for file in ("config.yaml", "run.json"):
        shutil.copy(finished / file, tmp_path)
    run = RunFolder(tmp_path)
    right = dict(run.read_record())
    for name, value in (("data", "x"), ("warmup_steps", None), ("versions", [1]), ("steps", True)):
        write_sealed(run.record, right | {name: value})
        with pytest.raises(InputError, match=f"run.json: {name} is .*; restore it"):
            run.read_settings()
    run.metrics.write_text(as_line({"loss": 1.0}))
    with pytest.raises(InputError, match=r"metrics.jsonl: 0, .* field required"):
        run.read_metrics()
    write_sealed(run.record, {k: v for k, v in right.items() if k != "warmup_steps"})
    with pytest.raises(InputError, match=r"run.json: warmup_steps is .*: field required"):
        run.read_settings()


@pytest.mark.parametrize("lost", ["all", "a step", "an evaluation"])
def test_a_resume_refuses_a_history_with_holes(finished, tmp_path, capsys, lost):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "adapter")
    kept = lines(run)
    if lost == "a step":
        del kept[3]
    elif lost == "an evaluation":
        kept = [line for line in kept if line.get("eval_loss") is None or line["step"] != 3]
    text = "" if lost == "all" else "".join(map(as_line, kept))
    (run / "metrics.jsonl").write_text(text)
    best = adapter(run, "best")
    code, said = ended(["--resume", run], capsys)
    assert code == 2
    assert "metrics.jsonl: not every step and evaluation up to step 6 is there" in said
    assert adapter(run, "best") == best
