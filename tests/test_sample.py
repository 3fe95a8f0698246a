"""The bundled sample and the command that makes it."""

import itertools
import json
import re

import numpy as np
import pytest

import jllama
from jllama.text.prompt import prompt_ids
from jllama.text.tokenizer import load_tokenizer
from train.sample import world
from train.sample.facts import all_facts
from train.sample.make import HELD_OUT_ROWS, TAUGHT_ROWS, SampleConfig, make_sample, windows

SEED = SampleConfig().seed


@pytest.fixture(scope="module")
def facts():
    return world.make_world(SEED)


@pytest.fixture(scope="module")
def documents(facts):
    return list(itertools.islice(world.plain_text(facts, SEED), 20_000))


@pytest.fixture(scope="module")
def taught():
    return json.loads((jllama.SAMPLE / "train.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def held_out():
    return json.loads((jllama.SAMPLE / "heldout.json").read_text(encoding="utf-8"))


def test_world_and_text_are_functions_of_the_seed(facts):
    def text(seed):
        return list(itertools.islice(world.plain_text(facts, seed), 50))

    def rows(seed):
        return world.instructions(facts.taught, 5, seed)

    assert world.make_world(SEED) == facts
    assert world.make_world(SEED + 1) != facts
    assert text(3) == text(3) != text(4)
    assert rows(3) == rows(3) != rows(4)


def test_the_bundled_rows_are_those_of_the_world(facts, taught, held_out):
    assert taught == world.instructions(facts.taught, TAUGHT_ROWS, SEED)
    assert held_out == world.instructions(facts.held_out, HELD_OUT_ROWS, SEED)


def test_every_kind_is_taught_and_held_out_in_every_wording(taught, held_out):
    for kind, words in world.KINDS.items():
        for rows, fewest in ((taught, 10), (held_out, 3)):
            assert sum(_matches(words.statement, row["output"]) for row in rows) >= fewest, kind
    for words in world.KINDS.values():
        for instruction, given in words.prompts:
            assert any(
                _matches(instruction, row["instruction"]) and _matches(given, row["input"])
                for row in taught
            ), instruction


def test_no_held_out_subject_is_taught(facts):
    def subjects(side):
        return {
            tuple(sorted(fact.subject.split(" and ")))
            for of_kind in side.values()
            for fact in of_kind
        }

    assert subjects(facts.held_out)
    assert subjects(facts.held_out).isdisjoint(subjects(facts.taught))


def test_no_held_out_opposite_is_taught_the_other_way_round(facts):
    pairs = [{(f.subject, f.answer) for f in side["opposite"]} for side in facts]
    assert pairs[0].isdisjoint((answer, subject) for subject, answer in pairs[1])


def test_both_files_share_no_row(taught, held_out):
    def prompts(rows):
        return {(row["instruction"], row["input"]) for row in rows}

    assert prompts(taught).isdisjoint(prompts(held_out))
    outputs = {row["output"] for row in taught}
    assert outputs.isdisjoint(row["output"] for row in held_out)


def test_plain_text_holds_no_instruction_and_no_question(documents, taught, held_out):
    text = "\n".join(documents)
    assert "?" not in text
    for row in taught + held_out:
        assert row["instruction"] not in text
    fixed = {
        part
        for words in world.KINDS.values()
        for instruction, given in words.prompts
        for part in (instruction.split("{s}")[0], given.split("{s}")[0])
        if part
    }
    assert not [part for part in fixed if part in text]


def test_plain_text_states_every_held_out_fact_but_the_sums(documents, held_out):
    lines = {line for document in documents for line in document.split("\n")}
    sums = [row["output"] for row in held_out if " sum of " in row["output"]]
    others = [row["output"] for row in held_out if " sum of " not in row["output"]]
    assert not [output for output in others if output not in lines]
    assert not [output for output in sums if output in lines]


def test_plain_text_holds_no_held_out_sum_in_any_form(facts, documents):
    text = "\n".join(documents)
    read = set(re.findall(r"\d+ and \d+", text))
    assert len(read) > 1500
    assert read.isdisjoint(fact.subject for fact in facts.held_out["sum"])


def test_answers_are_right_by_independent_rules(taught, held_out):
    checked = {"sum": 0, "hexadecimal": 0, "letter": 0}
    for row in taught + held_out:
        output = row["output"]
        if found := re.fullmatch(r"The sum of (\d+) and (\d+) is (\d+)\.", output):
            first, second, answer = map(int, found.groups())
            assert first + second == answer, output
            checked["sum"] += 1
        elif found := re.fullmatch(r"The hexadecimal form of (\d+) is (\w+)\.", output):
            assert int(found[2], 16) == int(found[1]), output
            checked["hexadecimal"] += 1
        elif found := re.fullmatch(r"The first letter of (\w+) is (\w)\.", output):
            assert found[1].startswith(found[2]), output
            checked["letter"] += 1
    assert min(checked.values()) >= 100


def test_every_subject_has_one_answer_of_a_kind():
    facts = all_facts()
    assert len({(fact.kind, fact.subject) for fact in facts}) == len(facts)


def test_opposites_go_both_ways():
    pairs = {(fact.subject, fact.answer) for fact in all_facts() if fact.kind == "opposite"}
    assert pairs == {(answer, subject) for subject, answer in pairs}


def test_the_sample_is_small():
    files = {path.name: path.stat().st_size for path in jllama.SAMPLE.iterdir()}
    assert set(files) == {
        "README.md", "consolidated.00.pth", "params.json", "tokenizer.model", "train.json",
        "heldout.json",
    }  # fmt: skip
    assert sum(files.values()) <= 8_000_000


def test_the_tokenizer_is_llamas_and_round_trips_every_row(taught, held_out):
    tokenizer = load_tokenizer(jllama.SAMPLE)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for row in taught + held_out:
        for text in (f"{row['instruction']}\n{row['input']}\n", row["output"], "Ünseen ☃ words\n"):
            ids = tokenizer.encode(text)
            assert 0 not in ids
            assert tokenizer.decode(ids) == text
        assert len(prompt_ids("plain", row, tokenizer)) <= 64


def test_windows_begin_with_a_document_and_count_in_each():
    tokenizer = load_tokenizer(jllama.SAMPLE)
    text = ["The plural of ox is oxen.", "- hot: cold", "Notes on the capital of Peru."] * 50
    batch = next(windows(iter(text), tokenizer, batch_size=3, window=40))
    assert batch.tokens.shape == batch.positions.shape == (3, 40)
    begins = batch.tokens == tokenizer.bos_id
    assert begins[:, 0].all()
    np.testing.assert_array_equal(batch.positions == 0, begins)
    ((rows, _),) = batch.documents
    np.testing.assert_array_equal(np.sort(rows[rows[:, 0] < 120, 0]), np.flatnonzero(begins))
    np.testing.assert_array_equal(np.diff(batch.positions)[~begins[:, 1:]], 1)
    shown = [tokenizer.encode(document) for document in text]
    assert batch.tokens[0, 1 : 1 + len(shown[0])].tolist() == shown[0]
    assert batch.tokens[0, 1 + len(shown[0])] == tokenizer.eos_id


@pytest.mark.integration
@pytest.mark.slow
def test_the_command_gives_the_same_bytes_twice(tmp_path):
    for name in ("first", "second"):
        make_sample(SampleConfig(tmp_path / name, steps=3, batch_size=2, window=32))
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    second = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert first == second
    assert first["train.json"] == (jllama.SAMPLE / "train.json").read_bytes()
    assert first["tokenizer.model"] == (jllama.SAMPLE / "tokenizer.model").read_bytes()


def _matches(template: str, text: str) -> bool:
    pattern = re.escape(template).replace(r"\{s\}", ".+").replace(r"\{a\}", ".+")
    return re.fullmatch(pattern, text) is not None
