"""Weights in 8 and 4 bits: the formats, against bitsandbytes itself, and models that hold them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllama.config import GROUP, Base
from jllama.errors import InputError
from jllama.folders.codes import coded_arrays, from_disk, to_disk
from jllama.layers import Weight
from jllama.quantize.formats import LEVELS, nested_levels
from jllama.quantize.weights import quantised

BASES = [Base("int8"), Base("int4"), Base("nf4"), Base("nf4", double=False)]
FORMATS = st.sampled_from(BASES)


@st.composite
def matrices(draw):
    """Of any shape and scale, with zeros and outliers in them."""
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 200))
    numbers = np.random.default_rng(draw(st.integers(0, 99)))
    matrix = numbers.standard_normal((rows, width)).astype(np.float32)
    matrix[numbers.random(matrix.shape) < draw(st.sampled_from([0, 0.5, 1]))] = 0
    matrix[:, draw(st.integers(0, width - 1))] *= draw(st.sampled_from([1, 100]))
    return matrix * np.float32(draw(st.sampled_from([1e-42, 1e-30, 1e-3, 1, 1e30])))


def numbers_of(matrix, base):
    return np.asarray(quantised(jnp.asarray(matrix), base).matrix(jnp.float32))


@settings(max_examples=60, deadline=None)
@given(matrices(), FORMATS)
def test_a_quantised_number_is_as_near_as_its_format_allows(matrix, base):
    found = numbers_of(matrix, base)
    assert found.shape == matrix.shape
    assert np.isfinite(found).all()
    if base.format == "int8":
        largest = np.abs(matrix).max(axis=1, keepdims=True)
        bound = largest / 127 / 2 * 1.001 + 1e-36
    elif base.format == "int4":
        padded = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % GROUP)))
        largest = np.abs(padded.reshape(len(matrix), -1, GROUP)).max(axis=2)
        # Half a step; on the other side of 0 the last of its steps is missing.
        bound = np.repeat(largest, GROUP, axis=1)[:, : matrix.shape[1]] / 8 * 1.02 + 1e-36
    else:
        flat = np.pad(matrix.ravel(), (0, -matrix.size % GROUP)).reshape(-1, GROUP)
        largest = np.repeat(np.abs(flat).max(axis=1), GROUP)[: matrix.size].reshape(matrix.shape)
        bound = largest * np.diff(LEVELS).max() / 2 * 1.001 + 1e-36
        if base.double:  # absmax are off by a part of the largest distance from their mean
            bound = bound + 0.05 * np.abs(matrix).max()
    assert (np.abs(found - matrix) <= bound).all()
    assert (found[matrix == 0] == 0).all() or base.double


@settings(max_examples=60, deadline=None)
@given(matrices(), FORMATS)
def test_what_is_on_disk_is_what_the_config_says_and_comes_back(matrix, base):
    weight = quantised(jnp.asarray(matrix), base)
    arrays = to_disk(weight)
    assert {n: (x.shape, x.dtype.name) for n, x in arrays.items()} == base.parts(matrix.shape)
    again = from_disk(arrays, matrix.shape, base)
    for one, other in zip(jax.tree.leaves(weight), jax.tree.leaves(again), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.words)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_has_no_code_is_refused(base, bad):
    matrix = np.ones((4, 64), np.float32)
    matrix[1, 3] = bad
    with pytest.raises(InputError, match="w holds NaN or infinity"):
        coded_arrays("w", matrix, base)


def test_arrays_of_another_shape_or_dtype_are_refused():
    arrays = to_disk(quantised(jnp.ones((4, 64)), Base("int8")))
    for wrong in (
        {**arrays, "codes": arrays["codes"].astype(np.uint8)},
        {**arrays, "scale": arrays["scale"][:2]},
        {"codes": arrays["codes"]},
    ):
        with pytest.raises(InputError, match=r"expected .*codes.* found"):
            from_disk(wrong, (4, 64), Base("int8"))


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.words)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_and_its_gradient_are_those_of_the_matrix(base, dtype):
    draw = np.random.default_rng(0)
    weight = quantised(jnp.asarray(draw.standard_normal((48, 130)), jnp.float32), base)
    plain = Weight(weight.matrix(dtype))
    x = jnp.asarray(draw.standard_normal((2, 5, 130)), dtype)
    slope = jnp.asarray(draw.standard_normal((2, 5, 48)), dtype)

    def pulled(some):
        return jax.vjp(some.product, x)[1](slope)[0]

    near = {"rtol": 1e-5, "atol": 1e-4} if dtype == jnp.float32 else {"rtol": 2e-2, "atol": 0.1}
    for found, expected in (
        (weight.product(x), plain.product(x)),
        (pulled(weight), pulled(plain)),
        (weight.squared_lengths(dtype), plain.squared_lengths(dtype)),
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(*(y.astype(jnp.float32) for y in (found, expected)), **near)


# nf4 against bitsandbytes.


@pytest.fixture(scope="module")
def bitsandbytes():
    torch = pytest.importorskip("torch", reason="torch is not installed here")
    functional = pytest.importorskip("bitsandbytes.functional", reason="no bitsandbytes here")
    return torch, functional


SHAPES = [(64, 64), (172, 64), (64, 172), (33, 50), (512, 256), (8, 30), (1, 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [0, 1e-30, 1e-3, 1, 1e30])
def test_nf4_has_the_codes_and_the_numbers_of_bitsandbytes(bitsandbytes, shape, scale, dtype):
    torch, functional = bitsandbytes
    draw = np.random.default_rng(0)
    given = torch.tensor(draw.standard_normal(shape) * scale).to(getattr(torch, dtype))
    if not torch.isfinite(given).all():
        pytest.skip("beyond the dtype")
    theirs, state = functional.quantize_4bit(given, quant_type="nf4")
    ours = quantised(jnp.asarray(given.float().numpy()), Base("nf4", double=False))
    arrays = to_disk(ours)
    np.testing.assert_array_equal(arrays["codes"], theirs.numpy().ravel())
    # Of a short block of zeros bitsandbytes says 1e-38.
    np.testing.assert_allclose(arrays["absmax"], state.absmax.numpy(), rtol=0, atol=2e-38)
    expected = functional.dequantize_4bit(theirs, state).float().numpy()
    found = ours.matrix(dtype).astype(jnp.float32)
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1, 1e30])
def test_double_quantisation_is_that_of_bitsandbytes(bitsandbytes, shape, scale):
    """The 4-bit codes are equal; an 8-bit one differs only where two are as near to 2e-4."""
    torch, functional = bitsandbytes
    given = np.random.default_rng(1).standard_normal(shape).astype(np.float32) * np.float32(scale)
    theirs, state = functional.quantize_4bit(
        torch.tensor(given), quant_type="nf4", compress_statistics=True
    )
    ours = quantised(jnp.asarray(given), Base("nf4"))
    arrays = to_disk(ours)
    np.testing.assert_array_equal(arrays["codes"], theirs.numpy().ravel())
    np.testing.assert_allclose(arrays["nested_absmax"], state.state2.absmax.numpy(), rtol=1e-5)
    np.testing.assert_allclose(arrays["nested_offset"], state.offset.numpy(), rtol=1e-6)
    _, plain = functional.quantize_4bit(torch.tensor(given), quant_type="nf4")
    inside = (plain.absmax - state.offset).numpy()
    inside = (
        inside
        / np.repeat(np.where(state.state2.absmax > 0, state.state2.absmax, 1), 256)[: len(inside)]
    )
    levels = nested_levels()
    if not state.state2.absmax.any():
        return  # all are the mean, whatever their codes
    distances = [np.abs(levels[codes] - inside) for codes in (arrays["absmax"], state.absmax)]
    np.testing.assert_allclose(*distances, atol=2e-4)
    # Of the same arrays both make the same numbers.
    read = from_disk(
        {"codes": theirs.numpy().ravel(), "absmax": state.absmax.numpy(),
         "nested_absmax": state.state2.absmax.numpy(), "nested_offset": state.offset.numpy()},
        shape, Base("nf4"),
    )  # fmt: skip
    expected = functional.dequantize_4bit(theirs, state).numpy()
    np.testing.assert_allclose(read.matrix(jnp.float32), expected, rtol=1e-6)


def test_the_numbers_of_8_bit_codes_are_those_of_bitsandbytes(bitsandbytes):
    theirs = bitsandbytes[1].create_dynamic_map().numpy()
    np.testing.assert_allclose(nested_levels(), theirs, rtol=2e-7)
