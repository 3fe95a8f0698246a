"""An ablation on the terminal: its cells, and what follows from them."""

from collections.abc import Sequence

from eval.ablate.accuracy import Accuracy, accuracies, mean_and_range
from eval.ablate.analysis import Finding, analyse, with_classes
from eval.ablate.cells import STORED, Figures, names_bases
from eval.ablate.figures import WORDS
from jllama.cli.terminal import console, show_table

# Kind of ablation -> title -> figure.
COLUMNS = {
    "measured": {
        "peak\nMiB": "peak_memory_mib",
        "planned\nMiB": "planned_memory_mib",
        "step\nms": "step_seconds",
        "tokens\n/s": "tokens_per_second",
        "loss\n": "loss",
    },
    "planned": {
        "peak\nMiB": "peak_mib",
        "free\nMiB": "free_mib",
        "GFLOP\n/token": "flops_per_token",
        "bound\ntokens/s": "bound_tokens_per_second",
    },
}


def show(cells: Sequence[Figures], trials: Sequence[Figures]) -> None:
    """A table of the cells, what follows from them, and how well each method learned."""
    planned = any("peak_mib" in cell for cell in cells)
    columns = COLUMNS["planned" if planned else "measured"]
    rows = []
    bases = names_bases(cells)
    for cell in cells:
        batch = f"{cell['micro_batch_size']} x {cell['accumulation']}"
        figures = [_shown(cell, figure) for figure in columns.values()]
        if "failed" in cell:
            figures[0] = "no memory"
        base = [cell.get("base", STORED)] if bases else []
        rows.append([cell["precision"], cell["tune"], *base, cell["remat"], batch, *figures])
    show_table(["", "tune", *(["base"] if bases else []), "remat", "batch", *columns], rows)
    console.print("batch: sequences in a micro-batch x micro-batches in a step")
    if planned and not all(cell["compiled"] for cell in cells):
        console.print("not compiled, but estimated: pip install 'jllama[plan]' compiles")
    findings = analyse(cells)
    for technique in dict.fromkeys(finding.technique for finding in findings):
        of_it = [finding for finding in findings if finding.technique == technique]
        show_table(FINDING, [_found(cells, finding) for finding in of_it], f"\n{technique}")
    if any(finding.spread for finding in findings):
        console.print("in parentheses: a change that does not pass the spread of the repeats")
    if learned := accuracies(trials):
        _show_accuracy(trials, learned)


FINDING = ["median of the pairs", "before → after", "change", "all pairs"]


def _found(cells: Sequence[Figures], finding: Finding) -> list[str]:
    words = WORDS[finding.figure]
    ends = (with_classes(cells[i])[finding.figure] for i in (finding.before, finding.after))
    return [words.title, " → ".join(map(words.write, ends)), *finding.words]


def _show_accuracy(trials: Sequence[Figures], learned: Sequence[Accuracy]) -> None:
    rows = []
    for accuracy in learned:
        mean, spread = mean_and_range(trials, accuracy)
        edge = ", the edge of those tried" if accuracy.at_the_edge else ""
        rows.append([
            accuracy.name, f"{accuracy.learning_rate:g}{edge}", f"{mean:.4f}", f"{spread:.4f}",
            str(len(accuracy.places)),
        ])  # fmt: skip
    one = trials[learned[0].places[0]]
    title = f"\nHow well each method learns: {one['steps']} steps, {one['tokens']:,} learned tokens"
    show_table(["method", "best rate", "held-out loss, mean", "range", "seeds"], rows, title)


def _shown(cell: Figures, figure: str) -> str:
    value = cell.get(figure)
    return "" if value is None else WORDS[figure].write(value)
