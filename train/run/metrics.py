"""What a run says of itself: `metrics.jsonl`, TensorBoard, averages and tokens per second."""

import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jllama.cli.terminal import console
from jllama.errors import InputError
from jllama.folders.json_files import as_line, naming, write_json_lines
from jllama.folders.run import EpochLine, EvaluationLine, RunFolder, StepLine
from jllama.machine import peak_memory_mib
from train.run.events import Events
from train.step import StepMetrics


class Metrics:
    """One JSON object a line; a resumed run keeps the lines up to its step.

    Of several processes the first one writes; all of them know all figures.

        {"step": 7, "loss": 2.1, "loss_sum": 840.0, "tokens": 400, "grad_norm": 0.3, ...}
        {"step": 7, "epoch": 1, "epoch_loss": 2.3, "tokens": 2800}
        {"step": 7, "eval_loss": 2.2, "eval_tokens": 320}

    Losses are nats per supervised token; averages are token-weighted. What is not finite is null.

    Args:
        evaluated: steps up to the resumed one after which there was an evaluation.
        peak_memory_mib: of the fullest device.

    Raises:
        InputError: if the file of a resumed run is damaged or lacks a step or an evaluation.
    """

    def __init__(
        self,
        run: RunFolder,
        resumed_step: int = 0,
        evaluated: Collection[int] = (),
        wandb_project: str = "",
        peak_memory_mib: Callable[[], float] = peak_memory_mib,
    ):
        old = run.read_metrics().values if resumed_step else []  # step 0 is evaluated again, too
        kept = [line for line in old if line["step"] <= resumed_step]
        _check_history(run.metrics, kept, resumed_step, evaluated)
        self._path, self._peak_memory_mib = run.metrics, peak_memory_mib
        self._writes = jax.process_index() == 0
        if self._writes:
            write_json_lines(run.metrics, kept)
            self._file = run.metrics.open("a", encoding="utf-8", buffering=1)
            self._events = Events(run.tensorboard, resumed_step + 1 if resumed_step else 0)
            self._wandb = _wandb_run(wandb_project, run.path)
        self.epoch_losses = [_number(line["epoch_loss"]) for line in kept if "epoch_loss" in line]
        self.eval_losses = [_number(line["eval_loss"]) for line in kept if "eval_loss" in line]
        self.skipped = sum(line.get("skipped", False) for line in kept)
        self.skipped_in_a_row = 0
        self.planned_mib = 0.0
        ended = max((line["step"] for line in kept if "epoch_loss" in line), default=0)
        self._epoch = [
            line for line in kept if line.get("loss_sum") is not None and line["step"] > ended
        ]
        self._started = self._last = time.perf_counter()

    def step(
        self,
        step: int,
        measured: StepMetrics,
        *,
        planned_memory_mib: float,
        learning_rate: float,
        padding_share: float,
        rows: list[int],
        compilations: int,
    ) -> StepLine:
        """Records one optimizer step; a loss that is not finite is left out of the epoch's."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        loss_sum, tokens = float(measured.loss_sum), int(measured.tokens)
        line: StepLine = {
            "step": step,
            "loss": _finite(loss_sum / max(1, tokens)),
            "loss_sum": _finite(loss_sum),
            "tokens": tokens,
            "grad_norm": _finite(float(measured.grad_norm)),
            "update_ratio": _finite(float(measured.update_ratio)),
            "skipped": bool(measured.skipped),
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_mib": self._peak_memory_mib(),
            "planned_memory_mib": planned_memory_mib,
            "learning_rate": learning_rate,
            "padding_share": padding_share,
            "rows": rows,
            "compilations": compilations,
        }
        self.planned_mib = planned_memory_mib
        self.skipped += line["skipped"]
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if line["skipped"] else 0
        if line["loss_sum"] is not None:
            self._epoch.append(line)
        self._write(line)
        return line

    def end_epoch(self, step: int) -> None:
        """Records and prints the average loss of the epoch that ends with `step`."""
        tokens = sum(line["tokens"] for line in self._epoch)
        loss = sum(line["loss_sum"] for line in self._epoch) / tokens if tokens else math.nan
        self._epoch = []
        self.epoch_losses.append(loss)
        epoch = len(self.epoch_losses)
        self._write({"step": step, "epoch": epoch, "epoch_loss": _finite(loss), "tokens": tokens})
        console.print(f"epoch {epoch}: average loss {loss:.4f}")

    def evaluation(self, step: int, loss: float, tokens: int) -> bool:
        """Records and prints a held-out loss; True if training made it the lowest so far."""
        better = loss < min(self.eval_losses, default=math.inf) and step > 0
        self.eval_losses.append(loss if math.isfinite(loss) else math.inf)
        self._write({"step": step, "eval_loss": _finite(loss), "eval_tokens": tokens})
        console.print(f"step {step}: held-out loss {loss:.4f}" + (" (best)" if better else ""))
        return better

    @property
    def evaluations_since_best(self) -> int:
        losses = self.eval_losses
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    @property
    def seconds(self) -> float:
        """Since this process began to train."""
        return time.perf_counter() - self._started

    def restart_clock(self) -> None:
        """What happened since the last step (an evaluation, a save) is not the next step's."""
        self._last = time.perf_counter()

    def keep(self) -> None:
        """Has all lines on the disk: what is saved next counts on them."""
        if self._writes:
            os.fsync(self._file.fileno())

    def _write(self, line: StepLine | EpochLine | EvaluationLine) -> None:
        if not self._writes:
            return
        with naming(self._path):
            self._file.write(as_line(line))
        figures = {
            name: value
            for name, value in line.items()
            if name != "step" and isinstance(value, int | float)
        }
        self._events.scalars(figures, line["step"])
        if self._wandb is not None:
            self._wandb.log(figures, step=line["step"])

    def close(self) -> None:
        if not self._writes:
            return
        self._file.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(found: float | None) -> float:
    return math.inf if found is None else found


def _check_history(
    file: Path, lines: Sequence[Mapping[str, Any]], step: int, evaluated: Collection[int]
) -> None:
    steps = [line["step"] for line in lines if "loss" in line]
    evaluations = {line["step"] for line in lines if "eval_loss" in line}
    if steps != list(range(1, step + 1)) or not evaluations >= set(evaluated):
        raise InputError(
            f"{file}: not every step and evaluation up to step {step} is there, whose state was "
            "saved; restore the file, or start a new run"
        )


def _wandb_run(project: str, folder: Path) -> Any:
    if not project:
        return None
    try:
        import wandb
    except ImportError:
        raise InputError(
            "--wandb-project needs wandb, which is not installed: pip install wandb"
        ) from None
    return wandb.init(project=project, name=folder.name, dir=folder, resume="allow")
