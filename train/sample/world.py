"""The closed world of the bundled sample: its facts, its plain text and its instructions.

A fact is (kind, subject, answer). The base model reads facts as plain text, which holds no
instruction and no question:

    Opposites              Entry: mouse
    - hot: cold            The plural of mouse is mice.
    - early: late          The mouse is a kind of mammal.

    Anna looked up the capital of Peru. Ben asked the teacher for the past tense of go.
    The capital of Peru is Lima.
    The past tense of go is went.

LoRA then teaches it to answer instructions about them:

    {"instruction": "What do you call more than one mouse?", "input": "",
     "output": "The plural of mouse is mice."}
    {"instruction": "Add these two numbers.", "input": "Numbers: 23 and 45",
     "output": "The sum of 23 and 45 is 68."}

Every function is pure: what it draws comes from the `random.Random` or the seed it is given.
"""

import itertools
import json
import random
from collections.abc import Iterator
from typing import NamedTuple

from train.sample.facts import OPPOSITES, Fact, all_facts

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack")
INTERESTS = (
    "reads about", "wants to know", "looked up", "has learned", "wrote down", "told us about",
    "asked the teacher for", "talks about", "likes", "thinks of", "is sure of", "once forgot",
)  # fmt: skip


class Kind(NamedTuple):
    """How the facts of a kind are put into words; {s} is the subject, {a} the answer."""

    heading: str  # of a list in plain text
    topic: str  # what a person in plain text is interested in
    statement: str  # in plain text, and the output of every instruction
    prompts: tuple[tuple[str, str], ...]  # (instruction, input)
    weight: float = 1.0  # how often plain text turns to it


KINDS = {
    "opposite": Kind(
        "Opposites",
        "the opposite of {s}",
        "The opposite of {s} is {a}.",
        (
            ("What is the opposite of {s}?", ""),
            ("Give the opposite of this word.", "Word: {s}"),
            ("Which word means the reverse of {s}?", ""),
        ),
    ),
    "plural": Kind(
        "Plurals",
        "the plural of {s}",
        "The plural of {s} is {a}.",
        (
            ("What is the plural of {s}?", ""),
            ("Make this noun plural.", "Noun: {s}"),
            ("What do you call more than one {s}?", ""),
        ),
    ),
    "past": Kind(
        "Past tenses",
        "the past tense of {s}",
        "The past tense of {s} is {a}.",
        (
            ("What is the past tense of {s}?", ""),
            ("Put this verb into the past tense.", "Verb: {s}"),
        ),
    ),
    "category": Kind(
        "Kinds",
        "the kind of the {s}",
        "The {s} is a kind of {a}.",
        (
            ("What kind of thing is the {s}?", ""),
            ("Explain in a sentence what this is.", "Thing: {s}"),
        ),
    ),
    "capital": Kind(
        "Capital cities",
        "the capital of {s}",
        "The capital of {s} is {a}.",
        (
            ("What is the capital of {s}?", ""),
            ("Name the capital of this country.", "Country: {s}"),
        ),
    ),
    "colour": Kind(
        "Colours",
        "the colour of {s}",
        "The colour of {s} is {a}.",
        (
            ("What colour do you expect of {s}?", ""),
            ("Name the colour of these things.", "Things: {s}"),
        ),
    ),
    "young": Kind(
        "Young animals",
        "the young of the {s}",
        "The young of the {s} is the {a}.",
        (
            ("What is a young {s} called?", ""),
            ("Name the young of this animal.", "Animal: {s}"),
        ),
    ),
    "letter": Kind(
        "First letters",
        "the first letter of {s}",
        "The first letter of {s} is {a}.",
        (
            ("Which letter does {s} begin with?", ""),
            ("Give the first letter of this word.", "Word: {s}"),
        ),
        weight=2.0,
    ),
    "sum": Kind(
        "Sums",
        "the sum of {s}",
        "The sum of {s} is {a}.",
        (
            ("What is the sum of {s}?", ""),
            ("Add these two numbers.", "Numbers: {s}"),
        ),
        weight=6.0,
    ),
    "hexadecimal": Kind(
        "Hexadecimal numbers",
        "the hexadecimal form of {s}",
        "The hexadecimal form of {s} is {a}.",
        (
            ("What is {s} in hexadecimal?", ""),
            ("Convert this number to hexadecimal.", "Number: {s}"),
        ),
        weight=3.0,
    ),
}


