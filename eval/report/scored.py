"""The sections of a report about scores: of a data file, and of lm-evaluation-harness."""

from collections.abc import Iterator

from eval.harness.results import measure_of
from eval.report.document import Block, Paragraph, Table, Text, Words
from eval.report.evidence import Evidence, Figure, Missing, combine
from eval.report.sections import short
from eval.score import SHOWN, result_sha256
from jllama.folders.run import HARNESS, SCORES


def scores(run: Evidence) -> Iterator[Block]:
    """What `eval.score` measured of the base and the tuned model."""
    refuse_stale(run, SCORES)
    models = [who for who in ("base", "tuned") if who in run.content(SCORES)]
    rows: list[list[Text]] = []
    for title, (part, name) in SHOWN.items():
        row: list[Text] = [title]
        figures: list[Figure] = []
        for who in models:
            if run.value(SCORES, who, part).get(name) is None:
                row.append("")
                continue
            figures.append(run.figure(SCORES, who, part, name, form=".4f"))
            row.append(figures[-1])
        if len(models) > 1:
            both = len(figures) == len(models)
            row.append(combine("difference", *figures[::-1], form="+.4f") if both else "")
        if figures:
            rows.append(row)
    yield Table(["measure", *models, *(["change"] if len(models) > 1 else [])], rows)
    yield Paragraph([
        *scored_rows(run), ", ",
        run.figure(SCORES, "tokens", form=","), " answer tokens; ",
        run.figure(SCORES, "cut", form=","), " rows were cut.",
    ])  # fmt: skip


def scored_rows(run: Evidence) -> Words:
    """Which rows were scored, in words."""
    part = str(run.value(SCORES, "part"))
    limited = bool(run.value(SCORES, "settings", "limit"))
    return [
        "only the first " if limited else "", run.figure(SCORES, "rows", form=","),
        {"held-out": " rows held out of ", "training": " training rows of "}.get(part, " rows of "),
        short(run.value(SCORES, "settings", "data")),
    ]  # fmt: skip


def tasks(run: Evidence) -> Iterator[Block]:
    """What `eval.harness` measured of the base and the tuned model."""
    refuse_stale(run, HARNESS)
    lines = run.value(HARNESS, "results")
    models = [who for who in ("base", "tuned") if who in lines[0]]
    rows: list[list[Text | Words]] = []
    for number, line in enumerate(lines):
        place = (HARNESS, "results", number)
        row: list[Text | Words] = [line["task"], measure_of(line)]
        for name in ("samples", "few_shot"):
            row.append("" if line[name] is None else run.figure(*place, name, form=","))
        figures = []
        for who in models:
            words: list[Text] = []
            if line[who]["value"] is not None:
                figures.append(run.figure(*place, who, "value", form=".4f"))
                words.append(figures[-1])
            if line[who]["stderr"] is not None:
                words += [" ± ", run.figure(*place, who, "stderr", form=".4f")]
            row.append(words)
        if len(models) > 1:
            both = len(figures) == len(models)
            row.append(combine("difference", *figures[::-1], form="+.4f") if both else "")
        rows.append(row)
    change = ["change"] if len(models) > 1 else []
    yield Table(["task", "metric", "samples", "examples before", *models, *change], rows)
    limited = bool(run.value(HARNESS, "settings", "limit"))
    yield Paragraph([
        f"By lm-evaluation-harness {run.value(HARNESS, 'lm_eval')}, with standard errors",
        "; only the first rows of each task." if limited else ".",
    ])  # fmt: skip


def refuse_stale(run: Evidence, file: str) -> None:
    """Raises Missing if a file's scores are those of another result than the run's."""
    of, now = run.value(file, "tuned_sha256"), run.folder / "adapter"
    result = now if now.is_dir() else run.folder / "model"
    if of and result.is_dir() and of != result_sha256(result):
        raise Missing(f"{file} is of another adapter than {result.name}/")
