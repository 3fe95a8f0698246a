"""What only a GPU can show: planned beside measured memory, and attention on every path."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jllama.attention import cached_attention, causal_attention, make_cache
from jllama.cli import children
from train.data.documents import lay_out

if os.environ.get("JAX_PLATFORMS") != "cpu":  # the children need the card's memory, too
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if jax.default_backend() != "gpu":
    pytest.skip(
        f"JAX runs on {jax.default_backend()} (JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}); with "
        "a GPU: JAX_PLATFORMS=cuda python -m pytest -m gpu",
        allow_module_level=True,
    )

pytestmark = [pytest.mark.gpu, pytest.mark.integration]
B, T, N, K, H = 2, 256, 8, 2, 64


@pytest.fixture
def qkv():
    """A query of N heads, a key and a value of K heads, bf16."""
    drawn = zip(jax.random.split(jax.random.key(0), 3), (N, K, K), strict=True)
    return [jax.random.normal(key, (B, T, heads, H), jnp.bfloat16) for key, heads in drawn]


def documents():
    """Two of different lengths in the first row, three in the second, and padding."""
    lengths = [[100, 130], [60, 1, 189]]
    return jax.tree.map(jnp.asarray, lay_out(lengths, (B, T), ((2, 128), (1, 192))))


def close(one, other):
    """bf16 keeps 8 bits; sums are fp32 on both sides."""
    one, other = (np.asarray(x, np.float32) for x in (one, other))
    assert np.linalg.norm(one - other) / np.linalg.norm(other) < 0.01


@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_attends_as_xla_does_and_so_do_its_gradients(qkv, packed):
    apart = documents() if packed else None

    def attended(implementation):
        def loss(*arrays):
            out = causal_attention(*arrays, apart, implementation)
            weights = jnp.cos(jnp.arange(out.size).reshape(out.shape))
            return jnp.sum(out.astype(jnp.float32) * weights), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*qkv)

    pairs = zip(*map(jax.tree.leaves, map(attended, ("cudnn", "xla"))), strict=True)
    for one, other in pairs:
        close(one, other)


@pytest.mark.parametrize("position", [0, 1, 100, T - 1])
def test_cudnn_reads_a_cache_as_xla_does(qkv, position):
    query, key, value = qkv
    filled = jnp.asarray([[position], [position // 2]])
    new = query[:, :1], key[:, :1], value[:, :1]

    def attended(implementation):
        cache = make_cache(key, value, T, implementation)
        step = jax.jit(cached_attention, static_argnums=5, donate_argnums=4)
        return step(*new, filled, cache, implementation)[0]

    close(attended("cudnn"), attended("xla"))


@pytest.mark.parametrize(("remat", "batch", "length"), [("block", 2, 2048), ("none", 4, 1024)])
def test_the_measured_peak_is_the_planned_one_within_five_percent(tmp_path, remat, batch, length):
    file = tmp_path / "figures.json"
    flags = ["--model", "llama-3.2-1b", "--precision", "bf16", "--remat", remat,
             "--micro-batch-size", batch, "--max-seq-len", length,
             "--gradient-accumulation-steps", 1]  # fmt: skip
    children.run("train.speed", [*flags, "--steps", "3", "--output", file])
    found = json.loads(file.read_text())["figures"]
    plan = json.loads(children.run("train.plan", [*flags, "--gpu", "present", "--json"]))
    assert found["peak_memory_of"] == "device"
    assert found["peak_memory_mib"] == pytest.approx(plan["peak_mib"], rel=0.05)
    assert found["planned_mib"] == pytest.approx(plan["peak_mib"], rel=0.05)


@pytest.mark.skipif(jax.device_count() < 2, reason="one GPU is here, and this wants two or more")
def test_several_cards_train_as_one(tmp_path):
    """In one process, and in one for each; `devices` of the suite, of which this is the judge."""
    children.run("eval.speed", ["suite", "--json", tmp_path, "--only", "devices", "--tiny"])
    found = json.loads((tmp_path / "devices.json").read_text())
    assert found["state"] == "done", found
    one, *others = (way["losses"] for way in found["figures"]["runs"].values())
    for losses in others:
        np.testing.assert_allclose(losses, one, rtol=0, atol=1e-4)  # sums of fp32 in other orders
