"""The figures of a campaign as the tables of docs/reliability.md."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

KINDS = {"kills": "kills, signals, full disks", "flips": "byte flips", "texts": "hostile texts"}
COUNTS = ("injected", "survived", "losses", "tracebacks", "orphans", "other_failures")


def tables(result: Mapping[str, Any]) -> str:
    """Two tables in Markdown: what came of each kind of fault, and how many each command met.

    Args:
        result: what `python -m tests.faults --output FILE` writes.
    """
    figures = result["figures"]
    by_kind = [
        [words, *(figures[kind][name] for name in COUNTS), figures[kind]["slowest_seconds"]]
        for kind, words in KINDS.items()
        if kind in figures
    ]
    heads = ["faults", *(name.replace("_", " ") for name in COUNTS), "slowest, seconds"]
    commands: dict[str, Counter[str]] = {}
    for kind, found in figures.items():
        for name, counts in found["commands"].items():
            command = name.rpartition(", ")[2] if kind == "texts" else name.partition(",")[0]
            of_command = commands.setdefault(command.split()[0], Counter())
            of_command[kind] += counts["injected"]
    by_command = [[name, *(commands[name][kind] for kind in KINDS)] for name in sorted(commands)]
    return f"{_table(heads, by_kind)}\n\n{_table(['command', *KINDS.values()], by_command)}\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)
