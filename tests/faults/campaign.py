"""`python -m tests.faults`: injects faults into every command, and counts what survived.

    python -m tests.faults                                        # all of it: about half an hour
    python -m tests.faults --kills 10 --flips 50 --texts 20       # some of each
    python -m tests.faults --only "^train --resume" --verbose      # one command

Survived means: the right result, if need be after --resume or the same command again; or exit
code 2 and one message that names the file. Ends with 1 if anything was lost, ended in a traceback,
or left a process running. The seed makes it repeatable.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from faults import call, flips, kills, readers
from faults.place import Place
from faults.table import tables
from jllama.folders.json_files import write_json
from jllama.machine import measured_here

PIECE = {"kills": 24, "flips": 250, "texts": 1000}  # faults that one process injects in one go
COMMANDS: dict[str, Sequence[Any]] = {
    "kills": kills.WRITERS, "flips": flips.READERS, "texts": readers.TEXTS,
}  # fmt: skip
Record = dict[str, Any]
Unit = tuple[str, int, int, int]  # kind, index of the command, number of the piece, faults

_place: Place | None = None  # of this process


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=30, help="of each command that writes")
    parser.add_argument("--flips", type=int, default=250, help="of each command that reads")
    parser.add_argument("--texts", type=int, default=100, help="hostile ones for each reader")
    parser.add_argument("--slow-kills", type=int, default=8, help="of commands that start others")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="REGEX", help="commands with such names")
    parser.add_argument("--verbose", action="store_true", help="tell of each fault at once")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the figures")
    return parser.parse_args(argv)


def units(asked: argparse.Namespace) -> Iterator[Unit]:
    """The slow ones first."""
    for kind, commands in COMMANDS.items():
        for index, command in enumerate(commands):
            slow = kind == "kills" and command.slow
            count = asked.slow_kills if slow else getattr(asked, kind)
            if re.search(asked.only, command.name):
                for number, start in enumerate(range(0, count, PIECE[kind])):
                    yield kind, index, number, min(PIECE[kind], count - start)


def begin(root: Path, wanted: set[str]) -> None:
    """Once in every process of the campaign: good inputs of its own."""
    global _place
    call.begin_child()
    call.adopt_orphans()
    os.environ.setdefault("XDG_CACHE_HOME", str(root / "cache"))  # programs are compiled once
    _place = Place(root / str(os.getpid()), wanted)


def inject(unit: Unit, seed: int, verbose: bool) -> list[Record]:
    """The records of one unit."""
    kind, index, number, faults = unit
    injectors: dict[str, Any] = {
        "kills": kills.Killing, "flips": flips.Flipping, "texts": readers.Reading
    }  # fmt: skip
    command = COMMANDS[kind][index]
    draw = random.Random(f"{seed} {kind} {command.name} {number}")
    records = []
    for record in injectors[kind](command, _place, draw).run(faults):
        records.append(record | {"kind": kind})
        if verbose:
            print(f"{time.strftime('%X')} {json.dumps(record)}", file=sys.stderr, flush=True)
    return records


def run(asked: argparse.Namespace) -> list[Record]:
    """All records; what was begun in files is gone afterwards, however this ends."""
    root, chosen = Path(tempfile.mkdtemp(prefix="faults-")), list(units(asked))
    wanted = {name for kind, index, _, _ in chosen for name in COMMANDS[kind][index].inputs}
    records: list[Record] = []
    pool = ProcessPoolExecutor(
        asked.jobs, multiprocessing.get_context("fork"), initializer=begin, initargs=(root, wanted)
    )
    try:
        todo = [pool.submit(inject, unit, asked.seed, asked.verbose) for unit in chosen]
        for done, future in enumerate(as_completed(todo), start=1):
            found = future.result()
            records += found
            failed = sum(bool(record["verdict"]) for record in found)
            words = found[0]["command"] if found else "nothing"
            print(f"{done}/{len(todo)}  {words}: {len(found)} faults, {failed} failures",
                  flush=True)  # fmt: skip
    finally:
        for process in call.children():
            os.kill(process, signal.SIGKILL)
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(root, ignore_errors=True)
    return records


def figures(records: Sequence[Record]) -> dict[str, Any]:
    """Counts by kind, and by command of each."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(record["kind"] for record in records):
        of_kind = [record for record in records if record["kind"] == kind]
        commands = dict.fromkeys(record["command"] for record in of_kind)
        found[kind] = _counts(of_kind) | {
            "commands": {
                name: _counts([record for record in of_kind if record["command"] == name])
                for name in sorted(commands)
            }
        }
    return found


def _counts(records: Sequence[Record]) -> dict[str, Any]:
    verdicts = Counter(record["verdict"].partition(":")[0] for record in records)
    named = {"losses": "loss", "tracebacks": "traceback", "orphans": "orphans"}
    return {
        "injected": len(records),
        "survived": verdicts[""],
        **{name: verdicts[word] for name, word in named.items()},
        "other_failures": sum(
            count for word, count in verdicts.items() if word not in ("", *named.values())
        ),
        "by_fault": dict(sorted(Counter(record["fault"] for record in records).items())),
        "slowest_seconds": round(max(record["seconds"] for record in records), 1),
    }


def failures(records: Sequence[Record]) -> list[Record]:
    """One record of each failure, and how often it was."""
    distinct: dict[tuple[str, str], Record] = {}
    for record in records:
        if record["verdict"]:
            words = "".join(c for c in record["verdict"] if not c.isdigit())[:60]
            first = distinct.setdefault((record["command"], words), record | {"times": 0})
            first["times"] += 1
    return list(distinct.values())


def main(argv: Sequence[str] | None = None) -> None:
    asked = parse(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and clean up
    started = time.monotonic()
    records = run(asked)
    failed = failures(records)
    result = {
        **measured_here("faults"),
        "command": ["python", "-m", "tests.faults", *(sys.argv[1:] if argv is None else argv)],
        "seed": asked.seed,
        "seconds": round(time.monotonic() - started),
        "figures": figures(records),
        "failures": failed,
    }
    for record in failed:
        print(json.dumps(record))
    print(tables(result))
    if asked.output:
        write_json(asked.output, result)
    sys.exit(bool(failed))
