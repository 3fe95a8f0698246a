"""Runs of the train command: its flags, what it leaves, and a power cut after a step."""

import contextlib
import json

import numpy as np
from random_models import model_folder
from safetensors.numpy import load_file

from jllama.folders.run import RunFolder
from train.callbacks import Callbacks, MetricsFile, TensorBoard
from train.run.metrics import Metrics, read_history

# What run.json says of a run before its first step, beside what `provenance` finds.
FACTS = {"parameters": {}, "model": {}, "steps": 8, "warmup_steps": 0, "device_memory_mib": 0,
         "memory_bytes": {},
         "data": {"rows": 16, "held_out_rows": 0, "tokens": 99, "learned_tokens": 9, "longest": 9,
                  "cut_rows": 0, "padding_share": 0.5, "turns": 1}}  # fmt: skip


def as_flags(settings):
    """{"max_steps": 3, "packing": True} -> ["--max-steps", "3", "--packing"]"""
    words = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return words


def adapter(run, name="adapter"):
    return (run / name / "adapter_model.safetensors").read_bytes()


def lines(run):
    return RunFolder(run).read_metrics().values


def small_place(root, params):
    """A folder with a tiny model and rows of uneven length."""
    model_folder(root, params)
    words = ("one", "twenty-two", "three hundred", "four", "fifty", "six")
    rows = [
        {"prompt": f"Say {words[i % 6]} {i}.", "completion": words[i * i % 6]} for i in range(99)
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    return root


def settings(place, **more):
    """Of a run in such a folder: 20 steps, with accumulation, dropout and evaluations."""
    return {
        "model": str(place / "model"), "data": str(place / "rows.json"), "precision": "fp32",
        "max_seq_len": 32, "gradient_accumulation_steps": 2, "val_size": 9,
        "max_steps": 20, "epochs": 20, "lora_rank": 4, "eval_steps": 10,
    } | more  # fmt: skip


def read(run):
    """Every loss that a run wrote, and the weights that it made."""
    files = [*run.glob("adapter/*.safetensors"), *run.glob("model/blocks/*.safetensors")]
    losses = [line.get("loss", line.get("eval_loss")) for line in lines(run)]
    weights = {name: array for file in files for name, array in load_file(file).items()}
    assert weights
    return np.array([loss for loss in losses if loss is not None]), weights


@contextlib.contextmanager
def recorded(run, resumed=0):
    """Metrics that a run folder records."""
    kept = read_history(run, resumed, ())
    events = TensorBoard(run.tensorboard, resumed + 1 if resumed else 0)
    with Callbacks([MetricsFile(run.metrics, kept), events]) as told:
        yield Metrics(told, kept)


class Killed(BaseException):
    """A power cut: no exception handler of the run gets to save anything."""


def killed(*_, **__):
    raise Killed


def after_step(monkeypatch, step, happens=killed):
    """Calls something when a step's figures have been recorded; else the power is cut."""
    record = Metrics.step

    def wrapped(self, number, *args, **more):
        line = record(self, number, *args, **more)
        if number == step:
            happens()
        return line

    monkeypatch.setattr(Metrics, "step", wrapped)
