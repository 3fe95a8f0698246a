"""`python -m eval.report`: a run's whole report, from its files alone: report.html and report.md.

    python -m eval.report --run runs/latest --ablation runs/ablation --reference DIR

Scores and answers that the run folder does not have yet are made first, by `eval.score` and
`eval.prompts`. Every number names the file and the place that it was read from; what is not there
is said to be missing.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from eval.report import sections
from eval.report.document import Block, Section, write_report
from eval.report.evidence import Evidence, Missing
from eval.report.overview import overview
from eval.report.reference import beside, read_reference
from eval.report.scored import scores, tasks
from eval.report.sections import lacking
from eval.report.techniques import techniques
from jllama.cli.children import Children
from jllama.cli.command import run_command
from jllama.cli.terminal import command_line, console
from jllama.errors import InputError, checked
from jllama.folders.manifest import file_sha256
from jllama.folders.run import CONFIG, GENERATIONS, HARNESS, LATEST, METRICS, RECORD, SCORES

Write = Callable[[], Iterator[Block]]


@checked
class ReportConfig:
    """Write the report of a run: one HTML page that needs no network, and Markdown."""

    run: Annotated[str, tyro.conf.arg(metavar="DIR")] = str(LATEST)
    """Run folder of train.lora; the report is written into it."""
    ablation: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DIR ...")] = ()
    """Folders of eval.ablate, measured or planned."""
    reference: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Earlier reports to show beside this one: `original`, which is the course report's figures, or
    JSON with recorded answers (a list with `prompt` and `..._answer`) or with losses
    (`average_loss_per_epoch`) and other figures."""
    only_read: bool = False
    """Make no missing scores and answers; report what is there."""


def report(config: ReportConfig) -> None:
    """Reads, makes what is missing, and writes.

    Raises:
        InputError: if there is no such run, or one of its files is damaged.
    """
    folder = Path(config.run)
    if not folder.is_dir():
        raise InputError(f"{folder}: no run folder; make one with: {command_line('train')}")
    run = Evidence(folder)
    if not run.has(RECORD) or not run.has(CONFIG):
        raise InputError(f"{folder}: no {RECORD} and {CONFIG}; expected a run folder")
    # Damaged ones are refused before anything runs.
    if run.content(RECORD).get("config_sha256") != file_sha256(folder / CONFIG):
        raise InputError(f"{folder / CONFIG} was changed after the run began; restore it")
    reference = read_reference(config.reference, folder)
    failures = {} if config.only_read else make_missing(run)
    parts: dict[str, Write] = {
        "At a glance": lambda: overview(run, reference.losses),
        **({"Beside the reference": lambda: beside(run, reference)} if reference.figures else {}),
        "The techniques": lambda: techniques(config.ablation, folder),
        "Parameters": lambda: sections.parameters(run),
        "Memory": lambda: sections.memory(run),
        "Gradient checkpointing": lambda: sections.checkpointing(run),
        "Loss": lambda: sections.loss(run, reference.losses),
        "Scores": lambda: scores(run),
        **({"Tasks": lambda: tasks(run)} if run.has(HARNESS) else {}),
        "Prompts": lambda: sections.answers(run, reference.answers),
        "Data": lambda: sections.data(run),
        "Settings": lambda: sections.settings(run),
        "How to reproduce": lambda: sections.reproduce(run),
    }
    advice = {
        "Loss": "Train on: " + command_line("train", "--resume", folder),
        "Scores": failures.get(SCORES, "Make it with: " + command_line("score", "--run", folder)),
        "Tasks": "Make it again with: " + command_line("harness", "--run", folder),
        "Prompts": failures.get(
            GENERATIONS, "Make it with: " + command_line("prompts", "--run", folder)
        ),
    }
    written = [
        Section(title, list(_complete(write, advice.get(title, "")))) for title, write in
        parts.items()
    ]  # fmt: skip
    cut = [lacking(f"{file} ends within a line; what followed is not here", "") for file in run.cut]
    if cut:
        written.insert(0, Section("Not complete", cut))
    model = Path(str(run.content(CONFIG).get("model", ""))).name
    files = write_report(folder, f"Fine-tuning {model or 'a model'}: report", written)
    console.print(f"wrote {', '.join(map(str, files))}")
    console.print(f"next: open {folder / 'report.html'} in a browser")


def _complete(write: Write, advice: str) -> Iterator[Block]:
    """A section's blocks, and in place of the first that cannot be made what it lacks."""
    try:
        yield from write()
    except Missing as missing:
        yield lacking(missing, advice)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # Only fields of another type or name than `train` and `eval` write lead here.
        yield lacking(f"a field is not as expected ({type(error).__name__}: {error})", advice)


def make_missing(run: Evidence) -> dict[str, str]:
    """Runs eval.prompts and eval.score where their files are missing; gives why one failed."""
    if not run.has(METRICS):
        return {}
    failures = {}
    for file, command in ((GENERATIONS, "prompts"), (SCORES, "score")):
        if run.has(file):
            continue
        flags = ["--run", run.folder]
        console.print(f"{file} is not there yet: {command_line(command, *flags)}")
        done = Children().run(f"eval.{command}", flags)
        if done.code:
            failures[file] = f"jllama {command} failed: {done.reason}"
    return failures


def main(argv: Sequence[str] | None = None) -> None:
    run_command(report, ReportConfig, argv, name="report", gpu=False)
