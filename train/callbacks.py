"""Who is told of a run's steps, evaluations and saves: the protocol, and those that every run has.

class Slowest:
    def on_step(self, line):
        if line["step_seconds"] > 60:
            raise RuntimeError(f"step {line['step']} took a minute")

    def on_evaluation(self, line): ...

    def on_save(self, step, folder): ...
"""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from jllama.cli.terminal import Progress, console
from jllama.errors import InputError
from jllama.folders.json_files import as_line, naming, write_json_lines
from jllama.folders.run import EpochLine, EvaluationLine, RunFolder, StepLine
from train.config import TrainConfig


class Callback(Protocol):
    """Told of a run, in the process that trains, by its lines of metrics.jsonl.

    One that is a context manager, too, is entered before the first step and left when the run ends,
    however it ends.

    On a GPU the figures of a step are fetched while the next one runs, so that nothing waits for
    them: `on_step` is told of step n when step n + 1 has been started.

    What a method raises ends the run when the step that runs is done: the state is saved, and a
    resume goes on from it.
    """

    def on_step(self, line: StepLine) -> None:
        """After an optimizer step: {"step": 7, "loss": 2.1, "tokens": 400, "rows": [...], ...}."""

    def on_evaluation(self, line: EpochLine | EvaluationLine) -> None:
        """After an epoch its mean {"step": 7, "epoch": 1, "epoch_loss": 2.3, "tokens": 2800}; after
        an evaluation {"step": 7, "eval_loss": 2.2, "eval_tokens": 320}, before step 1 with step 0.
        """

    def on_save(self, step: int, folder: Path) -> None:
        """When the state of a step, what `--resume` goes on from, is in a folder."""


class Callbacks:
    """All callbacks of a run, entered and told in their order.

    What a given one raises is kept in `error`, and no given one is told more: the loop ends the run
    and raises it.

    Args:
        own: of the run itself, whose errors end it at once.
        given: by the caller.
    """

    def __init__(self, own: Sequence[Callback] = (), given: Sequence[Callback] = ()):
        self._own, self._given = own, given
        self.error: BaseException | None = None

    def __enter__(self) -> "Callbacks":
        with contextlib.ExitStack() as entered:
            callbacks: tuple[Any, ...] = (*self._own, *self._given)
            for callback in callbacks:
                if hasattr(callback, "__exit__"):
                    entered.enter_context(callback)
            self._entered = entered.pop_all()
        return self

    def __exit__(self, *why: Any) -> None:
        self._entered.__exit__(*why)

    def on_step(self, line: StepLine) -> None:
        self._tell("on_step", line)

    def on_evaluation(self, line: EpochLine | EvaluationLine) -> None:
        self._tell("on_evaluation", line)

    def on_save(self, step: int, folder: Path) -> None:
        self._tell("on_save", step, folder)

    def _tell(self, method: str, *news: Any) -> None:
        for callback in self._own:
            getattr(callback, method)(*news)
        for callback in self._given:
            if self.error is not None:
                return
            try:
                getattr(callback, method)(*news)
            except (Exception, KeyboardInterrupt) as error:
                self.error = error


class MetricsFile:
    """metrics.jsonl, a JSON object a line. What is not finite is null.

    Args:
        kept: lines of the run so far, for a run that is resumed.
    """

    def __init__(self, path: Path, kept: Sequence[Mapping[str, Any]] = ()):
        self._path, self._kept = path, kept

    def __enter__(self) -> "MetricsFile":
        write_json_lines(self._path, self._kept)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def on_step(self, line: StepLine | EpochLine | EvaluationLine) -> None:
        with naming(self._path):
            self._file.write(as_line(line))

    on_evaluation = on_step

    def on_save(self, step: int, folder: Path) -> None: ...


