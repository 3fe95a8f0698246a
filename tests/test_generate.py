import copy
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import BASE, VOCABULARY, model_folder

import jllama
from jllama.attention import cached_attention, causal_attention, make_cache, write_slot
from jllama.config import LoraConfig
from jllama.decode import weights
from jllama.decode.generate import chunk_for, decode, prefill
from jllama.decode.sampling import Sampling
from jllama.errors import InputError
from jllama.lora import attach

PARAMS = BASE | {"n_kv_heads": 2}
GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 5, 9], [2], [7] * 40, [3, 4, 5, 6, 7]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("place"), PARAMS)


@pytest.fixture(scope="module")
def model(folder):
    return jllama.load_model(folder, "fp32")


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["multi-head", "grouped"])
def test_a_cached_query_sees_what_it_would_see_without_a_cache(heads):
    """At another position in every row, with something else in the slots behind it."""
    (N, K), positions = heads, np.array([[0], [5], [11]])
    draw = np.random.default_rng(0)
    keys, values = draw.normal(size=(2, 3, 12, K, 16)).astype(np.float32)
    query = draw.normal(size=(3, 12, N, 16)).astype(np.float32)
    query, keys, values = map(jnp.asarray, (query, keys, values))
    whole = causal_attention(query, keys, values, None, "xla")
    rows = np.arange(3)[:, None]
    # The slot that is written holds something else before; 14 slots, so that some are never filled.
    cache = make_cache(*(x.at[rows, positions].set(9) for x in (keys, values)),
                       14, "xla")  # fmt: skip
    new = [x[rows, positions] for x in (query, keys, values)]
    seen, written = cached_attention(*new, jnp.asarray(positions), cache, "xla")
    np.testing.assert_allclose(seen, whole[rows, positions], atol=1e-5)
    for found, expected in zip(written, (keys, values), strict=True):
        assert found.shape == (3, K, 14, 16)
        np.testing.assert_array_equal(found[:, :, :12], expected.swapaxes(1, 2))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_slot_of_every_row_is_written(rows):
    draw = np.random.default_rng(0)
    slots, new = draw.normal(size=(rows, 6, 2, 4)), draw.normal(size=(rows, 1, 2, 4))
    positions = np.array([[5], [0], [3]])[:rows]
    written = write_slot(*map(jnp.asarray, (slots, new, positions)))
    slots[np.arange(rows), positions[:, 0]] = new[:, 0]
    np.testing.assert_array_equal(written, slots.astype(np.float32))


