"""The figures of an ablation's cells: their names and units in words, and memory by class."""

from typing import NamedTuple


class Words(NamedTuple):
    """How a figure is called and written: `factor` turns its unit into the one shown."""

    name: str
    unit: str
    factor: float = 1
    digits: int = 0

    @property
    def title(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def write(self, value: float) -> str:
        return f"{self.factor * value:,.{self.digits}f}"


FIGURES = {
    "peak_memory_mib": Words("measured peak memory", "MiB"),
    "planned_memory_mib": Words("planned memory", "MiB", digits=1),
    "peak_mib": Words("planned memory", "MiB"),
    "weights_mib": Words("weights", "MiB"),
    "accumulator_mib": Words("gradient accumulator", "MiB"),
    "optimizer_state_mib": Words("optimizer state", "MiB"),
    "working_mib": Words("working memory", "MiB"),
    "activations_mib": Words("saved activations", "MiB"),
    "temporaries_mib": Words("other temporaries", "MiB"),
    "step_seconds": Words("time of a step", "ms", 1000),
    "tokens_per_second": Words("learned", "tokens/s"),
    "flops_per_token": Words("operations per token", "GFLOP", 1e-9, 1),
    "bound_tokens_per_second": Words("at most", "tokens/s"),
    "trainable_parameters": Words("trainable parameters", ""),
}
# With what a table shows, but no technique is judged by.
WORDS = FIGURES | {
    "free_mib": Words("free on the card", "MiB"),
    "loss": Words("last loss", "nats/token", digits=4),
}
PEAKS = ("peak_mib", "planned_memory_mib")  # of planned cells, of measured ones
# Figure -> classes of `train.plan` that it sums.
CLASSES = {
    "weights_mib": ("base_weights", "adapters", "learned_weights"),
    "accumulator_mib": ("accumulator",),
    "optimizer_state_mib": ("optimizer_state",),
    "working_mib": ("saved_activations", "temporaries"),
}
# The same of LoRA cells only. `train.plan` tells saved activations by what each layer adds to the
# temporaries, and with full tuning that holds the gradients of the layer's weights, too.
CLASSES_OF_LORA = {
    "activations_mib": ("saved_activations",),
    "temporaries_mib": ("temporaries",),
}
