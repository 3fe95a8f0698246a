"""Rows of large files: tokenised by several processes, kept in a cache, the same as small ones."""

import csv
import dataclasses
import gzip
import json
import os
import shutil
import threading
import tracemalloc

import numpy as np
import pytest

from jllama import SAMPLE
from jllama.errors import InputError
from jllama.text.rows import Part
from jllama.text.tokenizer import load_tokenizer
from train.config import TrainConfig
from train.data import load
from train.data.large import cache, pool

ARRAYS = ("ids", "learned", "starts", "lengths", "learned_counts", "rows", "cut", "weights")


def rows_of(number):
    """Rows of which some are unusable, too long, or noteworthy."""
    rows = [{"prompt": f"What is {i} + 1? ☕", "completion": str(i + 1)} for i in range(number)]
    rows[5]["completion"] = ""
    rows[11]["completion"] = "a long answer " * 30
    rows[17]["prompt"] = ""
    rows[23]["completion"] = "</s>"
    return rows


def write(rows, file):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".csv":
        with file.open("w", newline="") as table:
            csv.writer(table).writerows([[*rows[0]], *(row.values() for row in rows)])
    elif file.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), file)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    else:
        file.write_text(json.dumps(rows) if file.suffix == ".json" else lines)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "available_cores", lambda: 1)
    write(rows_of(40), tmp_path / "a.jsonl")
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SAMPLE)


def config(place, *names, **more):
    data = tuple(str(place / name) for name in names or ("a.jsonl",))
    return TrainConfig(
        **{"model": str(SAMPLE), "data": data, "skip_bad_rows": 9, "max_seq_len": 60} | more
    )


def loaded(config, tokenizer, monkeypatch, large):
    monkeypatch.setattr(load, "LARGE", 0 if large else 2**40)
    monkeypatch.setattr(pool, "CHUNK", 7)
    monkeypatch.setattr(load, "CHUNK", 7)
    return load.load_examples(config, tokenizer)[0]


def check_same(one, other):
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    assert {note: [*rows] for note, rows in one.notes.items()} == {
        note: [*rows] for note, rows in other.notes.items()
    }


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "jsonl.gz", "parquet"])
def test_large_files_give_what_small_ones_do(kind, place, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(load, "available_cores", lambda: 2)
    write(rows_of(30), place / f"b.{kind}")
    of = config(place, "a.jsonl", f"b.{kind}:0.5", long_rows="split", max_rows=29)
    small = loaded(of, tokenizer, monkeypatch, large=False)
    said = capsys.readouterr().out
    assert f"left out: b.{kind}: row 5: the answer is empty" in said
    assert "spell out special tokens" in said
    for _ in range(2):  # made, and from the cache
        check_same(loaded(of, tokenizer, monkeypatch, large=True), small)
        lines = capsys.readouterr().out.splitlines()
        told = [line for line in lines if not line.startswith("tokenising")]
        assert told == said.splitlines()
    assert (small.weights == np.where(small.rows < 29, 1, 0.5)).all()
    assert small.ids.dtype == np.uint16


def test_errors_of_large_files_are_those_of_small_ones(place, tokenizer, monkeypatch):
    said = []
    for large in (False, True):
        with pytest.raises(InputError) as error:
            loaded(config(place, skip_bad_rows=0), tokenizer, monkeypatch, large)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert "row 5: the answer is empty" in said[0]
    (place / "broken.jsonl").write_text('{"prompt": "a"')
    with pytest.raises(InputError, match=r"broken\.jsonl"):
        loaded(config(place, "broken.jsonl"), tokenizer, monkeypatch, large=True)
    assert [folder.name for folder in stored(place) if folder.name.startswith(".")] == []


def stored(place):
    return list((place / "cache/jllama/rows").iterdir())


def test_what_is_stored_is_not_read_again_and_another_thing_is(place, tokenizer, monkeypatch):
    reads = []

    def read(sources, *more):
        reads.append(sources)
        return read_sources(sources, *more)

    read_sources = load.read_sources
    monkeypatch.setattr(load, "read_sources", read)
    of = config(place)
    loaded(of, tokenizer, monkeypatch, large=True)
    loaded(dataclasses.replace(of, skip_bad_rows=3, seed=7, epochs=9), tokenizer, monkeypatch, True)
    loaded(config(place, "a.jsonl:0.5"), tokenizer, monkeypatch, large=True)
    assert len(reads) == 1
    shutil.copytree(SAMPLE, place / "model")
    with (place / "model/config.json").open("a") as file:
        file.write(" ")
    (place / "chat.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    shutil.copyfile(place / "a.jsonl", place / "other.jsonl")
    others = [
        {"max_seq_len": 61}, {"prompt_style": "report"}, {"train_on_prompt": True},
        {"learn": "last"}, {"long_rows": "drop"}, {"max_rows": 30},
        {"columns": "question=prompt"}, {"data": str(place / "other.jsonl")},
        {"prompt_template": str(place / "chat.jinja")},
    ]  # fmt: skip
    for number, other in enumerate(others, start=2):
        loaded(dataclasses.replace(of, **other), tokenizer, monkeypatch, large=True)
        assert len(reads) == number, other
    assert len(stored(place)) == len(reads)
    write(rows_of(41), place / "a.jsonl")
    monkeypatch.setattr(load, "tokenizer_files", lambda folder: {"tokenizer.model": b"another"})
    loaded(of, tokenizer, monkeypatch, large=True)
    monkeypatch.setattr(load, "_code", lambda: {"rows.py": "another"})
    loaded(of, tokenizer, monkeypatch, large=True)
    assert len(reads) == len(others) + 3


def cut_short(file):
    os.truncate(file, file.stat().st_size - 3)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("ids", flip), ("learned", cut_short), ("each", os.remove), ("head.json", flip)],
)
def test_a_damaged_folder_is_made_again(name, damage, place, tokenizer, monkeypatch):
    small = loaded(config(place), tokenizer, monkeypatch, large=False)
    loaded(config(place), tokenizer, monkeypatch, large=True)
    (folder,) = stored(place)
    before = folder.stat().st_ino
    damage(folder / name)
    check_same(loaded(config(place), tokenizer, monkeypatch, large=True), small)
    (folder,) = stored(place)
    assert folder.stat().st_ino != before
    check_same(loaded(config(place), tokenizer, monkeypatch, large=True), small)


