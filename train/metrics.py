"""What a run says of itself: `metrics.jsonl`, the averages of an epoch, tokens per second."""

import json
import math
import time
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class Metrics:
    """One JSON object a line: `{"step": ...}` per optimizer step, `{"epoch": ...}` per epoch.

    Averages are token-weighted: summed cross-entropy over supervised tokens.
    """

    def __init__(self, folder: Path, resumed_step: int = 0):
        self._path = folder / FILE
        kept = [line for line in self.read(folder) if line["step"] <= resumed_step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        ends = [line for line in kept if "epoch_loss" in line]
        ended = ends[-1]["step"] if ends else 0
        self._epoch = [
            line for line in kept if line.get("loss_sum") is not None and line["step"] > ended
        ]
        self.epoch_losses: list[float] = [line["epoch_loss"] for line in ends]
        self._last = time.perf_counter()

    @staticmethod
    def read(folder: Path) -> list[dict[str, Any]]:
        """All lines of a run so far."""
        path, lines = folder / FILE, []
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break  # cut short by a kill; what follows is written again
        return lines

    def step(self, step: int, loss_sum: float, tokens: int, **more: Any) -> dict[str, Any]:
        """Records one optimizer step; `tokens` are the supervised ones.

        A loss that is not finite is recorded as null and left out of the epoch's average.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        finite = math.isfinite(loss_sum)
        line = {
            "step": step,
            "loss": loss_sum / max(1, tokens) if finite else None,
            "loss_sum": loss_sum if finite else None,
            "tokens": tokens,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            **more,
        }
        if finite:
            self._epoch.append(line)
        self.write(line)
        return line

    def end_epoch(self, step: int) -> float:
        """Records and returns the average loss of the epoch that ends with `step`."""
        tokens = sum(line["tokens"] for line in self._epoch)
        loss = sum(line["loss_sum"] for line in self._epoch) / max(1, tokens)
        self._epoch = []
        self.epoch_losses.append(loss)
        epoch = len(self.epoch_losses)
        self.write({"step": step, "epoch": epoch, "epoch_loss": loss, "tokens": tokens})
        return loss

    def restart_clock(self) -> None:
        """What happened since the last step (an evaluation, a save) is not the next step's."""
        self._last = time.perf_counter()

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()
