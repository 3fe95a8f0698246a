"""The training step against the big batch, and against its own compiled text."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_models
from flax import nnx
from random_models import model_folder
from step_runs import LENGTH, LORA, PARAMS, build, build_full, run, windows

from jllama.config import PRECISIONS, LoraConfig
from jllama.folders.load import abstract_model, load_model
from jllama.lora import attach, dropped_out, split
from jllama.quantize.weights import in_codes
from train.config import TrainConfig
from train.data.documents import lay_out, stacked
from train.optimizer import (
    accumulate,
    count,
    learning_rate_schedule,
    make_optimizer,
    take_norms,
    tree_norm,
)
from train.step import Window, eval_step, initial_state, train_step

pytestmark = pytest.mark.promotes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("place"), PARAMS)


def named(state):
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(state)}


def test_accumulated_step_equals_the_big_batch(folder):  # lesson 1
    rows = list(windows(10, 1, 8))
    counts = [row.mask.sum(-1) for row in rows]
    assert min(x.min() for x in counts) <= 1  # a mean of means would show
    assert max(x.max() for x in counts) > 16
    rate = TrainConfig.learning_rate
    _, graphdef, base, optimizer, state = build(folder, k=1, rate=rate)
    before = named(state.learned)
    big, big_losses = run(graphdef, base, optimizer, state, rows)
    apart = [Window(*(x.reshape(8, 1, LENGTH) for x in row[:3])) for row in rows]
    _, graphdef, base, optimizer, state = build(folder, k=8, rate=rate)
    small, small_losses = run(graphdef, base, optimizer, state, apart)
    np.testing.assert_allclose(small_losses, big_losses, rtol=1e-6)
    for (name, x), y in zip(named(small.learned).items(), named(big.learned).values(), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(x - before[name]).max() > 1e-3, name


def test_zero_weight_padding_changes_nothing(folder):  # lesson 2
    (row,) = windows(1, 2, 2)
    _, graphdef, base, optimizer, state = build(folder, k=2)
    once, _ = run(graphdef, base, optimizer, state, [row])
    padded = Window(*(np.concatenate([x, np.zeros_like(x)]) for x in row[:3]))
    _, graphdef, base, optimizer, state = build(folder, k=4)
    again, _ = run(graphdef, base, optimizer, state, [padded])
    for x, y in zip(named(once.learned).values(), named(again.learned).values(), strict=True):
        np.testing.assert_array_equal(x, y)


def test_only_adapters_are_trainable_and_the_base_stays_bit_equal(folder):  # lesson 5
    model, graphdef, base, optimizer, state = build(folder, k=2)
    before = {name: x.tobytes() for name, x in named(base).items()}
    counts = count({"learned": state.learned, "frozen": base})
    assert counts["learned"] == LORA.parameter_count(model.config)
    assert in_codes(base) or counts["frozen"] == model.config.parameter_count
    state, _ = run(graphdef, base, optimizer, state, windows(3, 2, 2))
    assert {name: x.tobytes() for name, x in named(base).items()} == before
    moved = [np.any(x != 0) for name, x in named(state.learned).items() if "['b']" in name]
    assert len(moved) == 4
    assert all(moved)  # lesson 4


@pytest.mark.as_stored
def test_bf16_keeps_adapters_and_moments_in_fp32(folder):  # lesson 4
    _, graphdef, base, optimizer, state = build(folder, precision="bf16", rate=3e-5, k=2)
    assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    before = named(state.learned)
    state, _ = run(graphdef, base, optimizer, state, windows(2, 2, 2))
    floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype("float32")}
    for name, x in named(state.learned).items():
        assert np.any(x != before[name]), name


def test_an_optimizer_state_holds_nothing_of_the_base(folder):  # lesson 3
    model, _, _, _, state = build(folder, k=4)
    adapter = LORA.parameter_count(model.config)
    held = sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim)
    assert held == 3 * adapter  # two moments and the accumulator


@pytest.mark.parametrize("remat", ["dots", "offload", "ffn", "block"])
def test_remat_changes_memory_and_not_the_result(folder, remat):
    def step(remat):
        _, graphdef, base, optimizer, state = build(folder, lora=dropout, k=2, remat=remat)
        state, losses = run(graphdef, base, optimizer, state, windows(3, 2, 2))
        lowered = train_step.lower(
            state, base, next(windows(1, 2, 2)), jax.random.key(0), graphdef=graphdef,
            optimizer=optimizer,
        )  # fmt: skip
        return state, losses, str(lowered.as_text()).count("optimization_barrier")

    dropout = LoraConfig(rank=4, alpha=8, dropout=0.1, targets=("wq", "w2"))
    plain, plain_losses, none = step("none")
    state, losses, barriers = step(remat)
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-6)
    for x, y in zip(named(state.learned).values(), named(plain.learned).values(), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    # The configs really differ: one barrier for each recomputed part. A product with nf4, computed
    # again, brings its own.
    base = random_models.BASE_OF_ALL
    if base is None or base.format != "nf4":
        assert barriers == none + PARAMS["n_layers"]
    else:
        assert barriers > none + PARAMS["n_layers"]


def test_what_dropout_drops_is_as_if_tossed():
    """Shares of zeros in all, by row and by column, of neighbours, and of two draws together."""
    shape, rate = (2, 512, 256), 0.1
    ones = jnp.ones(shape)
    first, second = (
        np.asarray(dropped_out(ones, rate, jax.random.key(seed))) == 0 for seed in (0, 1)
    )
    kept = np.asarray(dropped_out(ones, rate, jax.random.key(0)))
    assert set(np.unique(kept)) == {np.float32(0), np.float32(1) / np.float32(1 - rate)}

    def near(tossed, chance):  # within five standard deviations, each of many
        trials = tossed.size
        assert abs(tossed.mean() - chance) < 5 * (chance * (1 - chance) / trials) ** 0.5

    near(first, rate)
    for row in first.reshape(-1, shape[-1]):
        near(row, rate)
    for column in first.reshape(-1, shape[-1]).T:
        near(column, rate)
    near(first[..., 1:] & first[..., :-1], rate**2)
    near(first[:, 1:] & first[:, :-1], rate**2)
    near(first[0] & first[1], rate**2)
    near(first & second, rate**2)


def test_the_norm_of_a_tree_is_that_of_one_vector():
    draw = np.random.default_rng(0)
    shapes = [(3, 50), (40, 2), (7,), (1, 1)]
    tree = [draw.standard_normal(shape, np.float32) for shape in shapes]
    whole = np.linalg.norm(np.concatenate([x.ravel() for x in tree]).astype(np.float64))
    np.testing.assert_allclose(tree_norm(tree), whole, rtol=1e-6)


def test_the_sum_of_gradients_is_clipped_as_optax_clips():
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    for most in (2.5, 7.0):
        rule = accumulate(optax.sgd(1.0), 2, most)
        state = rule.init(gradient)
        _, state = rule.update(gradient, state, gradient)
        updates, state = rule.update(gradient, state, gradient)
        twice = jax.tree.map(lambda x: 2 * x, gradient)
        clip = optax.clip_by_global_norm(most)
        expected = clip.update(twice, clip.init(twice))[0]
        for name in gradient:
            np.testing.assert_allclose(updates[name], -expected[name], rtol=1e-6)
        *norms, cleared = take_norms(state)
        np.testing.assert_allclose(norms, (10.0, min(most, 10.0)), rtol=1e-6)
        assert take_norms(cleared)[:2] == (0, 0)


def test_dropout_is_a_function_of_seed_and_step(folder):
    lora = LoraConfig(rank=4, alpha=8, dropout=0.3, targets=("wq",))
    rows = list(windows(2, 2, 2))

    def adapters(key, rows):
        _, graphdef, base, optimizer, state = build(folder, lora=lora, k=2)
        return named(run(graphdef, base, optimizer, state, rows, key)[0].learned)

    first, again, other = adapters(0, rows), adapters(0, rows), adapters(1, rows)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)


def test_adapters_that_read_the_same_input_drop_the_same_of_it(folder, monkeypatch):
    model = load_model(folder, "fp32")
    attach(model, LoraConfig(rank=4, dropout=0.3, targets=("all",)), jax.random.key(0))
    drawn = []

    def record(x, rate, key):
        drawn.append((tuple(jax.random.key_data(key).tolist()), x.shape[-1]))
        return dropped_out(x, rate, key)

    monkeypatch.setattr("jllama.lora.dropped_out", record)
    model(jnp.asarray(next(windows(1, 1, 2)).tokens[0]), key=jax.random.key(1))
    dim, hidden, layers = model.config.dim, model.config.hidden_dim, PARAMS["n_layers"]
    # Once for wq, wk and wv, once for wo, once for w1 and w3, once for w2, and never the same.
    assert [width for _, width in drawn] == [dim, dim, dim, hidden] * layers
    assert len({key for key, _ in drawn}) == 4 * layers


@pytest.mark.as_stored
def test_a_step_without_a_finite_gradient_changes_nothing(folder):  # lesson 23
    _, graphdef, base, optimizer, state = build(folder)
    poisoned = jax.tree.map(lambda x: x * jnp.nan, base)
    before = named((state.learned, state.optimizer))
    state, metrics = train_step(
        state, poisoned, next(windows(1, 1, 2)), jax.random.key(0), graphdef=graphdef,
        optimizer=optimizer,
    )  # fmt: skip
    assert bool(metrics.skipped)
    assert int(state.step) == 1
    for name, x in named((state.learned, state.optimizer)).items():
        if name.endswith(".gradient_step"):  # MultiSteps counts windows, Adam its own steps
            continue
        np.testing.assert_array_equal(x, before[name], err_msg=name)


def test_packed_rows_cost_what_they_cost_alone(folder):  # lesson 18
    _, graphdef, base, _, state = build(folder)
    (rows,) = windows(1, 2, 1)
    half = LENGTH // 2
    alone = sum(
        float(eval_step(state.learned, base, Window(*(x[i : i + 1, :, :half] for x in rows[:3])),
                        graphdef=graphdef)[0])
        for i in range(2)
    )  # fmt: skip
    packed = Window(
        *(np.concatenate([x[:1, :, :half], x[1:, :, :half]], axis=2) for x in rows[:3]),
        positions=np.tile(np.arange(half), 2)[None, None].astype(np.int32),
        documents=stacked([lay_out([[half, half]], (1, LENGTH), ((2, half),))]),
    )
    together = float(eval_step(state.learned, base, packed, graphdef=graphdef)[0])
    assert together == pytest.approx(alone, rel=1e-5)


def test_clipping_acts_on_the_whole_window(folder):
    (row,) = windows(1, 2, 2)
    _, graphdef, base, optimizer, state = build(folder, k=2, clip=1e-3)
    clipped, _ = run(graphdef, base, optimizer, state, [row])
    moment = [x for name, x in named(clipped.optimizer).items() if ".mu" in name]
    norm = np.sqrt(sum(float(np.sum((x / 0.1) ** 2)) for x in moment))  # mu = (1 - 0.9) g
    assert norm == pytest.approx(1e-3, rel=1e-4)


def test_schedules_count_optimizer_steps():  # lesson 2
    rate = learning_rate_schedule("linear", 1.0, 10, 100)
    np.testing.assert_allclose(
        [rate(0), rate(4), rate(9), rate(10)], [0.1, 0.5, 1.0, 1.0], rtol=1e-6
    )
    assert float(rate(55)) == pytest.approx(0.5)
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-6)
    assert float(learning_rate_schedule("cosine", 2.0, 0, 10)(5)) == pytest.approx(1.0)
    assert float(learning_rate_schedule("constant", 2.0, 0, 10)(9)) == 2.0


def test_the_step_is_compiled_once_in_a_run(folder):  # lesson 19
    train_step.clear_cache()
    _, graphdef, base, optimizer, state = build(folder, k=2)
    base = jax.device_put(base, jax.local_devices()[0])  # committed, as a loader may leave it
    run(graphdef, base, optimizer, state, windows(4, 2, 2))
    assert train_step._cache_size() == 1


def compiled_text(precision):
    """The compiled step of a model whose matrix sizes occur nowhere else."""
    from jllama.config import LlamaConfig

    config = LlamaConfig(88, 2, 4, 2, 104, 208)
    model = abstract_model(config, precision, remat="block", lora=LORA)
    graphdef, adapters, base = split(model)
    optimizer = make_optimizer(
        {"learned": adapters, "frozen": base}, optax.constant_schedule(1e-3), weight_decay=0.01,
        max_grad_norm=1.0, accumulation=4,
    )  # fmt: skip
    state = jax.eval_shape(lambda a, b: initial_state(a, b, optimizer), adapters, base)
    ids = jax.ShapeDtypeStruct((4, 2, 16), jnp.int32)
    window = Window(ids, ids, jax.ShapeDtypeStruct((4, 2, 16), jnp.bool_))
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = train_step.lower(state, base, window, key, graphdef=graphdef, optimizer=optimizer)
    return lowered.compile().as_text(), nnx.to_flat_state(base)


def test_compiled_step_makes_no_array_of_a_frozen_weights_shape():
    """No gradient, accumulator, cast, slice or copy: such a shape is only ever passed on.

    In fp32, for XLA's CPU backend has no bf16 matmul and widens the weights itself.
    """
    text, base = compiled_text("fp32")
    shapes = {leaf.shape for _, leaf in base if len(leaf.shape) == 2}
    assert shapes == {(88, 88), (44, 88), (104, 88), (88, 104), (208, 88)}
    made = []
    for shape in shapes | {tuple(reversed(shape)) for shape in shapes}:
        dims = ",".join(map(str, shape))
        for line in text.splitlines():
            found = re.match(rf"\s*(?:ROOT )?%?\S+ = f32\[{dims}\]\S* ([\w-]+)\(", line)
            if found and found[1] not in ("parameter", "get-tuple-element"):
                made.append(line.strip()[:160])
    assert not made
    assert re.search(
        r"f32\[88,104\]\S* (parameter|get-tuple-element)", text
    )  # the net is not empty


def test_precisions_name_their_dtypes():
    assert {name: jnp.dtype(dtype).name for name, dtype in PRECISIONS.items()} == {
        "bf16": "bfloat16",
        "fp32": "float32",
    }


def test_lora_plus_moves_b_faster_by_its_ratio(folder):
    (row,) = windows(1, 1, 2)
    moves = []
    for ratio in (1.0, 16.0):
        model, graphdef, base, _, state = build(folder)
        optimizer = make_optimizer(
            {"learned": state.learned, "frozen": base}, optax.constant_schedule(1e-4),
            weight_decay=0.0, max_grad_norm=1.0, accumulation=1, b_rate_ratio=ratio,
        )  # fmt: skip
        adapters = split(model)[1]
        before = named(adapters)
        state, _ = run(graphdef, base, optimizer, initial_state(adapters, base, optimizer), [row])
        moves.append({name: x - before[name] for name, x in named(state.learned).items()})
    for name, slow in moves[0].items():
        ratio = 16.0 if "['b']" in name else 1.0
        np.testing.assert_allclose(moves[1][name], ratio * slow, rtol=1e-3, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", ["adafactor", "lion"])
def test_other_rules_learn_too(folder, name):
    model, graphdef, base, _, state = build(folder, k=2)
    optimizer = make_optimizer(
        {"learned": state.learned, "frozen": base}, optax.constant_schedule(3e-3), name=name,
        weight_decay=0.0, max_grad_norm=1.0, accumulation=2,
    )  # fmt: skip
    (row,) = windows(1, 2, 2)
    state = initial_state(split(model)[1], base, optimizer)
    _, losses = run(graphdef, base, optimizer, state, [row] * 8)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.as_stored
def test_full_tuning_in_bf16_moves_fp32_masters_of_every_weight(folder):
    graphdef, frozen, optimizer, state = build_full(folder, precision="bf16")
    assert count({"learned": state.learned, "frozen": frozen}) == {
        "learned": load_model(folder).config.parameter_count,
        "frozen": 0,
    }
    before = named(state.learned)
    state, losses = run(graphdef, frozen, optimizer, state, [next(windows(1, 1, 8))] * 5)
    assert losses[-1] < losses[0] - 0.05
    for name, x in named(state.learned).items():
        assert x.dtype == np.float32
        assert np.any(x != before[name]), name
