"""What decoding runs on a GPU, read in the program that is compiled for an H200 which is not there.

These need the packages of the `plan` extra.
"""

import math
import re
from dataclasses import replace

import pytest

from jllama.config import PRESETS, LoraConfig
from jllama.decode.sampling import Sampling
from train.plan.arithmetic import Step
from train.plan.cards import GPUS
from train.plan.compiled import Request
from train.plan.planner import can_compile, make_plans

SEVEN = PRESETS["llama-2-7b"]
H200 = GPUS["h200"]
GREEDY = Sampling(temperature=0)
LORA = LoraConfig()  # r 16 on wq and wv
PASSED_ON = ("parameter", "get-tuple-element", "bitcast", "tuple", "while", "constant")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not can_compile(), reason="the packages of jllama[plan] are not installed"
    ),
]  # fmt: skip


def request(text, layers, rows=1, lora=LORA, sampling=GREEDY):
    """Decoding of 7B with so many layers; the program goes to the file `text`."""
    step = Step(replace(SEVEN, n_layers=layers), lora, "bf16", "none", rows, 2048)
    return Request(step, H200, "decode", text=str(text), sampling=sampling)


def decode_texts(place, *layers, **more):
    texts = [place / f"{n}.txt" for n in layers]
    make_plans([request(text, n, **more) for text, n in zip(texts, layers, strict=True)], H200)
    return [text.read_text() for text in texts]


def instructions(text):
    """(operation, elements, line) of each computation's lines, but for those inside a kernel."""
    inside = set(re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", text))
    found = {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(("HloModule", " ")):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        made = re.match(r"\s+(?:ROOT )?%?\S+ = (.*?) ([\w-]+)\(", line)
        if made and name not in inside:
            sizes = re.findall(r"\[([\d,]+)\]", made[1])
            most = max((math.prod(map(int, size.split(","))) for size in sizes), default=1)
            found.setdefault(name, []).append((made[2], most, line.strip()[:200]))
    return found


def kernels(text):
    """Launched for a token: those in the body of the loop over tokens."""
    bodies = [
        [line for operation, _, line in found if operation not in PASSED_ON]
        for found in instructions(text).values()
    ]
    return max(map(len, bodies))


@pytest.mark.parametrize(("lora", "most"), [(LORA, 16), (None, 13)], ids=["adapters", "merged"])
def test_a_greedy_token_takes_few_kernels_and_neither_sort_nor_branch(tmp_path, lora, most):
    few, more = decode_texts(tmp_path, 2, 4, lora=lora)
    assert (kernels(more) - kernels(few)) / 2 <= most
    assert kernels(few) - 2 * most <= 16  # beside the layers
    assert not re.search(r" (sort|conditional)\(", more)


def test_sampling_takes_few_kernels_and_no_sort(tmp_path):
    cut = Sampling(0.6, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    for sampling, most in ((Sampling(), 40), (cut, 70)):
        (text,) = decode_texts(tmp_path, 2, sampling=sampling)
        assert kernels(text) - 2 * 16 <= most
        assert not re.search(r" (sort|conditional)\(", text)


@pytest.mark.parametrize("rows", [1, 8])
def test_decoding_copies_neither_weights_nor_cache(tmp_path, rows):
    """Whatever is as large as a weight is an argument, or a cache that is updated in place."""
    text = tmp_path / "decode.txt"
    (plan,) = make_plans([request(text, 2, rows=rows)], H200)
    cache = rows * 2 * 2 * 2048 * 4096 * 2
    assert plan.classes["cache"] == cache
    assert plan.peak <= plan.classes["base_weights"] + cache + 60 * 2**20
    large = [
        (operation, line)
        for found in instructions(text.read_text()).values()
        for operation, elements, line in found
        if elements >= 4096 * 2048 and operation not in PASSED_ON
    ]
    update = "dynamic_update_slice" if rows == 1 else "scatter"
    assert len(large) == 2 * 2  # keys and values of every layer
    assert all(f"[{rows},2048,32,128]" in line and update in line for _, line in large)
