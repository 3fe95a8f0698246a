"""One training run, the planning of it, and the making of the bundled sample.

trainer = train.Trainer("models/llama-2-7b", rows, learning_rate=1e-4, epochs=2)
result = trainer.train()

trainer.py    one run, from the model folder to the adapter   lora.py       `jllama train`, a caller
callbacks.py  who is told of steps, evaluations and saves     config.py     every setting
prepare.py    settings made definite, examples, windows       loop.py       feeds the step
stream.py     where windows come from                         step.py       one optimizer step
optimizer.py  who learns, by which rule                       data/         examples -> windows
run/          the run folder while it lives                   processes/    several of one run
plan/         memory and speed in advance                     sample/       the sample, made
recipes/      settings for --config, by name
speed.py      `python -m train.speed`: the step timed         profile.py    by class of kernel
"""

import functools
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.callbacks import Callback
    from train.config import TrainConfig
    from train.run.metrics import Result
    from train.step import Loss, Window
    from train.stream import Windows
    from train.trainer import Trainer

# Imported when they are asked for: `jllama --help` needs no JAX.
_HOMES = {
    "Callback": "callbacks",
    "Loss": "step",
    "Result": "run.metrics",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "Window": "step",
    "Windows": "stream",
}

__all__ = ["Callback", "Loss", "Result", "TrainConfig", "Trainer", "Window", "Windows"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    _prepare()
    return getattr(importlib.import_module(f"train.{_HOMES[name]}"), name)


@functools.cache  # once in a process
def _prepare() -> None:
    """What a command does before JAX has opened a device."""
    import jax

    from jllama.cli.card import prepare_gpu
    from jllama.machine import pass_over_absent_gpu, use_private_compilation_cache

    pass_over_absent_gpu()
    prepare_gpu()
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        use_private_compilation_cache()


def __dir__() -> list[str]:
    return __all__
