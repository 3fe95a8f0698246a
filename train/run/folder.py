"""The run folder of a new or resumed run, held by one process."""

import contextlib
import dataclasses
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jllama.cli.terminal import command_line
from jllama.errors import InputError
from jllama.folders.files import held
from jllama.folders.manifest import file_sha256, read_sealed, write_sealed
from jllama.folders.run import LATEST, RunFolder
from train.config import TrainConfig, write_config
from train.run.provenance import IDENTITY, provenance


@contextlib.contextmanager
def run_folder(config: TrainConfig, facts: Mapping[str, Any]) -> Iterator[RunFolder]:
    """The folder of a new or resumed run, locked for this process.

    Args:
        facts: of `train.run.show.run_facts`, for the run.json of a new run.

    Raises:
        InputError: if a new run would overwrite something, another process holds the folder, or
            the base or the data of a resumed run has changed.
    """
    run = RunFolder(Path(config.resume) if config.resume else _new_folder(config))
    with _locked(run.path):
        found = provenance(config)
        if config.resume:
            _check_unchanged(run, found)
        else:
            write_config(_from_anywhere(config), run.config)
            settings = {"config_sha256": file_sha256(run.config)}
            write_sealed(run.record, found | settings | {**facts})
        if not config.output_dir and not config.resume:
            _link_latest(run.path)
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
    """One process a folder, which names itself in the lock."""
    lock = run / ".lock"
    with lock.open("a+") as file:
        file.seek(0)
        holder = file.read().strip() or "(unknown)"
        busy = (
            f"{run} is in use by process {holder}; wait for it, stop it, or choose another "
            "--output-dir"
        )
        with held(lock, busy):
            file.truncate(0)
            file.write(f"{os.getpid()} on {platform.node()}")
            file.flush()
            yield


def _check_unchanged(run: RunFolder, found: Mapping[str, Any]) -> None:
    for result in (run.result("lora"), run.result("full")):
        if result.is_dir():
            raise InputError(f"{run.path} is finished; its result is in {result}")
    saved = read_sealed(run.record, "start a new run")
    if saved.get("config_sha256") != file_sha256(run.config):
        others = command_line("train", "--config", run.config)
        raise InputError(
            f"{run.config} was changed after the run began, which goes on with its own settings "
            f"only; for others: {others}"
        )
    changed = [name for name in IDENTITY if saved.get(name) != found[name]]
    if changed:
        raise InputError(
            f"{run.path} was trained on other files: {', '.join(changed)} differ from "
            f"{run.record.name}; restore them or start a new run"
        )
