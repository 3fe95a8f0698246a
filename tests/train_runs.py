"""Runs of the train command: its flags, what it leaves, and a power cut after a step."""

from jllama.folders.run import RunFolder
from train.run.metrics import Metrics

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
