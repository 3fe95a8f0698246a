"""Packed documents: the rows they are moved to, and attention there."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import made

from jllama.attention import causal_attention
from train.data.batches import Batches
from train.data.documents import (
    SHAPES,
    WORTH,
    evenly,
    lay_out,
    longer_than,
    shapes_for,
    stacked,
    widths,
)

H, N, K = 8, 4, 2  # a head, heads, and those of keys and values


def masked_attention(query, key, value, segments):
    """Softmax over all pairs of positions, one head and one sequence after the other, in fp64."""
    out = np.zeros(query.shape)
    for b, n in itertools.product(range(len(query)), range(N)):
        scores = query[b, :, n] @ key[b, :, n * K // N].T / np.sqrt(H)
        seen = np.tri(len(scores), dtype=bool) & (segments[b][:, None] == segments[b][None])
        weights = np.exp(np.where(seen, scores, -np.inf))
        out[b, :, n] = weights / weights.sum(axis=1, keepdims=True) @ value[b, :, n * K // N]
    return out * (segments > 0)[..., None, None]


@st.composite
def packings(draw):
    """(B, T), and the lengths of the documents of each of B sequences."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    rows = []
    for _ in range(B):
        lengths = draw(st.lists(st.integers(1, T), min_size=not rows, max_size=9))
        ends = np.cumsum(lengths)
        rows.append(lengths[: int(np.searchsorted(ends, T, side="right"))])
    return (B, T), rows


def shapes_of(rows, shape):
    lengths = np.array([n for row in rows for n in row], int)
    return shapes_for(longer_than(lengths, np.zeros_like(lengths), shape[1]), *shape)


@settings(max_examples=200, deadline=None)
@given(packings())
def test_every_token_of_a_document_has_one_place_and_lies_in_its_row_in_order(packing):
    shape, rows = packing
    found = lay_out(rows, shape, shapes_of(rows, shape))
    spans, held = [], np.zeros(shape, int)
    for b, row in enumerate(rows):
        for end, length in zip(np.cumsum(row), row, strict=True):
            spans.append(list(range(b * shape[1] + end - length, b * shape[1] + end)))
    lines = []
    for documents in found:
        nowhere = documents.places == documents.rows.size
        held += ~nowhere
        there = documents.rows.ravel()[documents.places[~nowhere]]
        assert there.tolist() == np.flatnonzero(~nowhere).tolist()  # there and back
        lines += [line[line < held.size].tolist() for line in documents.rows]
        filled = (documents.rows < held.size).astype(int)
        assert (np.diff(filled, axis=1) <= 0).all()
    assert sorted(filter(None, lines)) == sorted(spans)
    assert np.flatnonzero(held).tolist() == sorted(itertools.chain.from_iterable(spans))
    assert held.max() == 1


@settings(max_examples=6, deadline=None)
@given(packings(), st.integers(0, 9))
def test_documents_attend_to_themselves_alone_and_so_do_gradients(packing, seed):
    shape, rows = packing
    draw = np.random.default_rng(seed)
    arrays = [jnp.asarray(draw.normal(size=(*shape, n, H)), jnp.float32) for n in (N, K, K)]
    segments = np.zeros(shape, int)
    for segment, row in zip(segments, rows, strict=True):
        numbers = np.repeat(np.arange(1, len(row) + 1), row)
        segment[: len(numbers)] = numbers
    documents = jax.tree.map(jnp.asarray, lay_out(rows, shape, shapes_of(rows, shape)))

    def masked(query, key, value):
        mask = jnp.asarray(segments[:, :, None] == segments[:, None, :])[:, None]
        out = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True)
        return jnp.where((segments > 0)[..., None, None], out, 0.0)

    out = causal_attention(*arrays, documents, "xla")
    np.testing.assert_allclose(out, masked_attention(*arrays, segments), atol=1e-5)
    slopes = jnp.asarray(draw.normal(size=out.shape), jnp.float32)
    found, expected = (
        jax.grad(lambda *a, f=f: jnp.sum(f(*a) * slopes), argnums=(0, 1, 2))(*arrays)
        for f in (lambda *a: causal_attention(*a, documents, "xla"), masked)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def positions(shapes):
    return sum(rows * length for rows, length in shapes)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=30), st.integers(1, 3))
def test_shapes_have_the_fewest_positions_of_all(lengths, batch):
    """Of all ways to choose up to three lengths; another shape must be worth it."""
    longer = longer_than(np.array(lengths), np.zeros(len(lengths), int), 200)
    needed = dict(zip([0, *widths(200)], [*-(-longer // batch), 0], strict=True))
    longest = next(int(w) for w in widths(200) if w >= max(lengths))
    shorter = [int(w) for w in widths(200) if w < longest]
    best = {}
    for count in range(1, SHAPES + 1):
        for some in itertools.combinations(shorter, count - 1):
            edges = [0, *some, longest]
            pairs = itertools.pairwise(edges)
            whole = sum((needed[a] - needed[b]) * b for a, b in pairs)
            best[count] = min(best.get(count, whole), whole)
    found = shapes_for(longer, batch, 200)
    assert positions(found) <= min(best.values()) / WORTH ** (SHAPES - 1) + 1e-9
    assert positions(found) >= best[max(best)]
    assert len(found) <= SHAPES
    assert [length for _, length in found] == sorted({length for _, length in found})


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=120),
    k=st.integers(1, 3), batch=st.integers(1, 3), seed=st.integers(0, 3),
)  # fmt: skip
def test_a_runs_shapes_hold_every_window_of_every_epoch(lengths, k, batch, seed):
    batches = Batches(
        made(lengths), accumulation=k, batch=batch, max_seq_len=100, packing=True,
        shuffle=True, seed=seed, epochs=3,
    )  # fmt: skip
    for step in range(len(batches)):
        window = batches.window(step)
        assert [documents.rows.shape for documents in window.documents] == [
            (k, batch * n, length) for n, length in batches.documents
        ]
        held = sum(int((documents.rows < batch * 100).sum()) for documents in window.documents)
        assert held == int(window.mask.sum())


def test_one_shape_serves_documents_of_one_length():
    assert evenly(300, 4096) == ((14, 320),)
    assert evenly(300, 256) == ((1, 256),)
    lengths = [[300] * 13 + [196]] * 2
    assert lay_out(lengths, (2, 4096), evenly(300, 4096))[0].rows.shape == (28, 320)
    assert stacked([lay_out(lengths, (2, 4096), evenly(300, 4096))] * 3)[0].places.shape == (
        3, 2, 4096,
    )  # fmt: skip


def test_documents_without_room_are_an_error():
    two = ((1, 32), (1, 64))
    for lengths, shapes in ([40], two[:1]), ([5, 5], two[:1]), ([33, 33], two), ([5, 5, 5], two):
        with pytest.raises(ValueError, match="do not fit"):
            lay_out([lengths], (1, 100), shapes)
