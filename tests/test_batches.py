"""From examples to windows: orders, held-out rows, packing, buckets."""

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllama.cli import children
from jllama.errors import InputError
from jllama.folders.json_files import read_json
from jllama.text.rows import Example, Examples
from train.data import batches as module
from train.data import speed
from train.data.batches import Batches, hold_out, shuffled
from train.data.packing import OPEN_SEQUENCES, pack


def joined(*rows):
    """Examples of (ids, what is learned)."""
    return Examples.of(
        Example(i, np.array(ids, np.int32), np.array(learned, bool))
        for i, (ids, learned) in enumerate(rows)
    )


def made(lengths):
    return joined(*((range(n + 1), [False] + [True] * n) for n in lengths))


def grain_order(n, seed, epoch):
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return [int(i) for i in grain.MapDataset.range(n).shuffle(seed=mixed)]


def plain_sequences(order, lengths, capacity):
    """Packing without an index: every open sequence is looked at for every row."""
    done, unfilled = [], []
    for row in order:
        rooms = [capacity - sum(lengths[i] for i in rows) for rows in unfilled]
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= lengths[row]]
        if fitting:
            unfilled[min(fitting)[1]].append(row)
            continue
        if len(unfilled) == OPEN_SEQUENCES:
            done.append(unfilled.pop(rooms.index(min(rooms))))
        unfilled.append([row])
    return done + unfilled


