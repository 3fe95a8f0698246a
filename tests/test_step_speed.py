"""The measured training step: random weights, its rows, and what is written down."""

import json
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jllama.config import LlamaConfig
from jllama.folders.load import random_model
from jllama.model import named_arrays
from train.profile import launched
from train.speed import DOCUMENT, StepSpeed, main, random_window

CONFIG = LlamaConfig(64, 2, 4, 2, 96, 128)


@pytest.mark.promotes
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_random_weights_have_their_dtype_and_give_logits_of_order_one(precision, dtype):
    model = random_model(CONFIG, precision)
    arrays = named_arrays(nnx.state(model))
    assert {x.dtype for x in arrays.values()} == {
        jnp.dtype({"fp32": "f4"}.get(precision, "bfloat16"))
    }
    assert sum(x.size for x in arrays.values()) == CONFIG.parameter_count
    assert all(np.all(np.asarray(x) == 1) for x in arrays.values() if x.ndim == 1)
    logits = model(jnp.arange(64)[None])
    assert 0.5 < float(logits.std()) < 2
    again, other = random_model(CONFIG, precision), random_model(CONFIG, precision, seed=1)
    assert jnp.array_equal(again(jnp.arange(64)[None]), logits)
    assert not jnp.array_equal(other(jnp.arange(64)[None]), logits)


def test_two_weights_of_one_shape_are_not_the_same():
    layer = random_model(CONFIG, "fp32").layers[0]
    one, other = layer.attention.wq.weight[...], layer.attention.wo.weight[...]
    assert abs(float(jnp.corrcoef(one.ravel(), other.ravel())[0, 1])) < 0.1


def test_packed_rows_hold_documents_that_end_where_nothing_is_learned():
    T = 2 * DOCUMENT + 50
    shape = {"micro_batch_size": 2, "max_seq_len": T}
    config = StepSpeed(**shape, gradient_accumulation_steps=3, packing=True)
    window = random_window(config, vocab_size=99)
    assert window.tokens.shape == (3, 2, T)
    ((rows, _),) = window.documents
    lengths = np.count_nonzero(rows[1] < 2 * T, axis=1)
    assert sorted(lengths) == [50, 50, *[DOCUMENT] * 4]
    assert np.array_equal(window.positions[2, 1][DOCUMENT:], np.arange(T - DOCUMENT) % DOCUMENT)
    ends = np.flatnonzero(~window.mask[0, 0])
    assert ends.tolist() == [DOCUMENT - 1, 2 * DOCUMENT - 1]
    plain = random_window(StepSpeed(**shape), vocab_size=99)
    assert plain.documents is None
    assert plain.mask.all()
    assert np.array_equal(plain.tokens[..., 1:], plain.targets[..., :-1])


# What `jax.profiler.ProfileData` is made of.
Plane = namedtuple("Plane", ["name", "lines"])
Line = namedtuple("Line", ["name", "events"])
Event = namedtuple("Event", ["name", "duration_ns", "stats"])
KINDS = {"loop_add_fusion.3": "norms", "dot.1": "matmuls", "cublas-gemm.2": "adapters"}


def event(name, instruction="", nanoseconds=10.0):
    return Event(name, nanoseconds, [("hlo_op", instruction)] if instruction else [])


def test_kernels_of_a_card_are_those_of_its_streams_by_instruction_or_by_name():
    streams = [
        event("loop_add_fusion_3", "loop_add_fusion.3"),
        event("loop_add_fusion_3"),  # in a graph, which carries no names of instructions
        event("nvjet_tst_128x256", "cublas-gemm.2"),
        event("nvjet_tst_128x256"),
        event("cudnn_generated_fort_native_sdpa_sm90_flash_bprop"),
        event("MemcpyD2D"),
        event("what_is_this"),
    ]
    planes = [
        Plane("/host:CPU", [Line("python", [event("dot.1", "dot.1")])]),
        Plane("/device:GPU:0", [Line("Stream #13(Compute)", streams),
                                Line("XLA Modules", [event("jit_train_step")])]),
    ]  # fmt: skip
    assert [kind for kind, _ in launched(planes, KINDS)] == [
        "norms", "norms", "adapters", "matmuls", "attention", "copies", "other"
    ]  # fmt: skip


def test_kernels_of_a_cpu_are_the_instructions_of_the_program():
    events = [
        event("dot.1", "dot.1", 7.0),
        event("end: dot.1", "dot.1"),
        event("ParseArguments"),
        event("while.2", "while.2"),
    ]
    planes = [Plane("/host:CPU", [Line("tf_XLAPjRtCpuClient/1", events)])]
    assert list(launched(planes, KINDS)) == [("matmuls", 7.0)]


@pytest.mark.integration
def test_the_steps_of_two_processes_are_bit_equal_and_counted(tmp_path):
    shape = ["--micro-batch-size", "1", "--max-seq-len", "16", "--gradient-accumulation-steps", "2"]
    flags = [*shape, "--precision", "fp32", "--steps", "3", "--warmup-steps", "2", "--profile"]
    found = []
    for name in ("a.json", "b.json"):
        main([*flags, "--output", str(tmp_path / name)])
        found.append(json.loads((tmp_path / name).read_text())["figures"])
    one, other = found
    assert one["learned_sha256"] == other["learned_sha256"]
    assert one["losses"] == other["losses"]
    assert len(one["losses"]) == 5  # those of the profile are not among them
    assert one["time_us_by_class"]["matmuls"] > 0
    assert one["kernels"] > 50
    assert one["losses"][-1] < one["losses"][0]
    assert len(one["seconds_of_each_step"]) == 3
    assert one["tokens_per_second"] == 2 * 16 / one["step_seconds"]
    assert one["platform"] == jax.default_backend()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "llama-9b"], "presets"),
        (["--model", "sample", "--max-seq-len", "99999"], "context"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
