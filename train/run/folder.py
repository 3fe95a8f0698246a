"""The run folder of a new or resumed run, held by one process."""

import contextlib
import dataclasses
import itertools
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jllama.cli.terminal import command_line, console
from jllama.errors import InputError
from jllama.folders.adapter import read_passport
from jllama.folders.files import held
from jllama.folders.json_files import NEW
from jllama.folders.manifest import file_sha256, write_sealed
from jllama.folders.run import CONFIG, LATEST, METRICS, RECORD, ROWS_OF, RunFolder
from jllama.text.row_formats import source_of
from train.config import CHANGEABLE, FILES, TrainConfig, plain, write_config
from train.processes.join import Processes
from train.run.given import NOTHING_GIVEN, Given
from train.run.provenance import identity, provenance

_LOCK = ".lock"


@contextlib.contextmanager
def run_folder(
    config: TrainConfig,
    facts: Mapping[str, Any],
    processes: Processes | None = None,
    given: Given = NOTHING_GIVEN,
) -> Iterator[RunFolder]:
    """The folder of a new or resumed run, made and locked by process 0 for all of them.

    Args:
        facts: of `train.run.show.run_facts`, for the run.json of a new run.

    Raises:
        InputError: as for `check_folder`, or if another process holds the folder.
    """
    processes = processes or Processes()
    if processes.number:
        yield RunFolder(Path(processes.tell("")[0]))
        return
    run = RunFolder(Path(config.resume or config.output_dir or _new_folder(config)))
    run.path.mkdir(parents=True, exist_ok=True)
    with _locked(run.path):
        check_folder(config, given)
        config = _with_rows_in(run, config, given)
        if config.resume:
            _write_changes(run, config)
        else:
            write_config(_from_anywhere(config), run.config)
            settings = {"config_sha256": file_sha256(run.config)}
            write_sealed(run.record, provenance(config, given) | settings | {**facts})
        if not config.output_dir and not config.resume:
            _link_latest(run.path)
        processes.tell(str(run.path.absolute()))
        yield run


def check_folder(config: TrainConfig, given: Given = NOTHING_GIVEN) -> None:
    """Refuses what a run cannot begin in, or go on with; cheap, so that it can be asked early.

    Raises:
        InputError: if a new run would overwrite something; or if a resumed one has finished, its
            base, data, initial adapter, template, loss or windows are not the same, or its schedule
            forbids more epochs.
    """
    if config.resume:
        _check_resumable(RunFolder(Path(config.resume)), config, given)
    elif config.output_dir and not _is_free(RunFolder(Path(config.output_dir))):
        raise InputError(
            f"{config.output_dir} exists; choose another --output-dir, or continue it with: "
            + command_line("train", "--resume", config.output_dir)
        )


def _is_free(run: RunFolder) -> bool:
    """Whether nothing is there but what a run leaves that ended before its first step."""
    if not run.path.exists():
        return True
    if not run.path.is_dir():
        return False
    names = {entry.name.removesuffix(NEW) for entry in run.path.iterdir()}
    begun = {
        _LOCK,
        CONFIG,
        RECORD,
        METRICS,
        *ROWS_OF.values(),
        run.state.name,
        run.tensorboard.name,
    }
    if not names <= begun:
        return False
    saved = run.state.is_dir() and any(entry.name.isdigit() for entry in run.state.iterdir())
    return not saved and not any(line["step"] for line in run.read_metrics().values)


def _new_folder(config: TrainConfig) -> Path:
    """runs/MODEL-TIME-PROCESS; containers that share a folder may agree in all three."""
    name = f"{Path(config.model).name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    for number in itertools.count(1):
        run = LATEST.parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            run.mkdir(parents=True)
            break
    return run


def _link_latest(run: Path) -> None:
    if LATEST.is_dir() and not LATEST.is_symlink():
        console.print(f"{LATEST} is a folder and no link; this run is {run}")
        return
    link = LATEST.with_name(f".latest-{run.name}")
    link.symlink_to(run.name)
    link.replace(LATEST)


def _from_anywhere(config: TrainConfig) -> TrainConfig:
    """The settings with whole paths and no folder of their own, to be read back anywhere."""
    paths: dict[str, Any] = {
        name: str(Path(getattr(config, name)).absolute())
        for name in FILES
        if name != "data" and getattr(config, name)
    }
    sources = map(source_of, config.data)
    paths["data"] = tuple(str(source._replace(path=source.path.absolute())) for source in sources)
    return dataclasses.replace(config, output_dir="", **paths)


def _with_rows_in(run: RunFolder, config: TrainConfig, given: Given) -> TrainConfig:
    """With rows that were given in memory as files of the run folder."""
    files: dict[str, Any] = {}
    for name, file in given.rows.items():
        kept = run.path / ROWS_OF[name]
        new = kept.with_name(kept.name + NEW)
        shutil.copyfile(file, new)
        new.replace(kept)
        files[name] = str(kept)
    return dataclasses.replace(config, **files)


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """One process a folder, which names itself in the lock."""
    lock = run / _LOCK
    with lock.open("a+", encoding="utf-8", errors="replace") as file:
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


def _check_resumable(run: RunFolder, config: TrainConfig, given: Given) -> None:
    before = run.read_settings()
    onward = command_line(
        "train", "--init-adapter", run.result("lora"), "--model", config.model, "--data",
        *config.data,
    )  # fmt: skip
    if config.tune == "full":
        onward = command_line("train", "--model", run.result("full"), "--data", *config.data)
    if config.epochs < before["epochs"]:
        raise InputError(f"--epochs {config.epochs}, but the run is of {before['epochs']}")
    if config.epochs > before["epochs"] and config.lr_scheduler != "constant":
        raise InputError(
            f"--epochs {config.epochs}: the {config.lr_scheduler} schedule of this run ends after "
            f"{before['epochs']} epochs, and only a constant one goes on. To train on from its "
            f"result: {onward}"
        )
    result = run.result(config.tune)
    if result.is_dir() and read_passport(result).get("epochs", config.epochs) >= config.epochs:
        raise InputError(
            f"{run.path} is finished; its result is in {result}. To train on from it: {onward}"
        )
    saved = run.read_record()
    had, has = (
        ", ".join(f"{name}={code}" for name, code in sorted(names.items())) or "neither"
        for names in (saved.get("given", {}), given.code)
    )
    if had != has:
        raise InputError(
            f"{run.path} was given {had} by Python, and is now given {has}; continue it there, "
            f"with Trainer(resume={str(run.path)!r}) and what it was given"
        )
    changed = [name for name, found in identity(config, given).items() if saved.get(name) != found]
    if changed:
        raise InputError(
            f"{run.path} was trained on other files: {', '.join(changed)} differ from "
            f"{run.record.name}; restore them or start a new run"
        )


def _write_changes(run: RunFolder, config: TrainConfig) -> None:
    """Records what this resume was given anew, for the next one and for what reads the run."""
    before, now = run.read_settings(), plain(_from_anywhere(config))
    names = (*CHANGEABLE, "micro_batch_size")  # which follows from the mesh
    changed = {name: now[name] for name in names if now[name] != before.get(name, "")}
    if changed:
        record: dict[str, Any] = {**run.read_record()}
        record["changed"] = record.get("changed", {}) | changed
        write_sealed(run.record, record)
