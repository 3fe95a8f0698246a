"""The picture of README.md, what fits: `python docs/site/picture.py` writes docs/what-fits.svg."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
RESULTS = ("plans-cards.json", "plans-quantised.json")
PARTS = {  # of a plan -> its name and colour
    "base_weights": ("frozen weights", "#3b6fb6"),
    "learned": ("adapters and their optimizer", "#d9822b"),
    "work": ("activations and temporaries", "#8a8f2a"),
}
LEFT, SCALE, ROW, TOP = 190, 0.0083, 26, 46  # SCALE: units of the picture for a MiB


class Row(NamedTuple):
    """A line of README.md's table: | `llama-2-7b` | int4 | 8 GB: ... | 4,148 MiB | 3,099 MiB |."""

    model: str
    base: str
    gpu: str
    gpu_memory: float | None
    peak: int
    left: int


def rows() -> Iterator[Row]:
    """The table of README.md."""
    line = re.compile(
        r"\| `(\S+)` \| (\w+) \| \d+ GB: `(\S+)`(?:, `--gpu-memory (\d+)`)? "
        r"\| ([\d,]+) MiB \| ([\d,]+) MiB \|"
    )
    for model, base, gpu, memory, *sizes in line.findall((ROOT / "README.md").read_text()):
        peak, left = (int(size.replace(",", "")) for size in sizes)
        yield Row(model, base, gpu, float(memory) if memory else None, peak, left)


def plan_of(row: Row) -> dict[str, Any]:
    """The plan that a row is about, from docs/results."""
    wanted = {
        "model": row.model, "base": row.base.replace("bf16", "stored"), "gpu": row.gpu,
        "gpu_memory": row.gpu_memory, "program": "train", "precision": "bf16", "remat": "block",
        "micro_batch_size": 1, "max_seq_len": 512, "lora_rank": 16, "lora_targets": "wq,wv",
    }  # fmt: skip
    files = [json.loads((ROOT / "docs/results" / name).read_text()) for name in RESULTS]
    (plan,) = (
        plan
        for file in files
        for plan in file["plans"]
        if wanted.items() <= plan["settings"].items()
    )
    return plan


def picture() -> str:
    """Planned memory by class, a bar for each row, and where the card's memory ends."""
    lines, x = [], LEFT
    for name, colour in PARTS.values():
        lines += [f'<rect x="{x}" y="12" width="12" height="12" fill="{colour}"/>',
                  f'<text x="{x + 18}" y="22">{name}</text>']  # fmt: skip
        x += 40 + 7 * len(name)
    lines += [f'<path d="M{x + 6} 10v16" stroke="#c0392b" stroke-width="2"/>',
              f'<text x="{x + 14}" y="22">room on the card</text>']  # fmt: skip
    y = TOP
    for row in rows():
        classes = plan_of(row)["classes_mib"]
        sizes = {
            "base_weights": classes["base_weights"],
            "learned": sum(
                classes[name] for name in ("adapters", "optimizer_state", "accumulator")
            ),
        }
        sizes["work"] = row.peak - sum(sizes.values())
        lines.append(
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{row.model}, {row.base}</text>'
        )
        at = float(LEFT)
        for part, size in sizes.items():
            width = size * SCALE
            lines.append(f'<rect x="{at:.1f}" y="{y}" width="{width:.1f}" height="17" '
                         f'fill="{PARTS[part][1]}"/>')  # fmt: skip
            at += width
        end = LEFT + (row.peak + row.left) * SCALE
        lines.append(
            f'<path d="M{end:.1f} {y - 2}v21" stroke="#c0392b" stroke-width="2"/>'
            f'<text x="{end + 6:.1f}" y="{y + 13}">{row.peak / 1024:.1f} of '
            f"{(row.peak + row.left) / 1024:.1f} GiB</text>"
        )
        y += ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {y + 4}" role="img" '
        'font-family="sans-serif" font-size="12" fill="#333">\n'
        "<title>Planned memory of a training step: one sequence of 512 tokens, LoRA</title>\n"
        f'<rect width="960" height="{y + 4}" fill="#fff"/>\n' + "\n".join(lines) + "\n</svg>\n"
    )


if __name__ == "__main__":
    (ROOT / "docs/what-fits.svg").write_text(picture())