@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 31, 33, 39, 63, 100, 116, 127, 136, 199, 255, 1000])
def test_a_chunk_wastes_little_and_is_one_of_few(tokens):
    chunk = chunk_for(tokens)
    calls = -(-tokens // chunk)
    assert chunk in range(4, 33, 4)
    assert calls * chunk - tokens <= max(3, tokens // 20)
    assert calls <= 1 + tokens // 16


@pytest.mark.as_stored
def test_a_growing_conversation_compiles_a_handful_of_times(folder, model):
    tokenizer = jllama.load_tokenizer(folder)
    prefill.clear_cache()
    decode.clear_cache()
    for length in (1, 20, 63, 64):
        list(jllama.stream(model, tokenizer, [5] * length, 20, GREEDY))
    assert (prefill._cache_size(), decode._cache_size()) == (1, 1)
    for length in (65, 100, 128, 129, 256):
        list(jllama.stream(model, tokenizer, [5] * length, 20, GREEDY))
    assert (prefill._cache_size(), decode._cache_size()) == (3, 3)


def test_a_stream_returns_whether_it_was_cut(folder, model):
    tokenizer = jllama.load_tokenizer(folder)

    def cut(prompt, budget, **more):
        pieces = jllama.stream(model, tokenizer, prompt, budget, GREEDY, **more)
        try:
            while True:
                next(pieces)
        except StopIteration as end:
            return end.value

    (free,) = jllama.generate(model, [[1, 5]], 30, GREEDY)
    assert not set(free) & set(tokenizer.stop_ids)
    assert cut([1, 5], 30) is True
    assert cut([1, 5], 0) is True
    assert cut([1] * (model.config.max_seq_len - 3), 30) is True
    text = tokenizer.decode(free)
    assert cut([1, 5], 30, stop_strings=[text[-1]]) is False

    n = free.index(free[9]) + 1
    tokenizer = copy.copy(tokenizer)
    tokenizer.stop_ids = (free[9],)
    assert cut([1, 5], 30) is False
    assert cut([1, 5], n) is False  # it ends by itself with its last token
    assert cut([1, 5], n - 1) is True


def test_a_seed_fixes_a_prompts_sample_in_whatever_batch(model):
    sampling = Sampling(temperature=1.0)
    together = jllama.generate(model, PROMPTS, 40, sampling, seed=4)
    assert jllama.generate(model, [PROMPTS[1]], 40, sampling, seed=4)[0] == together[1]
    assert jllama.generate(model, PROMPTS, 40, sampling, seed=5) != together
    own = jllama.generate(model, PROMPTS, 40, sampling, seed=[5, 4, 5, 5])
    assert own[1] == together[1]
    assert own[0] != together[0]


def test_several_samples_of_a_prompt_differ_and_the_first_is_the_only_one(model):
    sampling = Sampling(temperature=1.0)
    many = jllama.generate(model, PROMPTS[:2], 20, sampling, samples=3, seed=4)
    assert len({tuple(ids) for ids in many}) == 6
    assert many[::3] == jllama.generate(model, PROMPTS[:2], 20, sampling, seed=4)


def test_logprobs_are_those_of_the_model(model):
    logprobs_are_those_of_the_model(model, PROMPTS)


def logprobs_are_those_of_the_model(model, prompts):
    for answer, prompt in zip(
        jllama.generate_with_logprobs(model, prompts, 12, Sampling(temperature=1.0)),
        prompts, strict=True,
    ):  # fmt: skip
        logits = model(jnp.array([prompt + answer.ids]))[0]
        expected = jax.nn.log_softmax(logits)[len(prompt) - 1 : -1]
        chosen = np.take_along_axis(np.asarray(expected), np.array(answer.ids)[:, None], 1)[:, 0]
        np.testing.assert_allclose(answer.logprobs, chosen, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:2]], ids=["one row", "two rows"])
def test_adapters_answer_as_they_are_trained(folder, dora, prompts):
    """What is worked out once for a whole answer is what the training step works out each time."""
    model = jllama.load_model(folder, "fp32")
    attach(model, LoraConfig(rank=4, alpha=12, targets=("all",), dora=dora), jax.random.key(0))
    for index, linear in enumerate(model.linears().values()):
        for array in filter(None, (linear.lora.b, linear.lora.magnitude)):
            key = jax.random.fold_in(jax.random.key(1), index)
            array[...] = 0.1 * jax.random.normal(key, array.shape)
    logprobs_are_those_of_the_model(model, prompts)


def test_stop_tokens_and_budgets_end_each_row_on_its_own(model):
    free = jllama.generate(model, PROMPTS[:2], 40, GREEDY)
    stop = free[0][3]
    first, second = jllama.generate(model, PROMPTS[:2], [40, 5], GREEDY, stop_ids=[stop])
    assert first == free[0][: free[0].index(stop) + 1]
    assert second == (free[1][: free[1].index(stop) + 1] if stop in free[1][:5] else free[1][:5])


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it(folder, model):
    tokenizer = jllama.load_tokenizer(folder)
    (free,) = jllama.generate(model, [[1]], 60, GREEDY)
    texts = [tokenizer.decode(free[:n]) for n in range(len(free) + 1)]
    n = next(
        n for n in range(10, 60) if (end := texts[n][-2:]).isascii() and end not in texts[n - 1]
    )
    stop = [texts[n][-2:]]
    (cut,) = jllama.generate(model, [[1]], 60, GREEDY, stop_strings=stop, tokenizer=tokenizer)
    assert cut == free[:n]
    pieces = list(jllama.stream(model, tokenizer, [1], 60, GREEDY, stop_strings=stop))
    assert "".join(pieces) == texts[n][:-2]
    with pytest.raises(InputError, match="need the tokenizer"):
        jllama.generate(model, [[1]], 5, stop_strings=["a"])


class Bytes:
    """A tokenizer of bytes."""

    bos_id = eos_id = 0
    stop_ids = (0,)
    vocab_size = 256
    specials, template = frozenset(), None

    def encode(self, text):
        return list(text.encode())

    marked = encode

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")

    def piece(self, token):
        return self.decode([token])

    def special(self, name):
        raise KeyError(name)


