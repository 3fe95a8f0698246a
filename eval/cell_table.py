"""An ablation on the terminal: its cells, and what follows from them."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from eval.analysis import analyse, memory_disorder
from eval.cells import Figures

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

# Title -> figure, factor and digits.
MEASURED_COLUMNS = {
    "peak\nMiB": ("peak_memory_mib", 1, 0),
    "planned\nMiB": ("planned_memory_mib", 1, 1),
    "step\nms": ("step_seconds", 1000, 0),
    "tokens\n/s": ("tokens_per_second", 1, 0),
    "loss\n": ("loss", 1, 4),
    "held-out\nloss": ("eval_loss", 1, 4),
}
PLANNED_COLUMNS = {
    "peak\nMiB": ("peak_mib", 1, 0),
    "free\nMiB": ("free_mib", 1, 0),
    "GFLOP\n/token": ("flops_per_token", 1e-9, 1),
    "bound\ntokens/s": ("bound_tokens_per_second", 1, 0),
}
ORDER_HOLDS = "fp32 full > fp32 LoRA > bf16 LoRA, no remat > ffn > block, wherever compared"


def show(cells: Sequence[Figures], note: str = "") -> None:
    """A table of the cells with a note below, and what follows from them."""
    planned = any("peak_mib" in cell for cell in cells)
    columns = PLANNED_COLUMNS if planned else MEASURED_COLUMNS
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("", "tune", "remat", "batch"):
        table.add_column(title, no_wrap=True)
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for cell in cells:
        batch = f"{cell['micro_batch_size']} x {cell['accumulation']}"
        figures = [_shown(cell, *column) for column in columns.values()]
        if "failed" in cell:
            figures[0] = "no memory"
        table.add_row(cell["precision"], cell["tune"], cell["remat"], batch, *figures)
    console.print(table)
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


def _shown(cell: Figures, figure: str, scale: float, digits: int) -> str:
    value = cell.get(figure)
    return "" if value is None else f"{scale * value:,.{digits}f}"
