"""What a run says of itself: `metrics.jsonl`, TensorBoard, averages and tokens per second."""

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from jllama.errors import InputError
from jllama.files import read_json_lines, write_json_lines
from train.show import console
from train.step import StepMetrics, planned_bytes

FILE = "metrics.jsonl"


class Metrics:
    """One JSON object a line; a resumed run keeps the lines up to its step.

        {"step": 7, "loss": 2.1, "loss_sum": 840.0, "tokens": 400, "grad_norm": 0.3, ...}
        {"step": 7, "epoch": 1, "epoch_loss": 2.3, "tokens": 2800}
        {"step": 7, "eval_loss": 2.2, "eval_tokens": 320}

    Losses are nats per supervised token; averages are token-weighted.
    """

    def __init__(self, folder: Path, resumed_step: int = 0, wandb_project: str = ""):
        old = self.read(folder) if resumed_step else []  # step 0 is evaluated again, too
        kept = [line for line in old if line["step"] <= resumed_step]
        path = folder / FILE
        write_json_lines(path, kept)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
        self._wandb = _wandb_run(wandb_project, folder)
        self.epoch_losses = [line["epoch_loss"] for line in kept if "epoch_loss" in line]
        self.eval_losses = [line["eval_loss"] for line in kept if "eval_loss" in line]
        self.skipped_in_a_row = 0
        self.planned_mib = 0.0
        ended = max((line["step"] for line in kept if "epoch_loss" in line), default=0)
        self._epoch = [
            line for line in kept if line.get("loss_sum") is not None and line["step"] > ended
        ]
        self._started = self._last = time.perf_counter()

    @staticmethod
    def read(folder: Path) -> list[dict[str, Any]]:
        """All lines of a run so far."""
        return read_json_lines(folder / FILE)

    def step(self, step: int, measured: StepMetrics, **more: Any) -> dict[str, Any]:
        """Records one optimizer step.

        What is not finite is recorded as null and left out of the epoch's average.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        loss_sum, tokens = float(measured.loss_sum), int(measured.tokens)
        line = {
            "step": step,
            "loss": _finite(loss_sum / max(1, tokens)),
            "loss_sum": _finite(loss_sum),
            "tokens": tokens,
            "grad_norm": _finite(float(measured.grad_norm)),
            "update_ratio": _finite(float(measured.update_ratio)),
            "skipped": bool(measured.skipped),
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_mib": peak_memory_mib(),
            "planned_memory_mib": self.planned_mib,
            **more,
        }
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if line["skipped"] else 0
        if line["loss_sum"] is not None:
            self._epoch.append(line)
        self._write(line)
        return line

    def planned(self, memory: Any) -> None:
        """Takes note of what XLA's buffer assignment of a compiled step says."""
        self.planned_mib = max(self.planned_mib, planned_bytes(memory) / 2**20)

    def end_epoch(self, step: int) -> None:
        """Records and prints the average loss of the epoch that ends with `step`."""
        tokens = sum(line["tokens"] for line in self._epoch)
        loss = sum(line["loss_sum"] for line in self._epoch) / max(1, tokens)
        self._epoch = []
        self.epoch_losses.append(loss)
        epoch = len(self.epoch_losses)
        self._write({"step": step, "epoch": epoch, "epoch_loss": loss, "tokens": tokens})
        console.print(f"epoch {epoch}: average loss {loss:.4f}")

    def evaluation(self, step: int, loss: float, tokens: int) -> bool:
        """Records and prints a held-out loss; True if training made it the lowest so far."""
        best = min(self.eval_losses, default=math.inf)
        self.eval_losses.append(loss)
        self._write({"step": step, "eval_loss": loss, "eval_tokens": tokens})
        better = loss < best and step > 0
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

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        figures = {
            name: value
            for name, value in line.items()
            if name != "step" and isinstance(value, int | float)
        }
        for name, value in figures.items():
            self._tensorboard.add_scalar(name, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(figures, step=line["step"])

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


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


def peak_memory_mib() -> float:
    """Peak of the device's memory; on a CPU, of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux ru_maxrss begins with the peak of the process that started it
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
