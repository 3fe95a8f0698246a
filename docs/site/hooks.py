"""Pages that mkdocs makes while it builds: every command's settings, the reference, two files."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest import mock

import docstring_parser
import tyro

from jllama.cli import command
from jllama.cli.script import COMMANDS
from jllama.errors import in_words

ROOT = Path(__file__).parents[2]


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages, as mkdocs calls it."""
    from mkdocs.structure.files import File  # tests read the settings without it

    files.append(File.generated(config, "flags.md", content=settings_page()))
    files.append(File.generated(config, "reference.md", content=reference_page()))
    for page, source in (("contributing.md", "CONTRIBUTING.md"), ("changelog.md", "CHANGELOG.md")):
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


class Parsed(BaseException):
    """The settings of a command, where it would have read its flags."""


def settings_of(module: str) -> Any:
    """The settings that a command's `main` reads its flags into: a class, or several of them."""

    def caught(settings: Any, **_: Any) -> None:
        raise Parsed(settings)

    with mock.patch.object(command, "_parse", caught):
        try:
            importlib.import_module(module).main([])
        except Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"{module} reads no flags")


def settings_page() -> str:
    """Every flag of every command, from the declarations that check them."""
    lines = [
        "# Flags",
        "",
        "Every flag of every command, from the declaration that checks it, as `--help` shows it.",
        "The flags of `jllama train`, with `_` for `-`, are also the fields of its `--config FILE`",
        "and of a run's `config.yaml`.",
    ]
    for name, (module, does) in COMMANDS.items():
        lines += ["", f"## jllama {name}", "", f"{does[0].upper()}{does[1:]}."]
        settings = settings_of(module)
        if dataclasses.is_dataclass(settings):
            lines += table(settings)
            continue
        for part in get_args(settings):
            kind, mark = get_args(part)
            lines += ["", f"### jllama {name} {mark.name}", *table(kind)]
    return "\n".join(lines) + "\n"


def reference_page() -> str:
    """What the packages give, in the order of their table of contents; mkdocstrings fills it in."""
    lines = [
        "# Reference",
        "",
        "What `jllama` and `train` give, from the docstrings. [From Python](python.md) shows how",
        "they go together. Shapes are in letters: `B` batch, `T` time, `D` model, `V` vocabulary.",
    ]
    for package in ("jllama", "train"):
        lines += ["", f"## {package}"]
        for name in importlib.import_module(package).__all__:
            lines += ["", f"::: {package}.{name}"]
    return "\n".join(lines) + "\n"


def table(settings: Any) -> list[str]:
    """A row for each field: its flag, its default, its own words, and what it takes."""
    declared = get_type_hints(settings, include_extras=True)
    words = {
        param.arg_name: param.description
        for kind in reversed(settings.__mro__)
        if dataclasses.is_dataclass(kind)
        for param in docstring_parser.parse_from_object(kind).params
    }
    lines = ["", "| flag | default | |", "| --- | --- | --- |"]
    for field in dataclasses.fields(settings):
        takes = in_words(declared[field.name]).replace("true or false", "yes or no")
        cells = (
            flag(settings, field.name),
            default(field.default),
            f"{words[field.name]} Takes {takes}.",
        )
        lines.append("| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |")
    return lines


def flag(settings: Any, name: str) -> str:
    """A field as it is typed: `--max-steps`, or `SRC` where its place tells which it is."""
    marks = getattr(get_type_hints(settings, include_extras=True)[name], "__metadata__", ())
    shown = [mark.metavar for mark in marks if getattr(mark, "metavar", None)]
    placed = get_args(tyro.conf.Positional[str])[1] in marks
    return f"`{shown[0] if placed else command._flag(settings, name)}`"


def default(value: Any) -> str:
    """A default as it is typed; nothing where there is none."""
    if value is dataclasses.MISSING:
        return "must be given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return "" if value in (None, "") else f"`{value}`".replace(f"{ROOT}/", "")
