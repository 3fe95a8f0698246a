"""The figures of every step, fetched while the next one runs."""

import jax
import numpy as np
from jaxtyping import Float

from jllama.cli.terminal import console
from jllama.errors import InputError
from train.run.metrics import Metrics
from train.step import Programs, StepMetrics
from train.stream import Stream

SKIPPED_IN_A_ROW = 5  # steps without a finite gradient after which a run gives up


class Reports:
    """Fetches the figures of a step while the next one runs, so that nothing waits for them.

    A CPU runs a step before it returns: there each step is reported at once.

    Args:
        rates: the learning rate of every step; asked one by one, the device would wait.
    """

    def __init__(
        self,
        metrics: Metrics,
        batches: Stream,
        rates: Float[np.ndarray, " steps"],
        programs: Programs,
    ):
        self._metrics, self._batches = metrics, batches
        self._rates, self._programs = rates, programs
        self._waiting: tuple[int, StepMetrics] | None = None
        self._compile_seconds = 0.0  # of those that were told
        self._lags = jax.default_backend() != "cpu"

    def add(self, step: int, measured: StepMetrics) -> None:
        """Takes the figures of a step, on the device, and reports those of the one before.

        Raises:
            InputError: if so many steps in a row had no finite gradient that the run gives up.
        """
        self.catch_up()
        self._waiting = step, measured
        if not self._lags:
            self.catch_up()

    def catch_up(self) -> None:
        """Reports what waits; errors as for `add`."""
        if self._waiting is None:
            return
        took = self._programs.compile_seconds - self._compile_seconds
        if took:
            self._compile_seconds += took
            console.print(f"compiled the step in {took:.1f} s")
        (step, measured), self._waiting = self._waiting, None
        line = self._metrics.step(
            step,
            jax.device_get(measured),
            planned_memory_mib=self._programs.planned_bytes / 2**20,
            learning_rate=float(self._rates[step - 1 - self._metrics.skipped]),
            padding_share=self._batches.padding_share(step - 1),
            rows=self._batches.rows(step - 1),
            compilations=self._programs.compilations,
        )
        if self._metrics.skipped_in_a_row == SKIPPED_IN_A_ROW:
            raise InputError(
                f"no finite gradient in steps {step - SKIPPED_IN_A_ROW + 1} to {step} (rows "
                f"{line['rows'][:8]}); the state before them is kept. Lower --learning-rate, "
                "or train with --precision fp32"
            )