def test_a_stream_never_splits_a_character_and_loses_nothing(monkeypatch, model):
    text = "naïve — 日本語 🙂 end"
    ids = list(text.encode())

    def chunks(model, prompts, budget, choice, scale, width, chunk):
        for start in range(0, len(ids), 3):
            yield np.array([ids[start : start + 3]]), np.zeros((1, 3))
        yield np.array([[0, 65, 65]]), np.zeros((1, 3))

    monkeypatch.setattr(importlib.import_module("jllama.decode.stream"), "decode_chunks", chunks)
    pieces = list(jllama.stream(model, Bytes(), [1], 1000))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert not any("�" in piece for piece in pieces)
    held = list(jllama.stream(model, Bytes(), [1], 1000, stop_strings=["語 🙂"]))
    assert "".join(held) == "naïve — 日本"


def test_streamed_text_is_the_generated_one(folder, model):
    tokenizer = jllama.load_tokenizer(folder)
    (ids,) = jllama.generate(model, [[1, 5]], 50, GREEDY, stop_ids=tokenizer.stop_ids)
    kept = [token for token in ids if token not in tokenizer.stop_ids]
    assert "".join(jllama.stream(model, tokenizer, [1, 5], 50, GREEDY)) == tokenizer.decode(kept)
    assert list(jllama.stream(model, tokenizer, [1, 5], 0, GREEDY)) == []


@pytest.mark.as_stored
def test_base_and_tuned_share_one_compilation_and_scale_zero_is_the_base(folder):
    model = jllama.load_model(folder, "fp32")
    base = jllama.generate(model, PROMPTS, 40, GREEDY)
    attach(model, LoraConfig(rank=4), jax.random.key(0))
    for linear in model.linears().values():
        if linear.lora is not None:
            linear.lora.b[...] = jax.random.normal(jax.random.key(1), linear.lora.b.shape)
    prefill.clear_cache()
    decode.clear_cache()
    assert jllama.generate(model, PROMPTS, 40, GREEDY, adapter_scale=0.0) == base
    assert jllama.generate(model, PROMPTS, 40, GREEDY) != base
    assert (prefill._cache_size(), decode._cache_size()) == (1, 1)


def test_no_new_tokens_and_no_prompts_are_defined(model):
    assert jllama.generate(model, PROMPTS, 0) == [[]] * 4
    assert jllama.generate(model, [], 5) == []


def test_the_context_ends_an_answer(folder):
    import dataclasses

    model = jllama.load_model(folder, "fp32")
    model.config = dataclasses.replace(model.config, max_seq_len=50)
    assert len(jllama.generate(model, [[1] * 45], 40, GREEDY)[0]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[]], 5), "prompt 0 is empty"),
        (([[1], [VOCABULARY]], 5), "prompt 1 holds ids outside 0..511"),
        (([[1] * 5000], 5), "prompt 0 has 5000 tokens, the context is 4096"),
        (([[1]], -1), "max_new_tokens -1 is below 0"),
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


@pytest.mark.as_stored
@pytest.mark.promotes
def test_answers_from_widened_weights_are_the_models_own(folder, monkeypatch):
    """On a CPU, bf16 matrices are held as fp32 where memory has room for it."""
    model, prompt = jllama.load_model(folder, "bf16"), PROMPTS[0]
    decode.clear_cache()
    for free in (weights.free_memory_mib(), 0):
        monkeypatch.setattr(weights, "free_memory_mib", lambda free=free: free)
        ids, logprobs = jllama.generate_with_logprobs(model, [prompt], 30, GREEDY)[0]
        logits = model(jnp.asarray([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
        likely = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))
        chosen = likely[np.arange(len(ids)), ids]
        np.testing.assert_allclose(logprobs, chosen, atol=0.05)
        np.testing.assert_allclose(chosen, likely.max(axis=-1), atol=0.05)  # bf16 has ties
    assert decode._cache_size() == 2


def test_a_model_answers_under_tree_mode_too(folder, model):
    expected = jllama.generate(model, PROMPTS[:1], 5, GREEDY)
    nnx.set_graph_mode(False)
    try:
        loaded = jllama.load_model(folder, "fp32")
        assert jllama.generate(loaded, PROMPTS[:1], 5, GREEDY) == expected
    finally:
        nnx.set_graph_mode(True)
