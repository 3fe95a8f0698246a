"""What follows from an ablation's cells, in words that each carry their figures.

A technique is judged by the pairs of cells that differ in it alone. What a sentence quotes is the
median pair, the one whose relative change is in the middle of all (the lower of two), so both
numbers stand in cells.jsonl. Of measured figures a change counts only where it passes the spread of
the repeats: the range of a cell's repeats, the larger of the pair's two, relative, and the median
of that over the pairs.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eval.ablate.cells import STORED, Figures, name_of
from eval.ablate.figures import CLASSES, CLASSES_OF_LORA, FIGURES

Direction = Literal["fell", "rose", "equal", "mixed", "within spread"]
MIXED = 1 / 3  # share of pairs that go the other way, from which on no direction is named


@dataclass(frozen=True)
class Finding:
    """One sentence, and where it comes from.

    Attributes:
        technique: what is compared, in words; the heading of its sentences.
        figure: as in cells.jsonl; classes of memory as `eval.figures` adds them.
        before: the median pair's cell without the technique, in the figure's own unit.
        after: with it.
        pairs: how many were compared.
        change: relative change of the median pair.
        spread: of the repeats, relative; None where nothing was repeated.
        cells: names of the median pair's cells.
    """

    technique: str
    figure: str
    text: str
    before: float
    after: float
    pairs: int
    direction: Direction
    change: float
    spread: float | None = None
    cells: tuple[str, ...] = ()


PEAKS = ("peak_mib", "planned_memory_mib")  # of planned cells, of measured ones
ORDERS = {
    "tune": ("full", "lora"),
    "precision": ("fp32", "bf16"),
    "remat": ("none", "dots", "offload", "ffn", "block"),
    "base": ("stored", "int8", "nf4", "int4"),
}
AXES = (*ORDERS, "accumulation")

Pair = tuple[Figures, Figures]


def analyse(cells: Sequence[Figures]) -> list[Finding]:
    """All findings, technique by technique."""
    cells = [with_classes({"base": STORED} | cell) for cell in cells]
    plain = [cell for cell in cells if not cell["reference"]]
    found: list[Finding] = []
    for axis in AXES:
        values = sorted({cell[axis] for cell in plain}, key=lambda x: _place(axis, x))
        for value in values[1:]:
            pairs = pairs_of(plain, axis, values[0], value)
            if pairs:
                found += compare(title(axis, *pairs[0]), pairs)
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
        return f"an {after[axis]} base instead of {_base(before)}"
    of = " remat" if axis == "remat" else ""
    return f"{after[axis]}{of} instead of {before[axis]}"


def _base(cell: Figures) -> str:
    return "weights as stored" if cell["base"] == STORED else f"an {cell['base']} one"


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


def pairs_of(cells: Sequence[Figures], axis: str, before: Any, after: Any) -> list[Pair]:
    """Pairs that differ in this axis alone (and in the micro-batch, where it is accumulation)."""
    others = [name for name in AXES if name != axis]
    firsts = {tuple(c[name] for name in others): c for c in cells if c[axis] == before}
    return [
        (firsts[key], cell)
        for cell in cells
        if cell[axis] == after and (key := tuple(cell[name] for name in others)) in firsts
    ]


def compare(technique: str, pairs: Sequence[Pair]) -> list[Finding]:
    """One finding for each figure that both cells of some pairs have."""
    found = [_ran_out(technique, pairs), _fits(technique, pairs)]
    for figure in FIGURES:
        known = [pair for pair in pairs if all(cell.get(figure) is not None for cell in pair)]
        if known:
            found.append(_compared(technique, figure, known))
    return [
        finding
        for finding in found
        if finding
        # What a technique does not touch is said of results only, not of what it is made of.
        and not (
            finding.direction == "equal"
            and finding.figure in (*CLASSES, *CLASSES_OF_LORA, "trainable_parameters")
        )
    ]


def _compared(technique: str, figure: str, pairs: Sequence[Pair]) -> Finding:
    words = FIGURES[figure]
    ordered = sorted(pairs, key=lambda pair: _change(figure, pair))
    middle = ordered[(len(ordered) - 1) // 2]
    before, after = (cell[figure] for cell in middle)
    changes = [_change(figure, pair) for pair in ordered]
    change = _change(figure, middle)
    spreads = [spread for pair in pairs if (spread := _spread(figure, pair)) is not None]
    spread = statistics.median(spreads) if spreads else None
    unit = f" {words.unit}" if words.unit else ""
    quoted = f"{words.write(before)} -> {words.write(after)}{unit}"
    among = f"median of {len(pairs)} pairs" if len(pairs) > 1 else "one pair"
    way: Direction = "fell" if change < 0 else "rose"
    others = sum((x > 0) if change < 0 else (x < 0) for x in changes)
    over = f"{_range(changes)}" if len(pairs) > 1 else ""
    direction: Direction
    if not any(changes):
        direction, text = "equal", f"{words.name}: the same in all {len(pairs)} pairs"
    elif spread and abs(change) <= spread:
        direction = "within spread"
        text = (
            f"{words.name}: no difference beyond the spread of the repeats ({_percent(spread)}): "
            f"{quoted}, {among}{over}"
        )
    elif others >= MIXED * len(pairs):
        direction = "mixed"
        text = f"{words.name} {_ways(changes)} of {len(pairs)} pairs{over}: {quoted}, {among}"
    elif words.write(before) == words.write(after):
        direction = "equal"
        text = f"{words.name}: no difference in the digits shown: {quoted}, {among}{over}"
    else:
        direction = way
        by = f" by {_percent(abs(change))}" if math.isfinite(change) else ""
        text = f"{words.name} {way}{by}: {quoted}, {among}{over}"
        if spread is None and _once(figure, middle):
            text += "; one run of each, so the spread is unknown"
    names = tuple(name_of(cell) for cell in middle)
    return Finding(
        technique, figure, text, before, after, len(pairs), direction, change, spread, names
    )


def _ways(changes: Sequence[float]) -> str:
    fell, rose = sum(x < 0 for x in changes), sum(x > 0 for x in changes)
    return f"fell in {fell} and rose in {rose}"


def _range(changes: Sequence[float]) -> str:
    """The least and the greatest change: " (-4 to +12 %)"."""
    least, greatest = (
        f"{100 * x:+,.0f}" if abs(x) >= 0.1 else f"{100 * x:+.2g}"
        for x in (min(changes), max(changes))
    )
    return f" ({least} to {greatest} %)"


def _change(figure: str, pair: Pair) -> float:
    before, after = (cell[figure] for cell in pair)
    if before == after:
        return 0.0
    return (after - before) / abs(before) if before else math.copysign(math.inf, after)


def _spread(figure: str, pair: Pair) -> float | None:
    """The larger range of the pair's repeats, as a share of the first cell's figure."""
    ranges = []
    for cell in pair:
        values = cell.get("repeats", {}).get(figure, ())
        if len(values) < 2:
            return None
        ranges.append(max(values) - min(values))
    return max(ranges) / abs(pair[0][figure])


def _once(figure: str, pair: Pair) -> bool:
    return any(len(cell.get("repeats", {}).get(figure, ())) == 1 for cell in pair)


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _ran_out(technique: str, pairs: Sequence[Pair]) -> Finding | None:
    counts = [sum("failed" in pair[side] for pair in pairs) for side in (0, 1)]
    return _counted(technique, "failed", "cells that ran out of memory", counts, len(pairs))


def _fits(technique: str, pairs: Sequence[Pair]) -> Finding | None:
    pairs = [pair for pair in pairs if all("free_mib" in cell for cell in pair)]
    counts = [sum(pair[side]["free_mib"] >= 0 for pair in pairs) for side in (0, 1)]
    return _counted(technique, "fits", "cells that fit the card", counts, len(pairs))


def _counted(
    technique: str, figure: str, name: str, counts: Sequence[int], pairs: int
) -> Finding | None:
    before, after = counts
    if not before and not after:
        return None
    direction: Direction = "rose" if after > before else "fell" if after < before else "equal"
    text = f"{name}: {before} of {pairs} -> {after} of {pairs}"
    change = (after - before) / before if before else math.inf
    return Finding(technique, figure, text, before, after, pairs, direction, change)


def accumulation_itself(cells: Sequence[Figures]) -> list[Finding]:
    """What accumulating adds to one micro-batch of the same size."""
    found = []
    for small in (cell for cell in cells if cell["reference"]):
        same = [
            cell
            for cell in cells
            if cell["accumulation"] > 1
            and all(cell[x] == small[x] for x in (*ORDERS, "micro_batch_size"))
        ]
        for cell in same:
            name = f"{_batches(cell)} instead of a single one ({_where(cell)})"
            for figure in (*PEAKS, "step_seconds"):
                if figure in cell and figure in small:
                    found.append(_accumulated(name, figure, (small, cell)))
    return found


def _where(cell: Mapping[str, Any]) -> str:
    return f"{cell['precision']} {cell['tune']}, {cell['remat']} remat"


def _accumulated(technique: str, figure: str, pair: Pair) -> Finding:
    words = FIGURES[figure]
    before, after = (cell[figure] for cell in pair)
    change = _change(figure, pair)
    if figure == "step_seconds":
        text = f"a step takes {after / before:.1f} times as long"
    elif abs(change) < 0.01:
        text = f"{words.name} is the same to 1 %, so accumulating itself saves none"
    else:
        more = "more" if change > 0 else "less"
        text = f"{words.name} is {_percent(abs(change))} {more}"
    text += f": {words.write(before)} -> {words.write(after)} {words.unit}"
    direction: Direction = "rose" if change > 0 else "fell" if change < 0 else "equal"
    names = tuple(name_of(cell) for cell in pair)
    return Finding(
        technique, figure, text, before, after, 1, direction, change, _spread(figure, pair), names
    )


def memory_disorder(cells: Sequence[Figures]) -> list[str]:
    """Where planned memory is not fp32 full > fp32 LoRA > bf16 LoRA, or none > ffn > block."""
    steps = [
        ({"tune": "full", "precision": "fp32"}, {"tune": "lora", "precision": "fp32"}),
        ({"tune": "lora", "precision": "fp32"}, {"tune": "lora", "precision": "bf16"}),
        ({"remat": "none"}, {"remat": "ffn"}),
        ({"remat": "ffn"}, {"remat": "block"}),
    ]
    named: list[Figures] = [{"base": STORED} | cell for cell in cells]
    known = {
        tuple(cell[name] for name in AXES): (cell, cell[figure])
        for cell in named
        if not cell["reference"]
        for figure in PEAKS
        if figure in cell
    }
    wrong = []
    for more, less in steps:
        for cell, size in known.values():
            if more.items() <= cell.items():
                other = known.get(tuple((cell | less)[name] for name in AXES))
                # The peak of full tuning can be that of the update, which has no activations.
                ties = "remat" in less and cell["tune"] == "full"
                if other and (other[1] > 1.001 * size if ties else other[1] >= size):
                    wrong.append(
                        f"{name_of(other[0])} takes {other[1]:,.1f} MiB, not less "
                        f"than {name_of(cell)} with {size:,.1f}"
                    )
    return wrong
