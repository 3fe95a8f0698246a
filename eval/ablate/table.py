"""An ablation on the terminal: its cells, and what follows from them."""

from collections.abc import Sequence

from eval.ablate.analysis import analyse, memory_disorder
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
        "held-out\nloss": "eval_loss",
    },
    "planned": {
        "peak\nMiB": "peak_mib",
        "free\nMiB": "free_mib",
        "GFLOP\n/token": "flops_per_token",
        "bound\ntokens/s": "bound_tokens_per_second",
    },
}
ORDER_HOLDS = "fp32 full > fp32 LoRA > bf16 LoRA, no remat > ffn > block, wherever compared"


def show(cells: Sequence[Figures], note: str = "") -> None:
    """A table of the cells with a note below, and what follows from them."""
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
    if note:
        console.print(note)
    if planned and not all(cell["compiled"] for cell in cells):
        console.print("not compiled, but estimated: pip install 'jllama[plan]' compiles")
    technique = ""
    for finding in analyse(cells):
        if finding.technique != technique:
            technique = finding.technique
            console.print(f"\n{technique}")
        console.print(f"  {finding.text}")
    wrong = memory_disorder(cells)
    if wrong:
        console.print(f"\norder of memory: not as expected in {len(wrong)} pairs, as {wrong[0]}")
    elif {"none", "ffn", "block"} <= {cell["remat"] for cell in cells}:
        console.print(f"\norder of memory: {ORDER_HOLDS}")


def _shown(cell: Figures, figure: str) -> str:
    value = cell.get(figure)
    return "" if value is None else WORDS[figure].write(value)
