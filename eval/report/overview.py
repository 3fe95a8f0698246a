"""The first screen of a report: what was tuned, five figures, the curve and three answers."""

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from eval.report.document import Block, Card, Cards, Paragraph, Picture, Table, Text, Words
from eval.report.evidence import EVERY, Evidence, Figure, Missing, Tone, combine
from eval.report.pictures import losses
from eval.report.scored import refuse_stale, scored_rows
from eval.report.sections import learned, short
from jllama.folders.run import CONFIG, GENERATIONS, METRICS, RECORD, SCORES

ANSWERS = 3  # shown here; all stand further down, whole
CHARACTERS = 120  # of an answer shown here


def overview(run: Evidence, reference: Sequence[Figure]) -> Iterator[Block]:
    """Everything that a reader wants to know first; what is not there yet is said to be missing."""
    yield Paragraph(_sentence(run))
    makers: dict[str, Callable[[Evidence], tuple[Words, Words]]] = {
        "share that learned": _learned,
        "memory at the peak": _memory,
        "training": _time,
        "held-out loss": _held_out,
        "exact answers": _exact,
    }
    yield Cards([_card(label, maker, run) for label, maker in makers.items()])
    with contextlib.suppress(Missing):  # the section of the loss says what is missing
        yield _loss_curve(run, reference)
    if run.has(GENERATIONS) and run.content(GENERATIONS):
        lines = run.content(GENERATIONS)[:ANSWERS]
        models = [who for who in ("base", "tuned") if who in lines[0]]
        rows: list[list[Text]] = [
            [_begin(line[name]) for name in ("prompt", *models)] for line in lines
        ]
        yield Table(["prompt", *models], rows, wide=True)


def _begin(text: str) -> str:
    """In one line, the beginning of a long text."""
    return textwrap.shorten(text, CHARACTERS, placeholder=" …")


def _sentence(run: Evidence) -> Words:
    config = run.content(CONFIG)
    model, data = (short(run.value(CONFIG, name)) for name in ("model", "data"))
    words: list[Text] = []
    if config.get("tune") == "lora":
        words += ["LoRA of rank ", run.figure(CONFIG, "lora_rank", form=","),
                  f" on {config.get('lora_targets')} of "]  # fmt: skip
    else:
        words += ["Full tuning of "]
    words += [
        f"{model}, in {config.get('precision')}, on ",
        run.figure(RECORD, "data", "rows", form=","), f" rows of {data}, for at most ",
        run.figure(CONFIG, "epochs", form=","), f" epochs, on {run.value(RECORD, 'device')}",
    ]  # fmt: skip
    with contextlib.suppress(Missing):
        words += [": ", run.compute("max", (METRICS, EVERY, "step"), form=","), " optimizer steps"]
    return [*words, "."]


def _loss_curve(run: Evidence, reference: Sequence[Figure]) -> Picture:
    """Every step, every epoch's average, held-out loss and the reference's."""
    lines, epochs, held_out = learned(run)
    steps = {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}
    ends = [lines[i]["step"] for i in epochs]
    return Picture(
        "loss",
        losses(
            steps,
            {lines[i]["step"]: lines[i]["epoch_loss"] for i in epochs},
            {step: lines[i]["eval_loss"] for step, i in held_out.items()},
            {s: figure.value for s, figure in zip(ends, reference, strict=False)},
        ),
        f"Loss by optimizer step over {len(epochs)} epochs"
        + (", with held-out rows" if held_out else "")
        + (", beside the reference" if reference else "") + ".",
    )  # fmt: skip


def _card(label: str, maker: Callable[[Evidence], tuple[Words, Words]], run: Evidence) -> Card:
    try:
        return Card(label, *maker(run))
    except Missing as missing:
        return Card(label, ["not known"], [str(missing)])


def _learned(run: Evidence) -> tuple[Words, Words]:
    trainable, total = (
        run.figure(RECORD, "parameters", name, form=",") for name in ("trainable", "total")
    )
    share = combine("percent", trainable, total, form=".3g")
    return [share, " %"], [trainable, " of ", total, " parameters"]


def _memory(run: Evidence) -> tuple[Words, Words]:
    peak = run.compute("max", (METRICS, EVERY, "peak_memory_mib"), form=",.0f")
    device = run.figure(RECORD, "device_memory_mib", form=",.0f")
    of = "of the process, of " if "cpu" in str(run.value(RECORD, "device")).lower() else "of "
    left = combine("difference", device, peak, form=",.0f")
    return [peak, " MiB"], [of, device, " MiB; ", left, " MiB left"]


def _time(run: Evidence) -> tuple[Words, Words]:
    seconds = run.compute("sum", (METRICS, EVERY, "step_seconds"), form=",.0f")
    rate = run.compute("median", (METRICS, EVERY, "tokens_per_second"), form=",.0f")
    return [seconds, " s"], [rate, " learned tokens/s"]


def _held_out(run: Evidence) -> tuple[Words, Words]:
    found = [i for i, line in enumerate(run.content(METRICS)) if "eval_loss" in line]
    if not found:
        raise Missing("no rows were held out; --val-size does")
    figures = [run.figure(METRICS, i, "eval_loss", form=".3f") for i in (found[0], found[-1])]
    if len(found) == 1:
        return figures[:1], ["nats per learned token"]
    return _from_to(*figures), ["nats per learned token, before and after; less is better"]


def _exact(run: Evidence) -> tuple[Words, Words]:
    refuse_stale(run, SCORES)
    rows: Words = ["of the short answers in ", *scored_rows(run)]
    found = [
        combine("hundredfold", run.figure(SCORES, who, "exact", "share"), form=".0f")
        for who in ("base", "tuned")
        if who in run.content(SCORES)
    ]
    if len(found) == 1:
        return [*found, " %"], rows
    return [*_from_to(*found, more_is_better=True), " %"], rows


def _from_to(before: Figure, after: Figure, *, more_is_better: bool = False) -> list[Any]:
    gain = after.value - before.value if more_is_better else before.value - after.value
    tones: dict[bool, Tone] = {True: "better", False: "worse"}
    return [before, " → ", replace(after, tone=tones[gain > 0] if gain else "")]
