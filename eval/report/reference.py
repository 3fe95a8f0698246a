"""An earlier report that a run is held against: its figures, its losses and its answers.

    {"average_loss_per_epoch": [1.32, 1.01], "total_parameters": 6747639808,
     "trainable_parameters": 8388608, "gpu_memory_mib": {"used": 40402, "total": 40960},
     "settings": {"lora_rank": 16}, "about": "LLaMA-7B on ...", "notes": ["Its loss was ..."]}

All but the losses may be left out; settings have the names of config.yaml.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from eval.prompt_file import read_references
from eval.report.document import Block, Paragraph, Table, Text
from eval.report.evidence import EVERY, Evidence, Figure, Missing, combine
from eval.report.sections import setting
from jllama.errors import InputError
from jllama.folders.run import CONFIG, METRICS, RECORD
from jllama.text.row_file import read_rows

ORIGINAL = "original"  # the course report that this project re-implements
ORIGINAL_FILE = Path(__file__).parents[1] / "report_figures.json"
SERIES = "average_loss_per_epoch"


@dataclass(frozen=True)
class Reference:
    """What an earlier report says: its figures, losses by epoch, and answers by prompt."""

    figures: Evidence | None = None
    file: str = ""
    losses: Sequence[Figure] = ()
    answers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def read_reference(files: Sequence[str], shown_from: Path) -> Reference:
    """Figures and answers of earlier reports.

    Raises:
        InputError: if a file is neither.
    """
    found, answers = Reference(), dict[str, Mapping[str, str]]()
    for name in files:
        path = ORIGINAL_FILE if name == ORIGINAL else Path(name)
        if "prompt" in read_rows(path)[0]:
            answers |= read_references(name)
            continue
        figures = Evidence(path.parent, shown_from)
        try:
            values = figures.value(path.name, SERIES)
            if not isinstance(values, list):
                raise Missing("")
            losses = [figures.figure(path.name, SERIES, i, form=".4f") for i in range(len(values))]
        except Missing:
            raise InputError(
                f"{path}: neither a list of recorded answers nor an object with {SERIES}"
            ) from None
        found = Reference(figures, path.name, losses)
    return replace(found, answers=answers)


def beside(run: Evidence, reference: Reference) -> Iterator[Block]:
    """Both runs' parameters, memory, losses and settings, and what else differed."""
    figures, file = reference.figures, reference.file
    if figures is None:
        raise Missing("no reference with figures was given")
    known = figures.content(file)
    if "about" in known:
        yield Paragraph([str(known["about"])])
    rows: list[Sequence[Text]] = []
    for what in ("trainable", "total"):
        if f"{what}_parameters" in known:
            rows.append([
                f"parameters, {what}", figures.figure(file, f"{what}_parameters", form=","),
                run.figure(RECORD, "parameters", what, form=","),
            ])  # fmt: skip
    if "gpu_memory_mib" in known:
        peak = run.compute("max", (METRICS, EVERY, "peak_memory_mib"), form=",.0f")
        device = run.figure(RECORD, "device_memory_mib", form=",.0f")
        used, card = (
            figures.figure(file, "gpu_memory_mib", x, form=",") for x in ("used", "total")
        )
        rows += [
            ["memory at the peak, MiB", used, peak],
            ["memory of the device, MiB", card, device],
            ["of it used, percent", *(combine("percent", *pair, form=".1f")
                                      for pair in ((used, card), (peak, device)))],
        ]  # fmt: skip
    ends = [i for i, line in enumerate(run.content(METRICS)) if "epoch_loss" in line]
    for number, loss in enumerate(reference.losses):
        ours = (
            run.figure(METRICS, ends[number], "epoch_loss", form=".4f")
            if number < len(ends)
            else ""
        )
        rows.append([f"training loss of epoch {number + 1}", loss, ours])
    yield Table(["", "reference", "this run"], rows)
    settings: list[Sequence[Text]] = [
        [name, setting(figures, file, "settings", name), setting(run, CONFIG, name)]
        for name, value in known.get("settings", {}).items()
        if run.content(CONFIG).get(name) != value
    ]
    if settings:
        yield Table(["setting that differs", "reference", "this run"], settings)
    elif "settings" in known:
        yield Paragraph(["All settings that the reference tells are the same here."])
    for note in known.get("notes", []):
        yield Paragraph([str(note)])
