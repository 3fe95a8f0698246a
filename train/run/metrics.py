"""The figures of a run: what its callbacks are told, averages and tokens per second."""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jllama.errors import InputError
from jllama.folders.run import EpochLine, EvaluationLine, RunFolder, StepLine
from jllama.machine import peak_memory_mib
from train.callbacks import Callbacks
from train.step import StepMetrics


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run measured. Losses are nats per supervised token; what is not finite is inf.

    Args:
        losses: of every optimizer step, those before a resume included.
        epoch_losses: token-weighted means.
        eval_losses: of the held-out rows, the first before step 1.
        seconds: that this process trained.
        peak_memory_mib: of the fullest device; on a CPU of the whole process.
        planned_memory_mib: of the training step alone, as XLA assigned its buffers.
    """

    losses: tuple[float, ...] = dataclasses.field(repr=False)
    epoch_losses: tuple[float, ...]
    eval_losses: tuple[float, ...]
    seconds: float
    peak_memory_mib: float
    planned_memory_mib: float


NOTHING = Result((), (), (), 0.0, 0.0, 0.0)  # of a dry run


class Metrics:
    """The figures so far; each new line is told to the callbacks.

    Losses are nats per supervised token; averages are token-weighted.

    Args:
        kept: lines of a resumed run up to its step, of `read_history`.
        peak_memory_mib: of the fullest device.
    """

    def __init__(
        self,
        callbacks: Callbacks,
        kept: Sequence[Mapping[str, Any]] = (),
        peak_memory_mib: Callable[[], float] = peak_memory_mib,
    ):
        self._callbacks, self._peak_memory_mib = callbacks, peak_memory_mib
        self.losses = [_number(line["loss"]) for line in kept if "loss" in line]
        self.epoch_losses = [_number(line["epoch_loss"]) for line in kept if "epoch_loss" in line]
        self.eval_losses = [_number(line["eval_loss"]) for line in kept if "eval_loss" in line]
        self.skipped = sum(line.get("skipped", False) for line in kept)
        self.skipped_in_a_row = 0
        self.planned_mib = 0.0
        self._begin_epoch()
        ended = max((line["step"] for line in kept if "epoch_loss" in line), default=0)
        for line in kept:
            if "loss_sum" in line and line["step"] > ended:
                self._count(line["loss_sum"], line["tokens"])
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
        """Tells of one optimizer step; a loss that is not finite is left out of the epoch's."""
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
        self.losses.append(_number(line["loss"]))
        self.planned_mib = planned_memory_mib
        self.skipped += line["skipped"]
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if line["skipped"] else 0
        self._count(line["loss_sum"], tokens)
        self._callbacks.on_step(line)
        return line

    def end_epoch(self, step: int) -> None:
        """Tells of the average loss of the epoch that ends with `step`."""
        loss = self._epoch_sum / self._epoch_tokens if self._epoch_tokens else math.inf
        tokens = self._epoch_tokens
        self._begin_epoch()
        self.epoch_losses.append(loss)
        epoch = len(self.epoch_losses)
        self._callbacks.on_evaluation(
            {"step": step, "epoch": epoch, "epoch_loss": _finite(loss), "tokens": tokens}
        )

    def evaluation(self, step: int, loss: float, tokens: int) -> bool:
        """Tells of a held-out loss; True if training made it the lowest so far."""
        better = loss < min(self.eval_losses, default=math.inf) and step > 0
        self.eval_losses.append(loss if math.isfinite(loss) else math.inf)
        self._callbacks.on_evaluation(
            {"step": step, "eval_loss": _finite(loss), "eval_tokens": tokens}
        )
        return better

    @property
    def evaluations_since_best(self) -> int:
        losses = self.eval_losses
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def restart_clock(self) -> None:
        """What happened since the last step (an evaluation, a save) is not the next step's."""
        self._last = time.perf_counter()

    def result(self) -> Result:
        """All of it, when the run is over."""
        return Result(
            losses=tuple(self.losses),
            epoch_losses=tuple(self.epoch_losses),
            eval_losses=tuple(self.eval_losses),
            seconds=time.perf_counter() - self._started,
            peak_memory_mib=self._peak_memory_mib(),
            planned_memory_mib=self.planned_mib,
        )

    def _begin_epoch(self) -> None:
        self._epoch_sum, self._epoch_tokens = 0.0, 0

    def _count(self, loss_sum: float | None, tokens: int) -> None:
        if loss_sum is not None:
            self._epoch_sum += loss_sum
            self._epoch_tokens += tokens


def read_history(
    run: RunFolder, resumed_step: int, evaluated: Collection[int]
) -> list[StepLine | EpochLine | EvaluationLine]:
    """The lines of a resumed run up to its step.

    Args:
        evaluated: steps up to it after which there was an evaluation.

    Raises:
        InputError: if the file is damaged or lacks a step or an evaluation.
    """
    lines = run.read_metrics().values if resumed_step else []  # step 0 is evaluated again, too
    kept = [line for line in lines if line["step"] <= resumed_step]
    steps = [line["step"] for line in kept if "loss" in line]
    evaluations = {line["step"] for line in kept if "eval_loss" in line}
    if steps != list(range(1, resumed_step + 1)) or not evaluations >= set(evaluated):
        raise InputError(
            f"{run.metrics}: not every step and evaluation up to step {resumed_step} is there, "
            "whose state was saved; restore the file, or start a new run"
        )
    return kept  # type: ignore[return-value]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(found: float | None) -> float:
    return math.inf if found is None else found
