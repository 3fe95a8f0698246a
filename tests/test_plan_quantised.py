"""Bases in 8 and 4 bits, compiled for cards that are not there: memory, copies, what is predicted.

These need the packages of the `plan` extra.
"""

from dataclasses import replace

import pytest

from jllama.config import PRESETS, Base, LoraConfig, linear_shapes, weight_bytes
from train.plan.arithmetic import Step
from train.plan.cards import GPUS
from train.plan.compiled import Request
from train.plan.hlo import read_program
from train.plan.planner import can_compile, estimate, make_plans

MIB = 2**20
SEVEN = PRESETS["llama-2-7b"]
INT8, INT4, NF4 = Base("int8"), Base("int4"), Base("nf4")
CARDS = ("h200", "rtx-4090")
PASSED_ON = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "opt-barrier",
             "conditional", "async-start", "async-done")  # fmt: skip
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not can_compile(), reason="the packages of jllama[plan] are not installed"
    ),
]  # fmt: skip


def seven(base, rows, length, remat="block", layers=32):
    model = replace(SEVEN, n_layers=layers)
    return Step(model, LoraConfig(), "bf16", remat, rows, length, 2, base=base)


def as_large_as_weights(text):
    """What a program makes outside of its kernels that has the size of a linear's weight."""
    program = read_program(text)
    linears = {rows * width for rows, width in linear_shapes(SEVEN).values()}
    inside, found = set(), []
    for computation in program.computations.values():
        for line in computation.instructions.values():
            inside |= {line.calls(kind) for kind in ("calls", "to_apply")}
    for name, computation in program.computations.items():
        if name not in inside:
            found += [
                (line.opcode, shape)
                for line in computation.instructions.values()
                for shape in line.shapes
                if shape.elements in linears and line.opcode not in PASSED_ON
            ]
    return found


@pytest.mark.parametrize(
    ("base", "card", "rows", "length", "remat"),
    [
        (INT8, "h200", 1, 512, "none"),
        (INT8, "rtx-4090", 1, 512, "block"),
        (INT4, "h200", 1, 512, "block"),
        (INT4, "rtx-4090", 1, 512, "none"),
        (INT4, "h200", 1, 3072, "block"),  # 4,096 rows would look like a weight
    ],
    ids=str,
)
def test_a_step_makes_no_matrix_of_int8_and_int4(tmp_path, base, card, rows, length, remat):
    text = tmp_path / "step.txt"
    make_plans(
        [Request(seven(base, rows, length, remat, 2), GPUS[card], text=str(text))], GPUS[card]
    )
    assert not as_large_as_weights(text.read_text())


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("base", [INT8, INT4], ids=str)
def test_decoding_makes_no_matrix_of_int8_and_int4_and_reads_fewer_bytes(tmp_path, card, base):
    text, gpu = tmp_path / "decode.txt", GPUS[card]
    requests = [
        Request(seven(some, 1, 512, layers=2), gpu, "decode", text=str(text) if some else "")
        for some in (base, None)
    ]
    plan, plain = make_plans(requests, gpu)
    assert not as_large_as_weights(text.read_text())
    saved = 1 - weight_bytes(plan.step.model, "bf16", base) / weight_bytes(SEVEN, "bf16")
    assert saved > 0
    per_token = [sum(p.time_us[kind] for kind in ("matmuls", "launches")) for p in (plan, plain)]
    assert per_token[0] < {"int8": 0.75, "int4": 0.62}[base.format] * per_token[1]


@pytest.mark.parametrize(
    ("base", "card", "rows", "length", "most"),
    [
        (INT4, "rtx-4090", 1, 512, 4_200),
        (INT4, "h200", 8, 1024, 7_050),
        (NF4, "h200", 1, 512, 4_600),
        (NF4, "rtx-4090", 8, 1024, 7_300),
        (INT8, "h200", 8, 1024, 9_950),
    ],
    ids=str,
)
def test_7b_takes(base, card, rows, length, most):
    gpu = GPUS[card]
    (plan,) = make_plans([Request(seven(base, rows, length), whole=False)], gpu)
    assert plan.peak < most * MIB
    assert plan.classes["base_weights"] == weight_bytes(SEVEN, "bf16", base)
    rough = estimate(plan.step, gpu)
    assert rough.peak == pytest.approx(plan.peak, rel=0.15)
    assert plan.predicted < plan.bound


def test_nf4_keeps_no_matrix_for_the_backward_pass():
    """Without remat a layer adds what it adds with weights as they are, which are arguments."""
    layers = [
        make_plans([Request(seven(base, 1, 512, "none", 8), whole=False)], GPUS["h200"])[0]
        for base in (NF4, None)
    ]
    coded, plain = (plan.classes["saved_activations"] for plan in layers)
    assert coded < plain + 8 * MIB
