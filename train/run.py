"""The run folder: made or resumed, held by one process, ended by a signal without loss.

config.yaml     the resolved settings; `--config` reads them back
run.json        command, versions, hashes of base and data, and what was known before the first step
metrics.jsonl   one line per optimizer step, evaluation and epoch
state/          adapters, moments, accumulator and step (Orbax)
adapter/        the result: a PEFT adapter; with full tuning model/, a model folder
best/           the same, of the lowest held-out loss
tensorboard/    the figures of metrics.jsonl
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from jllama.errors import InputError
from jllama.files import read_json
from jllama.manifest import (
    file_sha256,
    manifest_sha256,
    read_manifest,
    read_sealed,
    write_sealed,
)
from jllama.tokenizer import FILE_NAME as TOKENIZER
from train.config import LATEST, TrainConfig, write_config

IDENTITY = ("base_manifest_sha256", "data_sha256")  # a resume must find these unchanged
RESULTS = {"lora": "adapter", "full": "model"}  # --tune -> folder in the run, whole once it exists
PACKAGES = ("jllama", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@contextlib.contextmanager
def run_folder(config: TrainConfig, facts: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of a new or resumed run, locked for this process.

    Args:
        facts: of `train.show.run_facts`, for the run.json of a new run.

    Raises:
        InputError: if a new run would overwrite something, another process holds the folder, or
            the base or the data of a resumed run has changed.
    """
    run = Path(config.resume) if config.resume else _new_folder(config)
    with _locked(run):
        found = provenance(config)
        if config.resume:
            _check_unchanged(run, found)
        else:
            write_config(_from_anywhere(config), run / "config.yaml")
            settings = {"config_sha256": file_sha256(run / "config.yaml")}
            write_sealed(run / "run.json", found | settings | {**facts})
        if not config.output_dir and not config.resume:
            _link_latest(run)
        yield run


def _new_folder(config: TrainConfig) -> Path:
    if config.output_dir:
        run = Path(config.output_dir)
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise InputError(
                f"{run} exists; choose another --output-dir, or continue it with --resume {run}"
            )
        run.mkdir(parents=True, exist_ok=True)
        return run
    name = f"{Path(config.model).name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    run = LATEST.parent / name
    run.mkdir(parents=True)
    return run


def _link_latest(run: Path) -> None:
    link = LATEST.with_name(f".latest-{os.getpid()}")
    link.symlink_to(run.name)
    link.replace(LATEST)


def _from_anywhere(config: TrainConfig) -> TrainConfig:
    """The settings with whole paths and no folder of their own, to be read back anywhere."""
    paths: dict[str, Any] = {
        name: str(Path(getattr(config, name)).absolute())
        for name in ("model", "data", "init_adapter")
        if getattr(config, name)
    }
    return dataclasses.replace(config, output_dir="", **paths)


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """One process a folder. The kernel drops the lock of a process that dies."""
    with (run / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{run} is in use by process {file.read().strip() or '(unknown)'}; wait for it, "
                "stop it, or choose another --output-dir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _check_unchanged(run: Path, found: dict) -> None:
    for result in RESULTS.values():
        if (run / result).is_dir():
            raise InputError(f"{run} is finished; its result is in {run / result}")
    saved = read_sealed(run / "run.json", "start a new run")
    if saved.get("config_sha256") != file_sha256(run / "config.yaml"):
        raise InputError(
            f"{run / 'config.yaml'} was changed after the run began, which goes on with its own "
            f"settings only; for others: python -m train.lora --config {run / 'config.yaml'}"
        )
    changed = [name for name in IDENTITY if saved.get(name) != found[name]]
    if changed:
        raise InputError(
            f"{run} was trained on other files: {', '.join(changed)} differ from run.json; "
            "restore them or start a new run"
        )


def provenance(config: TrainConfig) -> dict:
    """Where a run comes from: what a second person needs to repeat it."""
    return {
        "command": [sys.executable, *sys.argv],
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "device": jax.devices()[0].device_kind,
        "base_manifest_sha256": manifest_sha256(config.model),
        "tokenizer_sha256": read_manifest(config.model)["files"][TOKENIZER],
        "data_sha256": hashlib.sha256(Path(config.data).read_bytes()).hexdigest(),
    }


def make_passport(config: TrainConfig, run: Path) -> dict:
    """What an adapter carries about its origin: whoever loads it can tell where it belongs."""
    names = (*IDENTITY, "tokenizer_sha256", "versions")
    known = read_json(run / "run.json")
    return {
        "prompt_style": config.prompt_style,
        "seed": config.seed,
        **{name: known[name] for name in names},
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a flag that the loop reads between two steps.

    A second signal ends the process at once. `number` is the signal received, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.number = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
