"""The way from the dearest cell of an ablation to the cheapest, one technique at a time."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eval.ablate.analysis import AXES, ORDERS
from eval.ablate.cells import STORED

TECHNIQUES: Mapping[str, str] = {
    "precision": "low precision",
    "accumulation": "gradient accumulation",
    "remat": "gradient checkpointing",
    "tune": "LoRA",
    "base": "a base in codes",
}


class Stair(NamedTuple):
    """Two cells, by their places among all, that differ in one technique alone."""

    technique: str
    words: str  # `bf16`, `8 micro-batches of 1`
    before: int
    after: int


def staircase(cells: Sequence[Mapping[str, Any]]) -> list[Stair]:
    """From the first value of every axis to its last; an axis of one value is no stair."""
    places = {
        tuple(cell.get(axis, STORED) for axis in AXES): place
        for place, cell in enumerate(cells)
        if not cell["reference"]
    }
    values = {axis: sorted({key[i] for key in places}, key=_order(axis)) for i, axis in
              enumerate(AXES)}  # fmt: skip
    now = {axis: found[0] for axis, found in values.items() if found}
    stairs = []
    for axis, technique in TECHNIQUES.items():
        new = now | {axis: values[axis][-1]} if now else now
        before, after = (places.get(tuple(cell.values())) for cell in (now, new))
        if new != now and before is not None and after is not None:
            stairs.append(Stair(technique, _words(axis, cells[after]), before, after))
            now = new
    return stairs


def _order(axis: str) -> Any:
    return ORDERS[axis].index if axis in ORDERS else None


def _words(axis: str, cell: Mapping[str, Any]) -> str:
    if axis == "accumulation":
        return f"{cell[axis]} micro-batches of {cell['micro_batch_size']}"
    if axis == "tune":
        return "LoRA"
    return f"{cell[axis]} remat" if axis == "remat" else str(cell[axis])
