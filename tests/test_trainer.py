"""Training from Python: the same run as the command's, with callbacks, a loss and windows given."""

import json
import os
import signal
import subprocess
import sys
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import BASE
from train_runs import adapter, as_flags, lines, settings, small_place

import jllama
from jllama.errors import InputError
from jllama.folders.json_files import read_json
from jllama.folders.manifest import file_sha256
from train import TrainConfig, Trainer, Window
from train.data.load import load_examples
from train.lora import main
from train.run.reports import Reports
from train.run.signals import Stopped
from train.step import next_token_loss

pytestmark = pytest.mark.integration

FIGURES = ("step", "rows", "loss_sum", "tokens", "grad_norm", "eval_loss", "epoch_loss")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return small_place(tmp_path_factory.mktemp("place"), BASE | {"n_layers": 1})


@pytest.fixture(scope="module")
def rows(place):
    return json.loads((place / "rows.json").read_text())


@pytest.fixture
def of(place, tmp_path):
    """Settings of a run of four steps in two epochs, into `tmp_path/NAME`."""

    def of(name, **more):
        four = {"max_steps": 4, "eval_steps": 2, "save_steps": 1, "lora_dropout": 0.1}
        return settings(place, **four, **more, output_dir=str(tmp_path / name))

    return of


def record(run):
    """All that two equal runs have in common, to the bit."""
    figures = [{name: line[name] for name in FIGURES if name in line} for line in lines(run)]
    return figures, adapter(run)


class Told:
    """Notes what it is told; fails at one of it."""

    def __init__(self, fails=None):
        self.heard, self._fails = [], fails

    def _note(self, *news):
        self.heard.append(news)
        if news == self._fails:
            raise LookupError("of this callback")

    def __enter__(self):
        self._note("entered")

    def __exit__(self, *_):
        self._note("left")

    def on_step(self, line):
        self._note("step", line["step"])

    def on_evaluation(self, line):
        self._note("epoch" if "epoch" in line else "evaluation", line["step"])

    def on_save(self, step, folder):
        assert (folder / "_CHECKPOINT_METADATA").exists()
        self._note("save", step)


def test_a_run_from_python_is_the_commands_to_the_bit(place, tmp_path, of):
    main(as_flags(of("command")))
    trainer = Trainer(**of("python"))
    result = trainer.train()
    assert record(tmp_path / "python") == record(tmp_path / "command")
    assert trainer.run == tmp_path / "python"
    found = lines(trainer.run)
    assert result.losses == tuple(line["loss"] for line in found if "loss" in line)
    assert result.eval_losses == tuple(line["eval_loss"] for line in found if "eval_loss" in line)
    assert result.epoch_losses == tuple(x["epoch_loss"] for x in found if "epoch_loss" in x)
    assert result.seconds > 0 < result.peak_memory_mib > result.planned_memory_mib > 0


def test_the_tuned_model_stays_in_memory_and_answers_as_the_saved_one(place, of):
    trainer = Trainer(**of("run"))
    trainer.train()
    prompt = [trainer.tokenizer.bos_id, *trainer.tokenizer.encode("Say one 0.")]
    saved = jllama.load_model(place / "model", "fp32")
    base = jllama.generate_with_logprobs(saved, [prompt], 8)
    jllama.load_adapter(saved, trainer.run / "adapter")
    here, there = (jllama.generate_with_logprobs(m, [prompt], 8) for m in (trainer.model, saved))
    assert here == there != base


