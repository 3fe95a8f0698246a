"""The whole way from Meta's files to logits, against `transformers` with the same tensors."""

import functools

import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from meta_files import random_tensors, reference, write_meta
from random_models import BASE, VOCABULARY

from convert.from_meta import FromMeta, convert
from jllama.config import PRESETS
from jllama.folders.load import load_model
from jllama.layers import rotary_frequencies
from train.data.documents import lay_out

GROUPED = BASE | {"n_kv_heads": 2}
SCALED = BASE | {"n_kv_heads": 1, "rope_theta": 500000.0, "use_scaled_rope": True}
TOLERANCE = 2e-5  # logits are of order one; the two sum in different orders

# name -> params, tied, shards, how tok_embeddings is cut, the rope factor to expect
MODELS = {
    "multi-head": (BASE, False, 1, 1, 8.0),
    "grouped-query": (GROUPED, False, 1, 1, 8.0),
    "tied": (GROUPED, True, 1, 1, 8.0),
    "llama-2 shards": (GROUPED, False, 2, 1, 8.0),
    "llama-3 shards, scaled rope": (SCALED, False, 2, 0, 8.0),
    "llama-3.2": (SCALED, True, 1, 0, 32.0),
}

# Rotary embedding sees only distances, so the positions must lie far apart.
NEAR = np.arange(16)
FAR = np.array([0, 1, 7, 4000, 8191, 8192, 8193, 9000, 12000, 16000, 16001, 30000, 60000, 100000])


def tokens(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, columns), dtype=np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(graph, state, *inputs):
    return nnx.merge(graph, state)(*inputs)


def logits(model, *inputs) -> np.ndarray:
    """`[B, T, V]` of a model for tokens and, if given, positions and documents."""
    return np.asarray(_compiled(*nnx.split(model), *jax.tree.map(jnp.asarray, inputs)))


def converted(folder, params, tied=False, shards=1, embeddings_by=1, seed=0):
    """The folder of a random model, and its tensors."""
    tensors = random_tensors(params, seed=seed, tied=tied)
    src = write_meta(folder / "meta", tensors, params, shards=shards, embeddings_by=embeddings_by)
    convert(FromMeta(src, folder / "model"))
    return folder / "model", tensors


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("grouped"), GROUPED)[0]


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder, "fp32")


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers_near_and_past_position_8192(
    name, tmp_path
):  # lessons 6, 7
    params, tied, shards, embeddings_by, rope_factor = MODELS[name]
    path, tensors = converted(tmp_path, params, tied, shards, embeddings_by)
    ours, theirs = load_model(path, "fp32"), reference(params, tensors, rope_factor)
    assert ours.config.tied == tied
    for where in (NEAR, FAR):
        ids = tokens(2, len(where))
        positions = np.broadcast_to(where, ids.shape).astype(np.int32)
        with torch.no_grad():
            expected = theirs(
                input_ids=torch.tensor(ids).long(),
                position_ids=torch.tensor(positions).long(),
                attention_mask=torch.ones(ids.shape),
            ).logits.numpy()
        found = logits(ours, ids, positions)
        assert found.dtype == np.float32
        assert expected.std() > 0.5  # the comparison is of something
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "llama-3.1-8b", "llama-3.2-1b"])
def test_rotary_frequencies_equal_those_of_transformers(name):  # lesson 7
    config = PRESETS[name]
    params = BASE | {"dim": 4 * config.head_dim, "rope_theta": config.rope_theta, "n_layers": 1}
    params["use_scaled_rope"] = config.rope_scaling is not None
    factor = config.rope_scaling.factor if config.rope_scaling else 1.0
    theirs = reference(params, random_tensors(params), factor).model.rotary_emb.inv_freq
    np.testing.assert_allclose(rotary_frequencies(config), theirs.numpy(), rtol=5e-7)


def test_no_logit_depends_on_a_later_token(model):
    ids = jnp.arange(12)[None]  # all different: a row of the table is one position
    graph, state = nnx.split(model)

    @jax.jit
    def gradient(table, row):
        def logits(table):
            changed = nnx.merge(graph, state, copy=True)
            changed.tok_embeddings.weight[...] = table
            return jnp.square(changed(ids)[0, row]).sum()

        return jax.grad(logits)(table)

    for row in (0, 5, 10):
        reached = np.abs(gradient(model.tok_embeddings.weight[...], row)).sum(axis=-1)
        assert (reached[: row + 1] > 0).all()
        assert (reached[row + 1 :] == 0).all()


def packed(first: np.ndarray, second: np.ndarray):
    """Two documents in one row: tokens and positions, each `[1, T]`, and where they lie."""
    lengths = len(first), len(second)
    positions = np.concatenate([np.arange(n) for n in lengths])
    rows = (np.concatenate([first, second]), positions)
    documents = lay_out([lengths], (1, sum(lengths)), ((2, max(lengths)),))
    return [*(row[None].astype(np.int32) for row in rows), documents]


def test_packed_documents_have_the_logits_they_have_alone(model):
    first, second = tokens(2, 8)
    together = logits(model, *packed(first, second))[0]
    alone = logits(model, np.stack([first, second]))
    np.testing.assert_allclose(together, alone.reshape(together.shape), rtol=0, atol=TOLERANCE)


def check_packed_documents_are_apart(model):  # lesson 18
    """A change of document 1 changes no bit of document 2."""
    first, second = tokens(2, 8)
    before = logits(model, *packed(first, second))[0]
    after = logits(model, *packed((first + 1) % VOCABULARY, second))[0]
    assert (before[8:] == after[8:]).all()
    assert (before[:8] != after[:8]).any()


def test_a_packed_document_does_not_see_another_one_change(model):
    assert model.layers[0].attention.implementation == "xla"
    check_packed_documents_are_apart(model)


@pytest.mark.gpu
@pytest.mark.skipif("jax.default_backend() != 'gpu'", reason="cuDNN's attention needs a GPU")
def test_a_packed_document_does_not_see_another_one_change_in_cudnn(tmp_path):
    path, _ = converted(tmp_path, BASE | {"dim": 128})  # heads of 32, the smallest for cuDNN
    model = load_model(path, "bf16")
    assert model.layers[0].attention.implementation == "cudnn"
    check_packed_documents_are_apart(model)


def test_feed_forward_biases_are_zero_and_change_no_logit(model, model_folder):
    biased = load_model(model_folder, "fp32", ffn_bias=True)
    layers, dim, hidden = 2, 32, model.config.hidden_dim
    biases = [linear.bias[...] for linear in biased.linears().values() if linear.bias is not None]
    assert sum(bias.size for bias in biases) == layers * (hidden + hidden + dim)
    assert not any(np.asarray(bias).any() for bias in biases)
    ids = tokens(2, 8)
    assert (logits(model, ids) == logits(biased, ids)).all()


def test_logits_are_the_same_without_graph_mode(model, model_folder):
    ids = tokens(2, 8)
    with nnx.set_graph_mode(False):
        found = logits(load_model(model_folder, "fp32"), ids)
    assert (found == logits(model, ids)).all()
