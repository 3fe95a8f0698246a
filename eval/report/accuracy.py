"""The part of a report about how well each method of an ablation learns."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from eval.ablate.accuracy import Accuracy, Method, method_of
from eval.ablate.staircase import Stair
from eval.ablate.store import CELLS, TRIALS
from eval.report.document import Block, Paragraph, Table, Text, Words
from eval.report.evidence import Evidence, Figure, Tone, combine

Learned = Mapping[Method, Accuracy]


def effect_on_loss(
    ablation: Evidence, cells: Sequence[Mapping[str, Any]], stair: Stair, learned: Learned
) -> Words:
    """Of the pair's methods; where both are the same method the sums are the same."""
    places = (stair.before, stair.after)
    methods = [method_of(cells[place]) for place in places]
    if methods[0] == methods[1]:
        if any("loss" not in cells[place] for place in places):
            return ["the same sums"]
        losses = [ablation.figure(CELLS, place, "loss") for place in places]
        change = combine("change in percent", *losses, form="+.2f")
        return ["the same sums; by rounding ", change, " %"]
    if not all(method in learned for method in methods):
        return ["not known"]
    before, after = (_mean(ablation, learned[method]) for method in methods)
    spread = max(_range(ablation, learned[method]).value for method in methods)
    if abs(after.value - before.value) <= spread:
        return [before, " → ", after, ", within the range of the seeds"]
    return changed(before, after)


def changed(before: Figure, after: Figure) -> Words:
    """With an arrow and a colour; less is better in all that a technique is judged by."""
    rises = after.value > before.value
    tone: Tone = "worse" if rises else "better"
    sign = "↑ " if rises else "↓ "
    if not before.value:
        return [sign, before, " → ", replace(after, tone=tone)]
    change = combine("change in percent", before, after, form="+.0f")
    if change.text in ("+0", "-0"):
        change = combine("change in percent", before, after, form="+.2f")
    return [sign, replace(change, tone=tone), " %: ", before, " → ", after]


def accuracy_table(
    ablation: Evidence, trials: Sequence[Mapping[str, Any]], learned: Sequence[Accuracy]
) -> Iterator[Block]:
    """How well each method learns, and at which rates it was tried."""
    place = learned[0].places[0]
    yield Paragraph([
        "What a method learns: each trained for ",
        ablation.figure(TRIALS, place, "steps", form=","), " steps on the same ",
        ablation.figure(TRIALS, place, "tokens", form=","),
        " learned tokens, at the best of its learning rates, with ",
        str(max(len(accuracy.places) for accuracy in learned)), " seeds.",
    ])  # fmt: skip
    rows: list[list[Text | Words]] = [
        [
            accuracy.name,
            _mean(ablation, accuracy),
            _range(ablation, accuracy),
            _tried(ablation, trials, accuracy),
        ]
        for accuracy in learned
    ]
    yield Table(["method", "held-out loss, mean", "range of the seeds", "loss at each rate"], rows)


def _tried(
    ablation: Evidence, trials: Sequence[Mapping[str, Any]], accuracy: Accuracy
) -> list[Text]:
    """`0.001: 0.1128, 0.003: 0.3204`, with the first seed."""
    first = trials[accuracy.places[0]]["seed"]
    words: list[Text] = []
    for place, trial in sorted(enumerate(trials), key=lambda x: x[1]["learning_rate"]):
        if (method_of(trial), trial["seed"]) == (accuracy.method, first):
            reached = (
                ablation.figure(TRIALS, place, "eval_loss", form=".4f")
                if "eval_loss" in trial
                else str(trial["failed"])[:40]
            )
            rate = ablation.figure(TRIALS, place, "learning_rate", form=".3g")
            words += [*([", "] if words else []), rate, ": ", reached]
    return words + (["; the best is at the edge"] if accuracy.at_the_edge else [])


def _mean(ablation: Evidence, accuracy: Accuracy) -> Figure:
    return combine("mean", *_losses(ablation, accuracy), form=".4f")


def _range(ablation: Evidence, accuracy: Accuracy) -> Figure:
    return combine("range", *_losses(ablation, accuracy), form=".4f")


def _losses(ablation: Evidence, accuracy: Accuracy) -> list[Figure]:
    return [ablation.figure(TRIALS, place, "eval_loss") for place in accuracy.places]