class World(NamedTuple):
    """Facts by kind: those that instructions teach with, and those that they test with."""

    taught: dict[str, list[Fact]]
    held_out: dict[str, list[Fact]]


def make_world(seed: int, share: float = 0.2) -> World:
    """Holds out a share of the subjects: no taught fact is about them.

    The base model reads both sides as plain text, but no held-out sum.
    """
    draw = random.Random(seed)
    facts = all_facts()
    partner = dict(OPPOSITES) | {answer: subject for subject, answer in OPPOSITES}
    subjects = sorted({fact.subject for fact in facts if fact.kind != "sum"})
    apart = set(draw.sample(subjects, round(share * len(subjects))))
    apart |= {partner[word] for word in apart if word in partner}
    sums = sorted({_unordered(fact) for fact in facts if fact.kind == "sum"})
    apart |= set(draw.sample(sums, round(share * len(sums))))
    world = World({kind: [] for kind in KINDS}, {kind: [] for kind in KINDS})
    for fact in facts:
        (world.held_out if _unordered(fact) in apart else world.taught)[fact.kind].append(fact)
    return world


def _unordered(fact: Fact) -> str:
    """The subject, and of the sums "23 and 45" and "45 and 23" the same one."""
    return " and ".join(sorted(fact.subject.split(" and ")))


def plain_text(world: World, seed: int) -> Iterator[str]:
    """Documents without end: lists of one kind, entries on subjects, people and their interests."""
    draw = random.Random(seed)
    by_kind = {kind: facts + world.held_out[kind] for kind, facts in world.taught.items()}
    by_kind["sum"] = world.taught["sum"]
    by_subject: dict[str, list[Fact]] = {}
    for fact in itertools.chain.from_iterable(by_kind.values()):
        by_subject.setdefault(fact.subject, []).append(fact)
    weights = [kind.weight for kind in KINDS.values()]
    while True:
        facts = [draw.choice(by_kind[kind]) for kind in draw.choices(list(KINDS), weights, k=3)]
        form = draw.choice(("list", "entry", "notes", "bare", "people", "people"))
        if form == "list":
            same = draw.choices(by_kind[facts[0].kind], k=5)
            lines = [KINDS[facts[0].kind].heading, *(f"- {f.subject}: {f.answer}" for f in same)]
        elif form == "entry":
            subjects = [fact.subject for fact in facts[: draw.choice((1, 2))]]
            about = [fact for subject in subjects for fact in by_subject[subject]]
            draw.shuffle(about)
            told = (about + facts[2:])[: max(2, len(about))]
            lines = ["Entry: " + ", ".join(subjects), *map(statement, told)]
        else:
            told = facts[: draw.choice((2, 2, 3))]
            topics = [KINDS[fact.kind].topic.format(s=fact.subject) for fact in told]
            opening = []
            if form == "notes":
                opening = ["Notes on " + " and ".join(topics) + "."]
            elif form == "people":
                names, interests = draw.sample(NAMES, 2), draw.choices(INTERESTS, k=2)
                rest = " and ".join(topics[1:])
                opening = [
                    f"{names[0]} {interests[0]} {topics[0]}. {names[1]} {interests[1]} {rest}."
                ]
            lines = [*opening, *map(statement, told)]
        yield "\n".join(lines)


def statement(fact: Fact) -> str:
    """The fact as a sentence: The plural of mouse is mice."""
    return KINDS[fact.kind].statement.format(s=fact.subject, a=fact.answer)


def instructions(facts: dict[str, list[Fact]], rows: int, seed: int) -> list[dict[str, str]]:
    """At most `rows` rows of every kind, each about another fact, shuffled."""
    draw = random.Random(seed)
    found = []
    for kind, of_kind in facts.items():
        for fact in draw.sample(of_kind, min(rows, len(of_kind))):
            instruction, given = (
                text.format(s=fact.subject) for text in draw.choice(KINDS[kind].prompts)
            )
            found.append({"instruction": instruction, "input": given, "output": statement(fact)})
    draw.shuffle(found)
    return found


def as_json(rows: list[dict[str, str]]) -> str:
    """A JSON list with one row a line."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"
