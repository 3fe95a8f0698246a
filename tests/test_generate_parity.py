"""Answers against `transformers`, and against an independent C program."""

import json

import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from meta_files import random_tensors, reference, write_meta
from random_models import BASE, GROUPED, model_folder

import jllama
from convert.from_meta import FromMeta, convert
from jllama.decode.sampling import Sampling
from jllama.model import Llama

GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 5, 9], [2], [7] * 40, [3, 4, 5, 6, 7]]
FAMILIES = {
    "multi-head": (BASE, False),
    "grouped": (GROUPED, False),
    "tied": (GROUPED, True),
    "scaled": (GROUPED | {"rope_theta": 500000.0, "use_scaled_rope": True}, False),
}
EIGHT = [*PROMPTS, [8] * 33, [9, 1], [11] * 7, [12, 13]]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_equal_transformers_for_256_tokens_in_a_batch_of_any_order(tmp_path, family):
    params, tied = FAMILIES[family]
    tensors = random_tensors(params, tied=tied)
    convert(FromMeta(write_meta(tmp_path / "meta", tensors, params), tmp_path / "model"))
    model = jllama.load_model(tmp_path / "model", "fp32")
    peer = reference(params, tensors)
    expected = []
    for prompt in EIGHT:
        ids = torch.tensor([prompt])
        out = peer.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=256,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    assert jllama.generate(model, EIGHT, 256, GREEDY) == expected
    assert without_a_cache(model, EIGHT, expected) == expected
    assert jllama.generate(model, EIGHT[::-1], 256, GREEDY) == expected[::-1]
    assert jllama.generate(model, EIGHT[2:3], 256, GREEDY) == expected[2:3]


def without_a_cache(model, prompts, answers):
    """The likeliest token at every position of the answers, from one forward pass without a cache.

    If they are the answers themselves, decoding without a cache would have given just these.
    """
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    likeliest = np.asarray(jax.jit(Llama.__call__)(model, jnp.asarray(tokens)).argmax(-1))
    return [
        likeliest[row, len(prompt) - 1 : len(ids) - 1].tolist()
        for row, (prompt, ids) in enumerate(zip(prompts, rows, strict=True))
    ]


def test_repetition_penalty_is_that_of_transformers(tmp_path):
    model = jllama.load_model(model_folder(tmp_path, GROUPED), "fp32")
    peer = reference(GROUPED, random_tensors(GROUPED))
    ids = torch.tensor([PROMPTS[0]])
    out = peer.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40,
        eos_token_id=None, pad_token_id=0, repetition_penalty=1.3,
    )  # fmt: skip
    penalised = Sampling(temperature=0, repetition_penalty=1.3)
    expected = out[0, 3:].tolist()
    assert jllama.generate(model, [PROMPTS[0]], 40, penalised)[0] == expected
    assert jllama.generate(model, PROMPTS, 40, penalised)[0] == expected  # padding is not seen


@pytest.mark.real
def test_stories_prompts_continue_as_the_c_program_says(assets, tmp_path):
    convert(FromMeta(assets / "stories260K-meta", tmp_path / "model"))
    model = jllama.load_model(tmp_path / "model", "fp32")
    expected = json.loads((assets / "stories260K-expected.json").read_text())
    prompts = [expected[f"p{i}_prompt"] for i in range(3)]
    answers = jllama.generate(model, prompts, [201 - len(p) for p in prompts], GREEDY)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert prompt + answer == expected[f"p{i}_tokens"]