def test_rows_in_memory_are_kept_in_the_run_folder_and_train_as_their_file_does(
    place, tmp_path, rows, of
):
    file, memory = of("file"), of("memory")
    held_out = rows[:5]
    (tmp_path / "held.json").write_text(json.dumps(held_out))
    Trainer(**file | {"val_size": 0, "val_data": tmp_path / "held.json"}).train()
    trainer = Trainer(**memory | {"data": rows, "val_size": 0, "val_data": held_out})
    trainer.train()
    assert record(trainer.run) == record(tmp_path / "file")
    kept = trainer.run / "rows.jsonl"
    assert [json.loads(line) for line in kept.read_text().splitlines()] == rows
    assert read_json(trainer.run / "run.json")["data_sha256"] == file_sha256(kept)
    again = tmp_path / "again"  # the folder has all that the run needs
    main(["--config", str(trainer.run / "config.yaml"), "--output-dir", str(again)])
    assert adapter(again) == adapter(trainer.run)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([{"prompt": "a", "completion": "b"}, ["a", "b"]], "row 1 is a list, expected an object"),
        ([{"prompt": "a", "completion": {1, 2}}], "row 0 cannot be kept as JSON: .*set"),
        ([{"prompt": "a"}], "no answer"),
    ],
)
def test_bad_rows_in_memory_are_named_and_leave_nothing(of, tmp_path, bad, words):
    with pytest.raises(InputError, match=words):
        Trainer(**of("run") | {"data": bad}).train()
    assert not (tmp_path / "run").exists()


def test_callbacks_are_told_in_order_and_left_at_the_end(of):
    told = Told()
    Trainer(**of("run"), callbacks=[told]).train()
    first = [("entered",), ("evaluation", 0), ("step", 1), ("save", 1), ("step", 2)]
    assert told.heard[:7] == [*first, ("evaluation", 2), ("save", 2)]
    assert told.heard[-4:] == [("epoch", 4), ("evaluation", 4), ("save", 4), ("left",)]


@pytest.mark.parametrize(
    ("fails", "saved"),
    [(("step", 3), 3), (("evaluation", 2), 2), (("save", 1), 1), (("evaluation", 0), 0),
     (("epoch", 4), 4)],
)  # fmt: skip
@pytest.mark.parametrize("save_steps", [0, 1])
def test_a_callback_that_raises_ends_the_run_which_resumes_bit_equal(
    tmp_path, of, fails, saved, save_steps
):
    if fails[0] == "save" and not save_steps:
        fails, saved = ("save", 4), 4
    more = {"save_steps": save_steps}
    Trainer(**of("whole") | more).train()
    told, later = Told(fails), Told()
    with pytest.raises(LookupError, match="of this callback"):
        Trainer(**of("run") | more, callbacks=[told, later]).train()
    run = tmp_path / "run"
    assert told.heard[-2:] == [fails, ("left",)]
    assert fails not in later.heard
    assert later.heard[-1] == ("left",)
    assert not (run / "adapter").exists()
    states = [int(state.name) for state in (run / "state").iterdir() if state.name.isdigit()]
    assert max(states, default=0) == saved
    if saved:
        main(["--resume", str(run)])
        assert record(run) == record(tmp_path / "whole")


def test_of_a_step_whose_figures_come_late_the_next_one_is_saved(tmp_path, of, monkeypatch):
    """As on a GPU: `on_step` is told of step 2 when step 3 has been started."""
    begin = Reports.__init__

    def late(self, *args):
        begin(self, *args)
        self._lags = True

    monkeypatch.setattr(Reports, "__init__", late)
    more = {"save_steps": 0, "eval_steps": 4}
    Trainer(**of("whole") | more).train()
    with pytest.raises(LookupError):
        Trainer(**of("run") | more, callbacks=[Told(("step", 2))]).train()
    steps = [line["step"] for line in lines(tmp_path / "run") if "loss" in line]
    assert steps == [1, 2, 3]
    assert (tmp_path / "run" / "state" / "3").is_dir()
    Trainer(resume=tmp_path / "run").train()
    assert record(tmp_path / "run") == record(tmp_path / "whole")


