"""What TensorBoard shows of a run, read with TensorBoard's own reader."""

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from train_runs import recorded

from jllama.folders.run import RunFolder
from train.step import StepMetrics


def record(run, steps, *, resumed=0, worse=0.0):
    """A run that evaluates before step 1 and ends an epoch after step 4."""
    with recorded(run, resumed) as metrics:
        if not resumed:
            metrics.evaluation(0, 9.0 + worse, 12)
        for step in steps:
            measured = StepMetrics(
                jnp.float32(10 / step + worse), jnp.int32(7), jnp.float32(0.3), jnp.float32(0.01),
                jnp.bool(step == 2),
            )  # fmt: skip
            metrics.step(step, measured, planned_memory_mib=5.0, learning_rate=1e-4,
                         padding_share=0.1, rows=[step], compilations=1)  # fmt: skip
            if step == 4:
                metrics.end_epoch(step)
                metrics.evaluation(step, 2.0, 12)


def shown(run):
    """(step, value) of every figure, as TensorBoard reads the folder."""
    events = EventAccumulator(str(run.tensorboard)).Reload()

    def figures(tag):
        return [(e.step, make_ndarray(e.tensor_proto).item()) for e in events.Tensors(tag)]

    return {tag: figures(tag) for tag in events.Tags()["tensors"]}


def written(run):
    """The same of metrics.jsonl."""
    figures = {}
    for line in run.read_metrics().values:
        for name, value in line.items():
            if name not in ("step", "rows"):
                figures.setdefault(name, []).append((line["step"], float(np.float32(value))))
    return figures


@pytest.mark.parametrize("resumed", [0, 3])
def test_tensorboard_shows_what_metrics_jsonl_holds_and_no_step_twice(tmp_path, resumed):
    run = RunFolder(tmp_path)
    record(run, range(1, 6), worse=1.0)  # killed after step 5; its last state is of `resumed`
    record(run, range(resumed + 1, 8), resumed=resumed)
    assert len(written(run)["loss"]) == 7
    assert shown(run) == written(run)
