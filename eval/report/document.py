"""What a report is made of, and how it is written: one HTML page, and Markdown with pictures.

Text is escaped here and nowhere else; a Figure becomes a `<data>` element that says where the
number stands.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from eval.report.evidence import Figure
from jllama.cli.terminal import visible
from jllama.folders.json_files import NEW, naming

Text = str | Figure
Words = Sequence[Text]  # one after the other: ["of ", Figure, " parameters"]


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    words: Words
    kind: str = "paragraph"


@dataclass(frozen=True)
class Lacking:
    """What is not there, in place of what it would have shown."""

    words: Words
    kind: str = "lacking"


@dataclass(frozen=True)
class Code:
    """Lines to type."""

    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Heading:
    """Within a section."""

    text: str
    kind: str = "heading"


@dataclass(frozen=True)
class Table:
    """Rows of cells; `wide` ones hold sentences, the others numbers and names."""

    header: Sequence[str]
    rows: Sequence[Sequence[Text | Words]]
    wide: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Picture:
    """An SVG; `alt` says in words what it shows."""

    name: str
    svg: str
    alt: str
    kind: str = "picture"


@dataclass(frozen=True)
class Card:
    """One of the figures that a reader sees first, and a line that explains it."""

    label: str
    words: Words
    note: Words = ()


@dataclass(frozen=True)
class Cards:
    """Cards side by side."""

    cards: Sequence[Card]
    kind: str = "cards"


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when their title is opened."""

    title: str
    blocks: Sequence["Block"]
    kind: str = "fold"


Block = Paragraph | Lacking | Code | Heading | Table | Picture | Cards | Fold


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


def cell_words(cell: Text | Words) -> Words:
    """A cell as words, whatever it was given as."""
    return [cell] if isinstance(cell, str | Figure) else cell


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> list[Path]:
    """Writes report.html, report.md and the latter's pictures; gives their paths.

    A file that is there already stays until all new ones are whole.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.j2"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "words": cell_words,
        "json": json.dumps,
        "markdown": _markdown,
        "visible": visible,
    }
    templates.tests["figure"] = lambda word: isinstance(word, Figure)
    content: dict[str, Any] = {"title": title, "sections": sections}
    texts = {
        name: templates.get_template(f"{name}.j2").render(content)
        for name in ("report.html", "report.md")
    }
    blocks = [block for section in sections for block in _unfolded(section.blocks)]
    texts |= {f"report-{b.name}.svg": b.svg for b in blocks if isinstance(b, Picture)}
    try:
        for name, text in texts.items():
            encoded = text.encode("utf-8", "backslashreplace")  # names of files may be no Unicode
            with naming(folder / name):
                (folder / (name + NEW)).write_bytes(encoded)
        for name in texts:
            (folder / (name + NEW)).replace(folder / name)
    finally:
        for name in texts:
            (folder / (name + NEW)).unlink(missing_ok=True)
    return [folder / name for name in texts]


def _unfolded(blocks: Iterable[Block]) -> Iterator[Block]:
    for block in blocks:
        yield block
        if isinstance(block, Fold):
            yield from _unfolded(block.blocks)


def _markdown(words: Text | Words) -> str:
    """One line in which no text is taken for markup."""
    text = visible("".join(w.text if isinstance(w, Figure) else w for w in cell_words(words)))
    for mark in "\\`*_{}[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return "<br>".join(text.splitlines())