def test_without_a_place_for_it_nothing_is_kept_and_a_note_says_so(
    place, tokenizer, monkeypatch, capsys
):
    small = loaded(config(place), tokenizer, monkeypatch, large=False)
    (place / "cache").write_text("no folder")
    capsys.readouterr()
    check_same(loaded(config(place), tokenizer, monkeypatch, large=True), small)
    assert capsys.readouterr().out.count("note: tokenised rows are not kept") == 1


def test_a_full_disk_leaves_nothing_and_training_goes_on(place, tokenizer, monkeypatch, capsys):
    small = loaded(config(place), tokenizer, monkeypatch, large=False)

    def full(folder, made):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(load, "write_head", full)
    check_same(loaded(config(place), tokenizer, monkeypatch, large=True), small)
    assert "No space left on device" in capsys.readouterr().out
    assert stored(place) == []


def test_files_that_change_meanwhile_are_not_stored(place, tokenizer, monkeypatch):
    def read(*settings):
        found = read_sources(*settings)
        os.utime(place / "a.jsonl", ns=(1, 1))
        return found

    read_sources = load.read_sources
    monkeypatch.setattr(load, "read_sources", read)
    loaded(config(place), tokenizer, monkeypatch, large=True)
    assert stored(place) == []


def test_of_two_at_once_one_makes_it_and_the_other_waits(place, tokenizer, monkeypatch):
    made, found = [], []
    begun, go_on = threading.Event(), threading.Event()
    gathered = load.gathered

    def slowly(folder, *more):
        made.append(folder)
        begun.set()
        assert go_on.wait(60)
        return gathered(folder, *more)

    small = loaded(config(place), tokenizer, monkeypatch, large=False)
    monkeypatch.setattr(load, "gathered", slowly)
    monkeypatch.setattr(load, "LARGE", 0)
    run = lambda: found.append(load.load_examples(config(place), tokenizer)[0])  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(2)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    threads[1].join(0.5)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(made) == 1
    assert len(found) == 2
    for one in found:
        check_same(one, small)


def test_what_a_killed_process_left_goes_and_the_oldest_beyond_the_limit(
    place, tokenizer, monkeypatch
):
    loaded(config(place), tokenizer, monkeypatch, large=True)
    (first,) = stored(place)
    os.utime(first, (1, 1))
    left = first.parent / ".left.partial"
    left.mkdir()
    (left / "ids").write_bytes(b"half")
    loaded(config(place, max_rows=30), tokenizer, monkeypatch, large=True)
    assert not left.exists()
    assert len(stored(place)) == 2
    monkeypatch.setattr(cache, "LIMIT", 1)
    loaded(config(place, max_rows=29), tokenizer, monkeypatch, large=True)
    assert len(stored(place)) == 1
    assert first not in stored(place)


def test_a_process_that_ends_is_an_error_with_its_code(place, tokenizer, monkeypatch, capfd):
    with pytest.raises(InputError, match="tokenised rows from 0 on ended with code 1"):
        loaded(config(place, model=str(place)), tokenizer, monkeypatch, large=True)
    assert stored(place) == []


def test_joined_parts_lie_on_disk_and_not_in_memory(tmp_path):
    """Five numbers of each example are held; its tokens, here 500, are not."""

    def parts():
        each = np.tile(np.array([500, 499, 0, 1, 0], np.int32), (200, 1))
        for _ in range(100):
            yield Part(np.ones(100_000, np.int32), np.ones(100_000, bool), each, [], {})

    tracemalloc.start()
    try:
        examples, _ = cache.gathered(tmp_path, parts(), 32_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(examples.ids) == 10**7
    assert examples[19_999].ids.tolist() == [1] * 500
    assert peak < 4 * 2**20
