"""The section of a report about the four techniques: an ablation's cells, pictures and words."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.ablate.analysis import PEAKS, Finding, analyse
from eval.ablate.cells import STORED, name_of, names_bases
from eval.ablate.figures import CLASSES, CLASSES_OF_LORA, WORDS
from eval.ablate.store import CELLS, DESCRIPTION
from eval.ablate.table import COLUMNS
from eval.report.document import Block, Heading, Paragraph, Picture, Table, Text
from eval.report.evidence import Evidence, Figure, Missing, combine
from eval.report.pictures import memory_bars
from jllama.cli.terminal import command_line

AXES = ("precision", "tune", "remat", "accumulation", "micro_batch_size")
SUMS = CLASSES | CLASSES_OF_LORA


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
    bases = ["base"] if names_bases(cells) else []
    model, device = Path(str(settings["model"])).name, str(ablation.value(DESCRIPTION, "device"))
    where = f"Measured on {device}" if kind == "measured" else f"Planned, {device}"
    yield Heading(f"{model}, {kind}")
    yield Paragraph([
        where.replace("none: ", ""), ", ",
        ablation.figure(DESCRIPTION, "settings", "sequences", form=","),
        " sequences of ", ablation.figure(DESCRIPTION, "settings", "max_seq_len", form=","),
        " tokens in a step, so that all cells learn the same. precision is that of weights "
        "and activations; tune what learns; remat what the backward pass computes again; "
        "accumulation the micro-batches of a step, micro-batch their sequences",
        "; base the format of the frozen linears." if bases else ".",
    ])  # fmt: skip
    figures = [figure for figure in COLUMNS[kind].values() if any(figure in cell for cell in cells)]
    titles = [_title(figure) for figure in figures]
    rows = [
        [
            *(str(cell.get(axis, STORED)) for axis in (*AXES, *bases)),
            *(_cell(ablation, i, figure) for figure in figures),
        ]
        for i, cell in enumerate(cells)
    ]
    named = ["precision", "tune", "remat", "accumulation", "micro-batch", *bases]
    yield Table([*named, *titles], rows)
    if picture := _picture(ablation, cells, kind, name):
        yield picture
    yield Heading(f"What follows for {model}")
    findings = analyse(cells)
    for technique in dict.fromkeys(finding.technique for finding in findings):
        yield Table(
            [technique, "median pair, before", "after"],
            [
                [finding.text, *_ends(ablation, cells, finding)]
                for finding in findings
                if finding.technique == technique
            ],
        )


def _title(figure: str) -> str:
    words = WORDS[figure]
    return f"{words.name}, {words.unit}" if words.unit else words.name


def _cell(ablation: Evidence, line: int, figure: str) -> Text:
    cell = ablation.content(CELLS)[line]
    if cell.get(figure) is not None:
        return _written(ablation.figure(CELLS, line, figure), figure)
    return str(cell.get("failed", ""))[:80]


def _written(found: Figure, figure: str) -> Figure:
    return Figure(found.value, WORDS[figure].write(found.value), found.source)


def _ends(
    ablation: Evidence, cells: Sequence[Mapping[str, Any]], finding: Finding
) -> tuple[Text, Text]:
    """The two numbers of a finding, where they stand; empty where it only counts cells."""
    if len(finding.cells) < 2:
        return "", ""
    names = [name_of(cell) for cell in cells]  # type: ignore[arg-type]
    before, after = (_found(ablation, names.index(name), finding.figure) for name in finding.cells)
    return before, after


def _found(ablation: Evidence, line: int, figure: str) -> Figure:
    if figure not in SUMS:
        return _written(ablation.figure(CELLS, line, figure), figure)
    stored = ablation.value(CELLS, line, "classes_mib")
    parts = [
        ablation.figure(CELLS, line, "classes_mib", name) for name in SUMS[figure] if name in stored
    ]
    return _written(combine("total", *parts), figure)


def _picture(
    ablation: Evidence, cells: Sequence[Mapping[str, Any]], kind: str, name: str
) -> Picture | None:
    """Planned memory of each cell, by class where the classes are known."""
    bars: dict[str, Mapping[str, float]] = {}
    for cell in cells:
        peak = next((cell[peak] for peak in PEAKS if peak in cell), None)
        if peak is not None:
            classes = cell.get("classes_mib") or {"one step": peak}
            bars[name_of(cell)] = classes  # type: ignore[arg-type]
    if not bars:
        return None
    usable = [cell["peak_mib"] + cell["free_mib"] for cell in cells if "free_mib" in cell]
    limit = usable[0] if usable else None
    least, most = (pick(bars, key=lambda k: sum(bars[k].values())) for pick in (min, max))
    return Picture(
        name,
        memory_bars(bars, limit, name),
        f"Planned memory of one step in {len(bars)} cells: the least is {least}, the most {most}.",
    )