def test_ctrl_c_is_a_keyboard_interrupt_with_the_state_saved(tmp_path, of, capsys):
    class Interrupts(Told):
        def on_step(self, line):
            if line["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)

    Trainer(**of("whole")).train()
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3; continue with: ") as ended:
        Trainer(**of("run"), callbacks=[Interrupts()]).train()
    assert isinstance(ended.value, Stopped)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    Trainer(resume=tmp_path / "run").train()
    assert record(tmp_path / "run") == record(tmp_path / "whole")


def test_a_run_in_a_thread_of_its_own_is_the_same(tmp_path, of):
    Trainer(**of("main")).train()
    thread = threading.Thread(target=Trainer(**of("thread")).train)
    thread.start()
    thread.join()
    assert record(tmp_path / "thread") == record(tmp_path / "main")


def mean_of_all(x, head, rows):
    """The built-in loss, as a user writes it: over whole logits."""
    logits = jnp.einsum("BTD,VD->BTV", x, head.astype(x.dtype)).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    found = jnp.take_along_axis(log_p, rows.targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(rows.mask, found, 0.0))


@pytest.mark.parametrize("more", [{}, {"packing": True}, {"tune": "full"}, {"remat": "none"}])
def test_the_built_in_loss_written_by_a_user_gives_the_same_run(tmp_path, of, more):
    more = more | {"lora_dropout": 0.0}
    Trainer(**of("own") | more).train()
    Trainer(**of("given") | more, loss=mean_of_all).train()
    own, given = (
        np.array([line.get("loss_sum", line.get("eval_loss", np.nan)) for line in lines(run)])
        for run in (tmp_path / "own", tmp_path / "given")
    )
    np.testing.assert_allclose(given, own, rtol=2e-5)


def smoothed(x, head, rows, share=0.1):
    logits = jnp.einsum("BTD,VD->BTV", x, head).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    found = jnp.take_along_axis(log_p, rows.targets[..., None], axis=-1)[..., 0]
    losses = -(1 - share) * found - share * jnp.mean(log_p, axis=-1)
    return jnp.sum(jnp.where(rows.mask, losses, 0.0))


def test_a_smoothed_loss_is_torchs(place, of):
    """Held-out loss before step 1: of the base alone, whose logits torch gets, too."""
    torch = pytest.importorskip("torch")
    losses = {}
    for name, loss in (("plain", None), ("smoothed", smoothed)):
        result = Trainer(**of(name) | {"max_steps": 1, "learning_rate": 1e-9}, loss=loss).train()
        losses[name] = result.eval_losses[0]
    _, held_out = load_examples(TrainConfig(**of("run")), jllama.load_tokenizer(place / "model"))
    model = jllama.load_model(place / "model", "fp32")
    total, count = {0.0: 0.0, 0.1: 0.0}, 0
    for _, ids, learned, _ in held_out:
        logits = torch.tensor(np.asarray(model(jnp.asarray([ids[:-1]])))[0])
        targets = torch.tensor(np.where(learned, ids, -100)[1:].astype(np.int64))
        count += np.count_nonzero(learned)
        for share in total:
            total[share] += torch.nn.functional.cross_entropy(
                logits, targets, label_smoothing=share, reduction="sum"
            ).item()
    assert losses["plain"] == pytest.approx(total[0.0] / count, rel=1e-5)
    assert losses["smoothed"] == pytest.approx(total[0.1] / count, rel=1e-5)


class Weighted(NamedTuple):
    """A window that says how much each of its sequences counts."""

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    weights: np.ndarray
    positions: None = None
    documents: None = None


class Own:
    """Three windows, each a function of its number."""

    def __init__(self, kind=Window, k=2, length=16):
        self._kind, self._shape = kind, (k, 4, length)

    def __len__(self):
        return 3

    def __getitem__(self, number):
        ids = np.random.default_rng(number).integers(3, 200, (*self._shape[:2], self._shape[2] + 1))
        mask = np.arange(self._shape[2]) >= np.array([4])
        arrays = ids[..., :-1], ids[..., 1:], np.broadcast_to(mask, self._shape)
        weights = () if self._kind is Window else (np.full(self._shape[:2], 2.0, np.float32),)
        return self._kind(*arrays, *weights)


def of_windows(of, name):
    left_out = ("data", "val_size", "max_seq_len", "gradient_accumulation_steps", "max_steps")
    return {x: value for x, value in of(name).items() if x not in left_out} | {"epochs": 2}


def test_windows_of_ones_own_are_trained_on_and_resumed_bit_equal(place, tmp_path, of, capsys):
    trainer = Trainer(**of_windows(of, "whole"), windows=Own())
    result = trainer.train()
    assert "3 given windows to train on" in capsys.readouterr().out
    assert len(result.losses) == 6
    assert len(result.epoch_losses) == 2
    assert trainer.config.gradient_accumulation_steps == 2
    failing = Told(("step", 4))  # in the second epoch
    with pytest.raises(LookupError):
        Trainer(**of_windows(of, "run"), windows=Own(), callbacks=[failing]).train()
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        main(["--resume", str(run)])
    said = " ".join(capsys.readouterr().err.split())
    assert f"{run} was given windows=Own by Python, and is now given neither" in said
    assert f"Trainer(resume='{run}')" in said
    with pytest.raises(InputError, match="data_sha256 differ from"):
        Trainer(resume=run, windows=Own(length=15)).train()
    Trainer(resume=run, windows=Own()).train()
    assert record(run) == record(tmp_path / "whole")


def test_windows_may_carry_what_a_loss_reads(tmp_path, of):
    def weighted(x, head, rows):
        sums = jax.vmap(lambda *one: next_token_loss(*(y[None] for y in one[:1]), head,
            jax.tree.map(lambda y: y[None], one[1]), head_learns=False))(x, rows)  # fmt: skip
        return jnp.sum(sums * rows.weights)

    plain = Trainer(**of_windows(of, "plain"), windows=Own()).train()
    double = Trainer(**of_windows(of, "double"), windows=Own(Weighted), loss=weighted).train()
    assert double.losses[0] == pytest.approx(2 * plain.losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        ([], "windows: there is none"),
        ([Window(*np.zeros((3, 2, 8), int))], r"of \(2, 8\), expected one shape \(k, B, T\)"),
        ([Window(*np.full((3, 1, 2, 8), 9999))], r"windows\[0\]: tokens from 9999 to 9999"),
    ],
)
def test_windows_that_do_not_fit_are_refused(of, tmp_path, windows, words):
    with pytest.raises(InputError, match=words):
        Trainer(**of_windows(of, "run"), windows=windows).train()
    assert not (tmp_path / "run").exists()


