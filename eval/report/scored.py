"""The section of a report about the scores, and whose they are."""

from collections.abc import Iterator

from eval.report.document import Block, Paragraph, Table, Text, Words
from eval.report.evidence import Evidence, Figure, Missing, combine
from eval.report.sections import short
from eval.score import SHOWN, result_sha256
from jllama.folders.run import SCORES


def scores(run: Evidence) -> Iterator[Block]:
    """What `eval.score` measured of the base and the tuned model."""
    refuse_stale(run)
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
        short(str(run.value(SCORES, "settings", "data"))),
    ]  # fmt: skip


def refuse_stale(run: Evidence) -> None:
    """Raises Missing if the scores are those of another result than the run's."""
    of, now = run.value(SCORES, "tuned_sha256"), run.folder / "adapter"
    result = now if now.is_dir() else run.folder / "model"
    if of and result.is_dir() and of != result_sha256(result):
        raise Missing(f"{SCORES} is of another adapter than {result.name}/")
