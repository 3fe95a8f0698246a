"""The section of a report about the techniques: what each adds to those before, and all cells."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.ablate.accuracy import accuracies
from eval.ablate.analysis import analyse, with_classes
from eval.ablate.cells import STORED, name_of, names_bases
from eval.ablate.figures import CLASSES, CLASSES_OF_LORA, PEAKS, WORDS
from eval.ablate.staircase import Stair, staircase
from eval.ablate.store import CELLS, DESCRIPTION, TRIALS
from eval.ablate.table import COLUMNS, FINDING
from eval.report.accuracy import Learned, accuracy_table, changed, effect_on_loss
from eval.report.document import Block, Fold, Heading, Paragraph, Picture, Table, Text, Words
from eval.report.evidence import Evidence, Figure, Missing, combine
from eval.report.pictures import memory_bars
from jllama.cli.terminal import command_line

AXES = ("precision", "tune", "remat", "accumulation", "micro_batch_size")
SUMS = CLASSES | CLASSES_OF_LORA
# What a technique is judged by, in this order, as far as the cells have it.
EFFECTS = {
    "peak_mib": "memory at the peak",
    "planned_memory_mib": "memory of the step",
    "weights_mib": "weights",
    "accumulator_mib": "accumulated gradients",
    "optimizer_state_mib": "optimizer state",
    "working_mib": "activations and temporaries",
    "flops_per_token": "operations per token",
    "step_seconds": "time of a step",
}


def techniques(folders: Sequence[str], shown_from: Path) -> Iterator[Block]:
    """Each ablation in turn."""
    if not folders:
        raise Missing(
            f"no ablation was given; make one with: {command_line('ablate')}, and name its "
            "folder with --ablation"
        )
    for number, folder in enumerate(folders):
        yield from _ablation(Evidence(Path(folder), shown_from), f"ablation{number}")


def _ablation(ablation: Evidence, name: str) -> Iterator[Block]:
    kind = str(ablation.value(DESCRIPTION, "kind"))
    settings = ablation.value(DESCRIPTION, "settings")
    cells = ablation.content(CELLS)
    model, device = Path(str(settings["model"])).name, str(ablation.value(DESCRIPTION, "device"))
    where = f"Measured on {device}" if kind == "measured" else f"Planned, {device}"
    yield Heading(f"{model}, {kind}")
    words: list[Text] = [
        where.replace("none: ", ""), ", ",
        ablation.figure(DESCRIPTION, "settings", "sequences", form=","),
        " sequences of ", ablation.figure(DESCRIPTION, "settings", "max_seq_len", form=","),
        " tokens in a step",
    ]  # fmt: skip
    if kind == "measured":
        words += [", runs of each setting: ", ablation.figure(DESCRIPTION, "settings", "repeats")]
    yield Paragraph([*words, ". Each technique is added to those above it."])
    stairs = staircase(cells)
    trials = ablation.content(TRIALS) if ablation.has(TRIALS) else []
    learned = {accuracy.method: accuracy for accuracy in accuracies(trials)}
    if stairs:
        yield _effects(ablation, cells, stairs, learned)
        yield from _pictures(cells, _bars_of(cells, stairs), f"{name}-stairs",
                             "from no technique to all")  # fmt: skip
    if learned:
        yield from accuracy_table(ablation, trials, list(learned.values()))
    yield Fold(f"All {len(cells)} settings of {model}, {kind}", [
        _all_cells(ablation, cells, kind),
        *_pictures(cells, {name_of(cell): cell for cell in cells}, name,
                   f"in {len(cells)} settings"),
    ])  # fmt: skip
    findings = analyse(cells)
    tables: list[Block] = []
    for technique in dict.fromkeys(finding.technique for finding in findings):
        rows: list[list[Text | Words]] = [
            [
                WORDS[finding.figure].title,
                [
                    _found(ablation, finding.before, finding.figure),
                    " → ",
                    _found(ablation, finding.after, finding.figure),
                ],
                *finding.words,
            ]
            for finding in findings
            if finding.technique == technique
        ]
        tables += [Heading(technique), Table(FINDING, rows)]
    yield Fold(f"Every technique over all pairs of settings of {model}, {kind}", tables)


def _effects(
    ablation: Evidence,
    cells: Sequence[Mapping[str, Any]],
    stairs: Sequence[Stair],
    learned: Learned,
) -> Table:
    """A row for each technique: what each figure was before it and after, and the change."""
    known = with_classes(cells[stairs[0].before])
    figures = [figure for figure in EFFECTS if figure in known]
    rows: list[list[Text | Words]] = [
        [
            stair.technique + (f": {stair.words}" if stair.words != stair.technique else ""),
            *(_effect(ablation, cells, stair, figure) for figure in figures),
            *([effect_on_loss(ablation, cells, stair, learned)] if learned else []),
        ]
        for stair in stairs
    ]
    titles = [f"{EFFECTS[figure]}, {WORDS[figure].unit}" for figure in figures]
    titles += ["held-out loss at its own best rate, nats/token"] if learned else []
    return Table(["technique", *titles], rows)


def _effect(
    ablation: Evidence, cells: Sequence[Mapping[str, Any]], stair: Stair, figure: str
) -> Words:
    """`↓ -50 %: 25,705 → 12,853`; the number alone where nothing changed."""
    places = (stair.before, stair.after)
    if any(with_classes(cells[place]).get(figure) is None for place in places):
        return ["not known"]
    before, after = (_found(ablation, place, figure) for place in places)
    if before.text == after.text:
        return [after]
    return changed(before, after)


def _all_cells(ablation: Evidence, cells: Sequence[Mapping[str, Any]], kind: str) -> Table:
    bases = ["base"] if names_bases(cells) else []
    figures = [figure for figure in COLUMNS[kind].values() if any(figure in cell for cell in cells)]
    rows = [
        [
            *(str(cell.get(axis, STORED)) for axis in (*AXES, *bases)),
            *(_cell(ablation, i, figure) for figure in figures),
        ]
        for i, cell in enumerate(cells)
    ]
    named = ["precision", "tune", "remat", "accumulation", "micro-batch", *bases]
    return Table([*named, *(WORDS[figure].title for figure in figures)], rows)


def _cell(ablation: Evidence, line: int, figure: str) -> Text:
    cell = ablation.content(CELLS)[line]
    if cell.get(figure) is not None:
        return _written(ablation.figure(CELLS, line, figure), figure)
    return str(cell.get("failed", ""))[:80]


def _written(found: Figure, figure: str) -> Figure:
    return Figure(found.value, WORDS[figure].write(found.value), found.source)


def _found(ablation: Evidence, line: int, figure: str) -> Figure:
    if figure not in SUMS:
        return _written(ablation.figure(CELLS, line, figure), figure)
    stored = ablation.value(CELLS, line, "classes_mib")
    parts = [
        ablation.figure(CELLS, line, "classes_mib", name) for name in SUMS[figure] if name in stored
    ]
    return _written(combine("total", *parts), figure)


def _bars_of(
    cells: Sequence[Mapping[str, Any]], stairs: Sequence[Stair]
) -> dict[str, Mapping[str, Any]]:
    first = cells[stairs[0].before]
    words = {"lora": "LoRA", "full": "full tuning"}
    bars = {f"{first['precision']}, {words[str(first['tune'])]}": first}
    return bars | {f"+ {stair.words}": cells[stair.after] for stair in stairs}


def _pictures(
    cells: Sequence[Mapping[str, Any]],
    shown: Mapping[str, Mapping[str, Any]],
    name: str,
    what: str,
) -> Iterator[Picture]:
    """Planned memory of some cells, by class where the classes are known; none if it is not."""
    bars: dict[str, Mapping[str, float]] = {}
    for title, cell in shown.items():
        peak = next((cell[peak] for peak in PEAKS if peak in cell), None)
        if peak is not None:
            bars[title] = cell.get("classes_mib") or {"one step": peak}
    if not bars:
        return
    usable = [cell["peak_mib"] + cell["free_mib"] for cell in cells if "free_mib" in cell]
    least, most = (pick(bars, key=lambda k: sum(bars[k].values())) for pick in (min, max))
    yield Picture(
        name,
        memory_bars(bars, usable[0] if usable else None, name),
        f"Planned memory of one step, {what}: the least is {least}, the most {most}.",
    )
