import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jllama.loss import cross_entropy

B, T, D, V = 3, 11, 16, 53


def case(seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    return x, head, targets, jnp.asarray(rng.random((B, T)) < 0.4)


def plain(x, head, targets, mask):
    """The textbook loss, with all logits at once."""
    log_p = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", x, head, precision="highest"))
    chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(mask, chosen, 0))


@pytest.mark.parametrize("chunk", [None, 1, 4, 33, 64])
def test_chunked_loss_and_gradient_equal_the_plain_ones(chunk):
    x, head, targets, mask = case()
    loss, slope = jax.value_and_grad(cross_entropy)(x, head, targets, mask, False, chunk)
    expected, expected_slope = jax.value_and_grad(plain)(x, head, targets, mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, expected_slope, atol=2e-6)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_head_that_learns_gets_the_plain_gradient(chunk):
    x, head, targets, mask = case()
    slopes = jax.grad(cross_entropy, argnums=(0, 1))(x, head, targets, mask, True, chunk)
    expected = jax.grad(plain, argnums=(0, 1))(x, head, targets, mask)
    for found, wanted in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_unsupervised_positions_get_no_gradient_and_cost_no_loss():
    x, head, targets, mask = case()
    slope = jax.grad(cross_entropy)(x, head, targets, mask, False, 4)
    assert np.all(np.asarray(slope)[~mask] == 0)
    assert float(cross_entropy(x, head, targets, jnp.zeros_like(mask), False, 4)) == 0


def test_peak_memory_does_not_grow_with_positions_times_vocabulary():  # lesson 16
    def temporaries(vocabulary, positions):
        shapes = (
            jax.ShapeDtypeStruct((1, positions, D), jnp.float32),
            jax.ShapeDtypeStruct((vocabulary, D), jnp.float32),
            jax.ShapeDtypeStruct((1, positions), jnp.int32),
            jax.ShapeDtypeStruct((1, positions), jnp.bool_),
        )
        loss = jax.jit(jax.grad(lambda *args: cross_entropy(*args, False, 64)))
        return loss.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    logits = 4096 * 4000 * 4
    assert temporaries(4000, 4096) < logits / 8
    assert temporaries(4000, 8192) - temporaries(4000, 4096) < logits / 8
