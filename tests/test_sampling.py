"""The next token: cuts and draws against a sort in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jllama.decode.sampling import Sampling, kept_tokens, make_choice, pick
from jllama.errors import InputError

# Logits of a vocabulary of n: how a model's look, many equal ones, almost and wholly flat, steep.
SHAPES = {
    "smooth": lambda draw, n: draw.normal(size=n) * 3,
    "tied": lambda draw, n: np.round(draw.normal(size=n) * 3),
    "nearly flat": lambda draw, n: draw.normal(size=n) * 0.01,
    "flat": lambda draw, n: np.zeros(n),
    "steep": lambda draw, n: draw.normal(size=n) * 60,
}
CUTS = [
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"top_p": 0.9999},
    {"top_k": 1, "top_p": 1},
    {"top_k": 50, "top_p": 1},
    {"top_k": 9999, "top_p": 0.7},
    {"top_k": 40, "top_p": 0.8},
    {"top_p": 1, "min_p": 0.05},
    {"top_k": 300, "top_p": 0.95, "min_p": 0.01},
]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cuts_leave_what_a_sort_would_leave(shape, cuts):
    sampling = Sampling(temperature=0.7, **cuts)
    draw = np.random.default_rng(len(shape))
    for n in (3, 60, 5000):
        logits = SHAPES[shape](draw, n).astype(np.float32)
        scores = (logits - logits.max()) / np.float32(sampling.temperature)
        kept = kept_tokens(jnp.asarray(scores)[None], make_choice(sampling, [0], [0]))
        at_least, at_most = kept_by_a_sort(scores, sampling)
        kept = np.asarray(kept)[0] & (np.exp(scores) > 0)
        assert np.all(at_least <= kept)
        assert np.all(kept <= at_most)
        assert at_most.sum() <= at_least.sum() + 1 + n // 100


def kept_by_a_sort(scores, sampling):
    """Meta's rule in fp64; two answers, for a token within fp32's rounding of the limit."""
    odds = np.exp(scores).astype(np.float64)
    order = np.argsort(-odds, kind="stable")
    weights = odds[order]
    if sampling.top_k:
        weights[sampling.top_k :] = 0
    shares = weights / weights.sum()
    before = np.cumsum(shares) - shares
    likely = (shares > 0) & (weights >= np.float32(sampling.min_p) * weights[0])
    answers = []
    for slack in (-3e-6, 3e-6):
        kept = np.zeros(len(odds), bool)
        kept[order] = likely & (before <= sampling.top_p + (slack if sampling.top_p < 1 else 1))
        answers.append(kept)
    return answers


def test_of_equally_likely_tokens_the_first_ids_are_kept():
    """500 of 1000 have just the probability 0.5, which does not exceed it: one more is kept."""
    flat = jnp.zeros((2, 1000)).at[1, 7].set(-1.0)
    kept = kept_tokens(flat, make_choice(Sampling(1.0, top_p=0.5), [0, 0], [0, 0]))
    assert np.flatnonzero(kept[0]).tolist() == list(range(501))
    kept = kept_tokens(flat, make_choice(Sampling(1.0, top_k=8, top_p=1), [0, 0], [0, 0]))
    assert np.flatnonzero(kept[0]).tolist() == list(range(8))
    assert np.flatnonzero(kept[1]).tolist() == [*range(7), 8]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.8, top_p=1.0),
        Sampling(0.8, top_p=0.6),
        Sampling(0.8, top_k=5, top_p=1.0),
        Sampling(0.8, top_k=8, top_p=0.7),
        Sampling(0.8, top_p=1.0, min_p=0.3),
    ],
)
def test_samples_follow_the_softmax_as_it_is_cut(sampling):
    logits = np.random.default_rng(0).normal(size=12).astype(np.float32) * 1.5
    n = 20_000
    choice = make_choice(sampling, [0], [0])
    choice = choice._replace(keys=jnp.broadcast_to(choice.keys, (n,)))
    drawn = np.asarray(pick(jnp.tile(logits, (n, 1)), jnp.arange(n), None, choice)[0])
    p = np.exp(logits.astype(float) / sampling.temperature)
    p[~kept_by_a_sort(np.log(p / p.max()), sampling)[0]] = 0
    expected = n * p / p.sum()
    counts = np.bincount(drawn, minlength=12)
    kept = expected > 0
    assert kept.sum() > 1
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1e-30, 1e-10, 1e-4])
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    logits = np.random.default_rng(0).normal(size=(1, 12)).astype(np.float32)
    choice = make_choice(Sampling(temperature=temperature), [0], [0])
    token, _ = pick(jnp.asarray(logits), jnp.array([3]), None, choice)
    assert int(token[0]) == int(logits.argmax())


def test_the_penalty_falls_on_tokens_that_were_seen():
    logits = jnp.array([[2.0, 1.9, -1.0], [-1.0, -1.1, -9.0]])
    seen = jnp.array([[True, False, True], [True, False, False]])
    choice = make_choice(Sampling(0, repetition_penalty=1.2), [0, 0], [0, 0])
    token, logprob = pick(logits, jnp.zeros(2, jnp.int32), seen, choice)
    assert token.tolist() == [1, 1]  # 2 / 1.2 < 1.9, and -1 * 1.2 < -1.1
    np.testing.assert_allclose(logprob, jax.nn.log_softmax(logits)[:, 1], rtol=1e-6)


def test_only_what_a_sampling_asks_for_is_compiled_and_its_values_are_not():
    compiled = jax.jit(lambda logits, choice: pick(logits, jnp.zeros(1, jnp.int32), None, choice))
    logits = jnp.zeros((1, 9))
    for sampling in (Sampling(0.6), Sampling(1.1, top_p=0.3), Sampling(2.0, top_p=0.999)):
        compiled(logits, make_choice(sampling, [0], [0]))
    assert compiled._cache_size() == 1
    for sampling in (Sampling(0), Sampling(0, top_k=5, min_p=0.1)):
        compiled(logits, make_choice(sampling, [0], [0]))
    assert compiled._cache_size() == 2
    text = str(jax.make_jaxpr(compiled)(logits, make_choice(Sampling(0), [0], [0])))
    assert "cumsum" not in text
    assert "random" not in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1, expected a number, at least 0"),
        (
            {"top_p": 0.0, "top_k": -1},
            "top_k -1, expected a whole number, at least 0; top_p 0.0, expected a number, above 0",
        ),
        ({"min_p": 2.0}, "min_p 2.0, expected a number, at least 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0, expected a number, above 0"),
    ],
)
def test_wrong_sampling_is_named(settings, message):
    with pytest.raises(InputError, match=message):
        Sampling(**settings)
