"""What follows from an ablation's cells: a technique is judged by pairs that differ in it alone.

The pair that is shown is the median one, whose relative change is in the middle of all (the lower
of two), so both of its numbers stand in cells.jsonl. The spread is that of the repeats: the range
of a cell's repeats, the larger of the pair's two, relative to the first cell's figure, and the
median of that over the pairs. A change that does not pass it says nothing.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eval.ablate.cells import STORED, Figures
from eval.ablate.figures import CLASSES, CLASSES_OF_LORA, FIGURES, PEAKS

ORDERS = {
    "tune": ("full", "lora"),
    "precision": ("fp32", "bf16"),
    "remat": ("none", "dots", "offload", "ffn", "block"),
    "base": ("stored", "int8", "nf4", "int4"),
}
AXES = (*ORDERS, "accumulation")

Pair = tuple[int, int]  # places of two cells: without the technique, with it


class Finding(NamedTuple):
    """What a technique does to one figure.

    Attributes:
        technique: what is compared, in words.
        figure: as in cells.jsonl; classes of memory as `eval.ablate.figures` adds them.
        before, after: places of the median pair's cells.
        pairs: how many were compared.
        change: relative change of the median pair; infinite from zero.
        least, most: the least and the greatest change of all pairs.
        spread: of the repeats, relative; None where nothing was repeated.
    """

    technique: str
    figure: str
    before: int
    after: int
    pairs: int
    change: float
    least: float
    most: float
    spread: float | None = None

    @property
    def words(self) -> tuple[str, str]:
        """The change, in parentheses where it does not pass the spread, and its range.

        ("-50 %", "-75 to -40 %")
        """
        change = f"{percent(self.change)} %"
        if self.spread is not None and abs(self.change) <= self.spread:
            change = f"({change})"
        return change, f"{percent(self.least)} to {percent(self.most)} %" if self.pairs > 1 else ""


def percent(change: float) -> str:
    return f"{100 * change:+,.{0 if abs(change) >= 0.1 else 1}f}"


def analyse(cells: Sequence[Figures]) -> list[Finding]:
    """All findings, technique by technique; none where no pair changed."""
    cells = [with_classes({"base": STORED} | cell) for cell in cells]
    plain = [place for place, cell in enumerate(cells) if not cell["reference"]]
    found: list[Finding] = []
    for axis in AXES:
        values = sorted({cells[place][axis] for place in plain}, key=lambda x: _place(axis, x))
        for value in values[1:]:
            pairs = pairs_of(cells, plain, axis, values[0], value)
            if pairs:
                before, after = (cells[place] for place in pairs[0])
                found += compare(cells, title(axis, before, after), pairs, list(FIGURES))
    return found + accumulation_itself(cells)


def _place(axis: str, value: Any) -> int:
    return ORDERS[axis].index(value) if axis in ORDERS else value


def title(axis: str, before: Figures, after: Figures) -> str:
    """What the two cells of a pair differ in."""
    if axis == "tune":
        return "LoRA instead of full tuning"
    if axis == "accumulation":
        return f"{_batches(after)} instead of {_batches(before)}"
    if axis == "base":
        stored = before[axis] == STORED
        return f"an {after[axis]} base instead of " + (
            "weights as stored" if stored else f"an {before[axis]} one"
        )
    of = " remat" if axis == "remat" else ""
    return f"{after[axis]}{of} instead of {before[axis]}"


def _batches(cell: Figures) -> str:
    count = cell["accumulation"]
    return f"{count} micro-batch{'es' if count > 1 else ''} of {cell['micro_batch_size']}"


def with_classes(cell: Mapping[str, Any]) -> Figures:
    """The cell with its memory by class as figures of their own."""
    classes = cell.get("classes_mib")
    if classes is None:
        return dict(cell)
    sums = CLASSES | (CLASSES_OF_LORA if cell["tune"] == "lora" else {})
    return {**cell} | {
        figure: sum(classes.get(name, 0.0) for name in names) for figure, names in sums.items()
    }


def pairs_of(
    cells: Sequence[Figures], among: Sequence[int], axis: str, before: Any, after: Any
) -> list[Pair]:
    """Pairs that differ in this axis alone (and in the micro-batch, where it is accumulation)."""
    others = {i: tuple(cells[i][name] for name in AXES if name != axis) for i in among}
    firsts = {others[i]: i for i in among if cells[i][axis] == before}
    return [
        (firsts[others[i]], i) for i in among if cells[i][axis] == after and others[i] in firsts
    ]


def compare(
    cells: Sequence[Figures], technique: str, pairs: Sequence[Pair], figures: Sequence[str]
) -> list[Finding]:
    """One finding for each figure that both cells of some pairs have, and that changes in one."""
    found = []
    for figure in figures:
        known = [
            (_change(cells, figure, pair), pair)
            for pair in pairs
            if all(cells[place].get(figure) is not None for place in pair)
        ]
        if not any(change for change, _ in known):
            continue
        known.sort()
        change, median = known[(len(known) - 1) // 2]
        spreads = [x for _, pair in known if (x := _spread(cells, figure, pair)) is not None]
        spread = statistics.median(spreads) if spreads else None
        found.append(
            Finding(technique, figure, *median, len(known), change, known[0][0], known[-1][0],
                    spread)
        )  # fmt: skip
    return found


def _change(cells: Sequence[Figures], figure: str, pair: Pair) -> float:
    before, after = (cells[place][figure] for place in pair)
    if before == after:
        return 0.0
    return (after - before) / abs(before) if before else math.copysign(math.inf, after)


def _spread(cells: Sequence[Figures], figure: str, pair: Pair) -> float | None:
    """The larger range of the pair's repeats, as a share of the first cell's figure."""
    ranges = []
    for place in pair:
        values = cells[place].get("repeats", {}).get(figure, ())
        if len(values) < 2:
            return None
        ranges.append(max(values) - min(values))
    return max(ranges) / abs(cells[pair[0]][figure])


def accumulation_itself(cells: Sequence[Figures]) -> list[Finding]:
    """What accumulating adds to one micro-batch of the same size."""
    found = []
    for small, reference in enumerate(cells):
        if not reference["reference"]:
            continue
        for place, cell in enumerate(cells):
            same = all(cell[x] == reference[x] for x in (*ORDERS, "micro_batch_size"))
            if same and cell["accumulation"] > 1:
                name = f"{_batches(cell)} instead of a single one, {reference['tune']}"
                found += compare(cells, name, [(small, place)], [*PEAKS, "step_seconds"])
    return found