def plain_windows(lengths, size, order, buckets, capacity):
    """One epoch's windows, made row by row; packed where `buckets` is 0."""
    padded, sequences = [capacity], [[row] for row in order]
    if buckets:
        longest = [sorted(lengths)[len(lengths) * (i + 1) // buckets - 1] for i in range(buckets)]
        padded = sorted({min(capacity, (length + 31) // 32 * 32) for length in longest})
    else:
        sequences = plain_sequences(order, lengths, capacity)
    windows, filling = [], {length: [] for length in padded}
    for rows in sequences:
        used = sum(lengths[i] for i in rows)
        window = filling[min(length for length in padded if length >= used)]
        window.append(rows)
        if len(window) == size:
            windows.append(window.copy())
            window.clear()
    return windows + [window for window in filling.values() if window]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=120),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    buckets=st.integers(0, 4),
    shuffle=st.booleans(),
    seed=st.integers(0, 5),
    epochs=st.integers(1, 4),
)
def test_windows_are_those_made_row_by_row(lengths, shape, buckets, shuffle, seed, epochs):
    examples = joined(*(([i] * (n + 1), [False] + [True] * n) for i, n in enumerate(lengths)))
    batches = Batches(
        examples, accumulation=shape[0], batch=shape[1], max_seq_len=128, packing=not buckets,
        length_buckets=buckets or 1, shuffle=shuffle, seed=seed, epochs=epochs,
    )  # fmt: skip
    expected, ends, places, n = [], [], 0, len(lengths)
    for epoch in range(epochs):
        order = grain_order(n, seed, epoch) if shuffle else range(n)
        expected += plain_windows(lengths, shape[0] * shape[1], order, buckets, 128)
        ends.append(len(expected))
    assert batches.epoch_ends == ends
    assert len(batches) == len(expected)
    for step, sequences in enumerate(expected):
        window = batches.window(step)
        lines = zip(window.tokens.reshape(-1, window.tokens.shape[-1]),
                    window.mask.reshape(-1, window.mask.shape[-1]), strict=True)  # fmt: skip
        found = [tokens[mask].tolist() for tokens, mask in lines]
        wanted = [[i for i in rows for _ in range(lengths[i])] for rows in sequences]
        assert found == wanted + [[]] * (len(found) - len(wanted))
        assert batches.rows(step) == [i for rows in sequences for i in rows]
        assert batches.padding_share(step) == 1 - window.mask.sum() / window.mask.size
        places += window.mask.size
    assert batches.padding_share() == 1 - epochs * sum(lengths) / places


@pytest.fixture
def orders(monkeypatch):
    """The epochs whose order was made, one after the other."""
    made_for = []

    def watched(n, seed, epoch, first=None):
        made_for.append((epoch, n if first is None else first))
        return shuffled(n, seed, epoch, first)

    monkeypatch.setattr(module, "shuffled", watched)
    return made_for


@pytest.mark.parametrize("buckets", [1, 3])
def test_an_epoch_is_ordered_when_a_step_of_it_is_asked_for(orders, buckets):
    batches = Batches(
        made(range(1, 41)), accumulation=2, batch=2, max_seq_len=64, packing=False,
        length_buckets=buckets, shuffle=True, seed=0, epochs=1000,
    )  # fmt: skip
    assert len(batches) == 1000 * batches.epoch_ends[0]
    assert 0 < batches.padding_share() < 1
    assert orders == []
    border = batches.epoch_ends[0]
    for step in (0, 1, border - 1, border, border - 1, border + 1):  # reading ahead and reports
        batches.window(step), batches.rows(step), batches.padding_share(step)
    assert orders == [(0, 40), (1, 40)]
    batches.window(batches.epoch_ends[700])
    assert orders == [(0, 40), (1, 40), (701, 40)]


def test_packing_orders_each_epoch_once_and_keeps_the_first(orders):
    batches = Batches(
        made(range(1, 41)), accumulation=1, batch=2, max_seq_len=64, packing=True, shuffle=True,
        seed=0, epochs=4,
    )  # fmt: skip
    assert orders == [(epoch, 40) for epoch in (3, 2, 1, 0)]
    for step in range(batches.epoch_ends[1]):
        batches.window(step)
    assert len(orders) == 4


def test_holding_out_orders_no_more_rows_than_it_takes(orders):
    examples = made([1] * 100)
    training, held_out = hold_out(examples, 0.0, seed=0)
    assert (len(training), len(held_out)) == (100, 0)
    _, held_out = hold_out(examples, 0.1, seed=0)
    assert orders == [(2**31, 0), (2**31, 10)]
    assert held_out.rows.tolist() == sorted(grain_order(100, 0, 2**31)[:10])


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    k=st.integers(1, 4),
    batch=st.integers(1, 4),
    plan=st.sampled_from([{"packing": True}] + [{"length_buckets": n} for n in (1, 2, 5)]),
    seed=st.integers(0, 5),
)
def test_every_row_is_trained_on_exactly_once_an_epoch(lengths, k, batch, plan, seed):
    batches = Batches(
        made(lengths), accumulation=k, batch=batch, max_seq_len=40, shuffle=True, seed=seed,
        epochs=2, **{"packing": False} | plan,
    )  # fmt: skip
    border = batches.epoch_ends[0]
    first = [row for step in range(border) for row in batches.rows(step)]
    second = [row for step in range(border, len(batches)) for row in batches.rows(step)]
    assert sorted(first) == sorted(second) == list(range(len(lengths)))
    supervised = sum(int(batches.window(step).mask.sum()) for step in range(border))
    assert supervised == sum(lengths)


def test_packed_rows_have_their_own_documents_and_positions():
    batches = Batches(
        made([3, 4]), accumulation=1, batch=1, max_seq_len=10, packing=True, shuffle=False,
        seed=0, epochs=1,
    )  # fmt: skip
    window = batches.window(0)
    (documents,) = window.documents
    assert documents.rows[0, :, :5].tolist() == [[3, 4, 5, 6, 10], [0, 1, 2, 10, 10]]
    assert documents.places[0, 0].tolist() == [10, 11, 12, 0, 1, 2, 3, 20, 20, 20]
    assert window.positions[0, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0, 0]
    assert window.targets[0, 0].tolist() == [1, 2, 3, 1, 2, 3, 4, 0, 0, 0]


@pytest.mark.parametrize("packing", [False, True])
def test_padding_is_masked_by_length_and_never_by_id(packing):  # lesson 8
    zeros = [1, 7, 0, 0, 0], [False, False, True, True, True]  # its end token is 0, too
    longer = [1, *range(2, 9)], [False] * 6 + [True] * 2
    batches = Batches(
        joined(zeros, longer), accumulation=1, batch=2, max_seq_len=16, packing=packing,
        shuffle=False, seed=0, epochs=1,
    )  # fmt: skip
    window = batches.window(0)
    assert window.targets[0, 0, :4].tolist() == [7, 0, 0, 0]
    assert window.mask[0, 0, :4].tolist() == [False, True, True, True]
    assert window.mask.sum() == 5


def test_length_buckets_pad_less_and_give_one_shape_each():
    lengths = [5, 9, 20, 40, 90, 100] * 10
    shapes, shares = {}, {}
    for buckets in (1, 2, 3):
        batches = Batches(
            made(lengths), accumulation=2, batch=2, max_seq_len=512, packing=False,
            length_buckets=buckets, shuffle=True, seed=0, epochs=1,
        )  # fmt: skip
        windows = [batches.window(step) for step in range(len(batches))]
        shapes[buckets] = {window.tokens.shape for window in windows}
        places = sum(window.tokens.size for window in windows)
        assert batches.padding_share() == pytest.approx(1 - sum(lengths) / places)
        shares[buckets] = batches.padding_share()
    assert shapes[1] == {(2, 2, 128)}
    assert shapes[2] == {(2, 2, 32), (2, 2, 128)}
    assert shapes[3] == {(2, 2, 32), (2, 2, 64), (2, 2, 128)}
    assert shares[3] < shares[2] < shares[1]


def packed(order, lengths, capacity):
    sequences = pack(np.array(order), np.array(lengths, np.int32), capacity)
    return [sequences[i].tolist() for i in range(len(sequences))]


def test_packing_fills_the_fullest_sequence_that_has_room():
    assert packed([0, 1, 2, 3], [3, 5, 2, 4], 8) == [[0, 1], [2, 3]]
    lengths = np.random.default_rng(0).integers(20, 100, 400).tolist()  # many stay open for long
    order = grain_order(400, 0, 0)
    sequences = packed(order, lengths, 128)
    assert sequences == plain_sequences(order, lengths, 128)
    assert len(sequences) > 4 * OPEN_SEQUENCES


def test_order_depends_only_on_seed_and_epoch():
    order = shuffled(50, 1, 2).tolist()
    assert order == shuffled(50, 1, 2).tolist()
    assert order != shuffled(50, 1, 3).tolist()
    assert order != shuffled(50, 2, 2).tolist()
    assert sorted(order) == list(range(50))


@pytest.mark.parametrize("n", [1, 2, 3, 50, 257])
def test_an_order_is_that_of_grains_shuffle(n):
    for seed, epoch in ((0, 0), (0, 1), (7, 2), (2**32 - 1, 2**31)):
        order = grain_order(n, seed, epoch)
        assert shuffled(n, seed, epoch).tolist() == order
        assert shuffled(n, seed, epoch, first=n // 2).tolist() == order[: n // 2]


@pytest.mark.parametrize("n", [2**13 - 1, 2**13, 2**16, 2**16 + 1, 2**16 + 2, 2**18 + 2, 10**6])
def test_a_long_order_is_that_of_grains_shuffle(n):
    """Also around the numbers at which the cipher takes another size of blocks."""
    for seed in (0, 2**32 - 1):
        mixed = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
        grains = grain.MapDataset.range(n).shuffle(seed=mixed)
        order = shuffled(n, seed, 1)
        some = [*np.random.default_rng(0).integers(n, size=300).tolist(), n - 1]
        assert order[some].tolist() == [int(grains[i]) for i in some]


def test_windows_from_a_step_are_those_of_the_whole_run():
    batches = Batches(
        made([3, 4, 5, 6, 7]), accumulation=1, batch=2, max_seq_len=10, packing=False,
        shuffle=True, seed=3, epochs=2,
    )  # fmt: skip
    whole, late = list(batches.from_step(0)), list(batches.from_step(4))
    assert len(whole) == 6
    for expected, found in zip(whole[4:], late, strict=True):
        np.testing.assert_array_equal(expected.tokens, found.tokens)


def test_held_out_rows_are_not_trained_on():
    training, held_out = hold_out(made([1] * 20), 0.25, seed=0)
    assert len(held_out) == 5
    assert not {e.row for e in training} & {e.row for e in held_out}
    with pytest.raises(InputError, match="holds out all 20 rows"):
        hold_out(made([1] * 20), 20.0, seed=0)


def test_the_benchmark_measures_every_number_of_rows_alone(tmp_path, monkeypatch):
    def run(module_name, flags):
        assert module_name == "train.data.speed"
        speed.main([str(flag) for flag in flags])

    monkeypatch.setattr(children, "run", run)
    speed.main(["--rows", "30", "60", "--output", str(tmp_path / "figures.json")])
    for figure, rows in zip(read_json(tmp_path / "figures.json")["figures"], (30, 60), strict=True):
        assert figure["rows"] == rows
        assert 30 * rows < figure["tokens"] < 300 * rows
        assert len(figure["cpu_seconds"]) == 6
        assert min(figure["cpu_seconds"].values()) > 0