def test_a_window_of_another_shape_ends_the_run_with_its_number(of):
    windows = [Own()[0], Own(k=1)[0]]
    with pytest.raises(InputError, match=r"windows\[1\]: .* \(1, 4, 16\), expected .*\(2, 4, T\)"):
        Trainer(**of_windows(of, "run"), windows=windows).train()


def test_what_cannot_be_is_refused_before_anything_is_loaded(place):
    model = jllama.load_model(place / "model", "fp32")
    with pytest.raises(InputError, match="expected the path of a model folder"):
        Trainer(model)
    with pytest.raises(InputError, match="drop data and val_size"):
        Trainer(place / "model", place / "rows.json", windows=Own())
    with pytest.raises(InputError, match="lerning_rate"):
        Trainer(place / "model", place / "rows.json", lerning_rate=1e-3)
    with pytest.raises(InputError, match="drop learning_rate"):
        Trainer(resume=place / "run", learning_rate=1e-3)


def test_the_package_gives_trainer_without_importing_jax_before():
    script = (
        "import sys, train; print('jax' in sys.modules, dir(train)); train.Trainer;"
        "print('jax' in sys.modules, 'torch' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert said.splitlines()[0].startswith("False ['Callback', 'Loss', ")
    assert said.splitlines()[1] == "True False"
