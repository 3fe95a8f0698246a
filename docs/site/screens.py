"""The screens of the documentation, made anew: the last part of `make docs-reports`.

Terminals are what the commands write, as SVG; the report's first screen is seen by Chromium.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parents[1]
ROWS = "jllama/sample/train.json"
TERMINALS = {
    "lint": ["lint", ROWS, "--model", "models/sample"],
    "plan": ["plan", "--model", "llama-2-7b", "--gpu", "rtx-4090"],
}
COLUMNS, LINES = 90, 40


def terminal(name: str, words: list[str]) -> None:
    """docs/screens/NAME.svg: the first lines that `jllama WORDS` writes."""
    shown = subprocess.run(
        [Path(sys.executable).with_name("jllama"), *words],
        env=os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"},
        stdout=subprocess.PIPE, text=True, check=True, cwd=DOCS.parent,
    ).stdout.splitlines()  # fmt: skip
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        for line in [f"$ jllama {' '.join(words)}", *shown[:LINES], *["…"] * (len(shown) > LINES)]:
            console.print(Text.from_ansi(line))
        svg = console.export_svg(title="", unique_id=name)
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # which the network would give
    (DOCS / "screens" / f"{name}.svg").write_text(svg)


def browser(name: str, page: Path, width: int = 1280, height: int = 720) -> None:
    """docs/screens/NAME.png: a page's first screen."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no chromium here; it makes the report's picture")
    subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--window-size={width},{height}", f"--screenshot={DOCS / 'screens' / f'{name}.png'}",
         page.as_uri()],
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip


if __name__ == "__main__":
    (DOCS / "screens").mkdir(exist_ok=True)
    for name, words in TERMINALS.items():
        terminal(name, words)
    browser("report", DOCS / "report" / "report.html")
