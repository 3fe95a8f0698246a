import json

import numpy as np
import pytest
import torch
from flax import nnx
from meta_files import BASE, VOCABULARY, model_folder, random_tensors, reference
from scipy import stats

import jllama
from convert.from_meta import FromMeta, convert
from jllama.config import LoraConfig
from jllama.errors import InputError
from jllama.generate import decode, pick, prefill
from jllama.lora import attach

PARAMS = BASE | {"n_kv_heads": 2}
PROMPTS = [[1, 5, 9], [2], [7] * 40, [3, 4, 5, 6, 7]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("place"), PARAMS)


@pytest.fixture(scope="module")
def model(folder):
    return jllama.load_model(folder, "fp32")


def test_greedy_ids_equal_transformers_alone_and_in_a_batch_of_any_order(model):
    peer = reference(PARAMS, random_tensors(PARAMS))
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = peer.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=70,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    alone = [jllama.generate(model, [prompt], 70, temperature=0)[0] for prompt in PROMPTS]
    assert alone == expected
    assert jllama.generate(model, PROMPTS, 70, temperature=0) == expected
    assert jllama.generate(model, PROMPTS[::-1], 70, temperature=0) == expected[::-1]


def test_cached_ids_equal_those_without_a_cache(model):
    ids = list(PROMPTS[0])
    for _ in range(12):
        logits = model(np.array([ids], np.int32))
        ids.append(int(logits[0, -1].argmax()))
    assert jllama.generate(model, [PROMPTS[0]], 12, temperature=0)[0] == ids[3:]


def test_a_seed_fixes_a_prompts_sample_in_whatever_batch(model):
    settings = {"temperature": 1.0, "top_p": 0.9, "seed": 4}
    together = jllama.generate(model, PROMPTS, 40, **settings)
    assert jllama.generate(model, [PROMPTS[1]], 40, **settings)[0] == together[1]
    assert jllama.generate(model, PROMPTS, 40, **settings | {"seed": 5}) != together


def test_stop_tokens_and_budgets_end_each_row_on_its_own(model):
    free = jllama.generate(model, PROMPTS[:2], 40, temperature=0)
    stop = free[0][3]
    first, second = jllama.generate(model, PROMPTS[:2], [40, 5], temperature=0, stop_ids=[stop])
    assert first == free[0][: free[0].index(stop) + 1]
    assert second == (free[1][: free[1].index(stop) + 1] if stop in free[1][:5] else free[1][:5])


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_samples_follow_the_softmax_cut_at_top_p(top_p):
    import jax

    logits = np.random.default_rng(0).normal(size=12).astype(np.float32) * 1.5
    n, temperature = 20_000, 0.8
    choice = (jax.random.key(1), np.float32(temperature), np.float32(top_p))
    drawn = np.asarray(pick(np.tile(logits, (n, 1)), np.arange(n), choice))
    p = np.exp(logits.astype(float) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before > top_p]] = 0
    expected = n * p / p.sum()
    counts = np.bincount(drawn, minlength=12)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3


def test_base_and_tuned_share_one_compilation_and_scale_zero_is_the_base(folder):
    import jax

    model = jllama.load_model(folder, "fp32")
    base = jllama.generate(model, PROMPTS, 40, temperature=0)
    attach(model, LoraConfig(rank=4), jax.random.key(0))
    for linear in model.linears().values():
        if linear.lora is not None:
            linear.lora.b[...] = jax.random.normal(jax.random.key(1), linear.lora.b.shape)
    prefill.clear_cache()
    decode.clear_cache()
    assert jllama.generate(model, PROMPTS, 40, temperature=0, adapter_scale=0.0) == base
    assert jllama.generate(model, PROMPTS, 40, temperature=0) != base
    assert (prefill._cache_size(), decode._cache_size()) == (1, 1)


def test_no_new_tokens_and_no_prompts_are_defined(model):
    assert jllama.generate(model, PROMPTS, 0) == [[]] * 4
    assert jllama.generate(model, [], 5) == []


def test_the_context_ends_an_answer(folder):
    import dataclasses

    model = jllama.load_model(folder, "fp32")
    model.config = dataclasses.replace(model.config, max_seq_len=50)
    assert len(jllama.generate(model, [[1] * 45], 40, temperature=0)[0]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[]], 5), "prompt 0 is empty"),
        (([[1], [VOCABULARY]], 5), "prompt 1 holds ids outside 0..511"),
        (([[1] * 5000], 5), "prompt 0 has 5000 tokens, the context is 4096"),
        (([[1]], -1), "max_new_tokens -1 is below 0"),
        (([[1]], 5, -0.1), "temperature -0.1"),
        (([[1]], 5, 1.0, 0.0), "top_p 0.0"),
    ],
)
def test_wrong_arguments_are_named(model, arguments, message):
    with pytest.raises(InputError, match=message):
        jllama.generate(model, *arguments)


def test_logits_that_are_not_finite_are_an_error(folder):
    model = jllama.load_model(folder, "fp32")
    model.norm.weight[...] = model.norm.weight[...] * np.nan
    with pytest.raises(InputError, match="not finite"):
        jllama.generate(model, [[1]], 5)


def test_a_model_answers_under_tree_mode_too(folder, model):
    expected = jllama.generate(model, PROMPTS[:1], 5, temperature=0)
    nnx.set_graph_mode(False)
    try:
        loaded = jllama.load_model(folder, "fp32")
        assert jllama.generate(loaded, PROMPTS[:1], 5, temperature=0) == expected
    finally:
        nnx.set_graph_mode(True)


@pytest.mark.real
def test_stories_prompts_continue_as_the_c_program_says(assets, tmp_path):
    convert(FromMeta(assets / "stories260K-meta", tmp_path / "model"))
    model = jllama.load_model(tmp_path / "model", "fp32")
    expected = json.loads((assets / "stories260K-expected.json").read_text())
    prompts = [expected[f"p{i}_prompt"] for i in range(3)]
    answers = jllama.generate(model, prompts, [201 - len(p) for p in prompts], temperature=0)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert prompt + answer == expected[f"p{i}_tokens"]