class TensorBoard:
    """The same figures for TensorBoard, which reads all event files of a folder as one run.

    By its own event writer: the usual ones bring torch or TensorFlow.

    Args:
        first_step: TensorBoard drops what earlier files hold of this step and later ones, so a
            resumed run shows no step twice.
    """

    def __init__(self, folder: Path, first_step: int = 0):
        self._folder, self._first_step = folder, first_step

    def __enter__(self) -> "TensorBoard":
        self._file = EventFileWriter(str(self._folder))
        self._add(Event(step=self._first_step, session_log=SessionLog(status=SessionLog.START)))
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def on_step(self, line: StepLine | EpochLine | EvaluationLine) -> None:
        values = [Summary.Value(tag=name, simple_value=x) for name, x in _figures(line).items()]
        self._add(Event(step=line["step"], summary=Summary(value=values)))

    on_evaluation = on_step

    def on_save(self, step: int, folder: Path) -> None: ...

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.add_event(event)


class WeightsAndBiases:
    """The same figures for a project of Weights & Biases.

    Raises:
        InputError: when it is entered and wandb is not installed.
    """

    def __init__(self, project: str, folder: Path):
        self._project, self._folder = project, folder

    def __enter__(self) -> "WeightsAndBiases":
        try:
            import wandb
        except ImportError:
            raise InputError(
                "--wandb-project needs wandb, which is not installed: pip install wandb"
            ) from None
        name, folder = self._folder.name, self._folder
        self._run = wandb.init(project=self._project, name=name, dir=folder, resume="allow")
        return self

    def __exit__(self, *_: object) -> None:
        self._run.finish()

    def on_step(self, line: StepLine | EpochLine | EvaluationLine) -> None:
        self._run.log(_figures(line), step=line["step"])

    on_evaluation = on_step

    def on_save(self, step: int, folder: Path) -> None: ...


class Terminal:
    """The progress bar, and a line for every epoch and evaluation.

    Args:
        steps: of the whole run.
        done: of them, when it goes on.
        best: the lowest held-out loss until then.
    """

    def __init__(self, steps: int, done: int = 0, best: float = math.inf):
        self._bar = Progress("train", steps, "steps", done, note="compiling the step")
        self._best = best

    def __enter__(self) -> "Terminal":
        self._bar.__enter__()
        return self

    def __exit__(self, *why: object) -> None:
        self._bar.__exit__(*why)

    def on_step(self, line: StepLine) -> None:
        loss = "skipped" if line["skipped"] else f"loss {_shown(line['loss'])}"
        self._bar.advance(f"{loss}  {line['tokens_per_second']:,.0f} tokens/s")

    def on_evaluation(self, line: EpochLine | EvaluationLine) -> None:
        if "epoch" in line:
            console.print(f"epoch {line['epoch']}: average loss {_shown(line['epoch_loss'])}")
            return
        loss = line["eval_loss"]
        better = loss is not None and loss < self._best
        best = " (best)" if better and line["step"] else ""
        self._best = loss if better and loss is not None else self._best
        console.print(f"step {line['step']}: held-out loss {_shown(loss)}{best}")

    def on_save(self, step: int, folder: Path) -> None: ...


def own_callbacks(
    config: TrainConfig, run: RunFolder, steps: int, start: int, kept: Sequence[Mapping[str, Any]]
) -> list[Callback]:
    """Those of every run; of several processes the first one writes.

    Args:
        start: the step after which it goes on, 0 for a new run.
        kept: its lines until then.
    """
    writers: list[Callback] = []
    if jax.process_index() == 0:
        events = TensorBoard(run.tensorboard, start + 1 if start else 0)
        writers = [MetricsFile(run.metrics, kept), events]
        if config.wandb_project:
            writers.append(WeightsAndBiases(config.wandb_project, run.path))
    losses = (line["eval_loss"] for line in kept if "eval_loss" in line)
    best = min((loss for loss in losses if loss is not None), default=math.inf)
    return [*writers, Terminal(steps, start, best)]


def _figures(line: StepLine | EpochLine | EvaluationLine) -> dict[str, int | float]:
    """The numbers of a line, without the step's own."""
    return {
        name: value
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    }


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
