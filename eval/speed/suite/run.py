"""`python -m eval.speed suite`: every measurement of docs/performance.md, unattended.

    python -m eval.speed suite --json DIR            on a machine with a GPU
    python -m eval.speed suite --json DIR --tiny     all of it with tiny sizes, on a CPU, too

Parts run one by one, in processes of their own and with a limit of time. What fails is written
down, and the next one runs. Random weights are made on the device; nothing is downloaded.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from eval.speed.generate import device
from eval.speed.suite.bench import Bench, NotHere, OutOfMemory
from eval.speed.suite.parts import Part, parts
from eval.speed.suite.settings import CARD, TINY
from eval.speed.suite.tables import PACKAGES, tables
from jllama.cli.terminal import command_line, complain, console, show_table
from jllama.errors import AtLeast1, InputError, checked
from jllama.folders.json_files import write_json, write_whole
from jllama.machine import AnyCase, GpuName, installed_version, measured_here

LIMIT, LEAST = 7.5 * 60, 30  # seconds of a part, and those without which none is started
# Of a tiny suite: nothing it measures means anything, so the compiler need not try hard.
QUICK = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


@checked
class SuiteSpeed:
    """Measure everything on a GPU, beside its plan and beside transformers and peft."""

    json: Annotated[str, tyro.conf.arg(metavar="DIR")] = "speed-suite"
    """Folder for a JSON file of each part, and the tables made from them."""
    only: Annotated[str, tyro.conf.arg(metavar="NAME,...")] = ""
    """Parts to run, by name or by the words that it begins with (train, peer-train)."""
    list: bool = False
    """Show the names of the parts, and run none."""
    tiny: bool = False
    """Tiny sizes, for trying it out, on a CPU, too."""
    gpu: Annotated[Literal[GpuName, "present"], AnyCase] = "present"
    """The card to plan for; any, if only plans are made."""
    minutes: AtLeast1 = 600
    """Parts that are left when so much time is over are not started."""


def measure_suite(config: SuiteSpeed) -> None:
    """Runs the parts, writes their files and the tables, and tells what failed.

    Raises:
        InputError: at the end, if a part failed.
    """
    chosen = choose(list(parts(TINY if config.tiny else CARD)), config.only)
    if config.list:
        show_table(("part", "measures"), [(part.name, part.measures) for part in chosen])
        return
    folder = Path(config.json)
    on = device()
    if on == "cpu" and not config.tiny and any(part.device for part in chosen):
        tiny = command_line("speed", "suite", "--json", config.json, "--tiny")
        raise InputError(f"JAX sees no GPU here. To try the parts on a CPU: {tiny}")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    states: dict[str, str] = {}
    for number, part in enumerate(chosen, start=1):
        left = 60 * config.minutes - (time.monotonic() - started)
        if left < LEAST:
            break
        console.print(f"{number}/{len(chosen)} {part.name}: {part.measures}")
        found = run_part(part, config, on, min(LIMIT, left))
        states[part.name] = found["state"]
        write_json(folder / f"{part.name}.json", found)
        console.print(f"    {found['state']} in {found['seconds']:.0f} s")
        if "reason" in found:
            complain(f"    {found['reason'].strip().splitlines()[-1]}")  # the file has all of it
    write_whole(folder / "tables.md", tables(folder))
    console.print(f"wrote {len(states)} parts and tables.md to {folder}")
    unstarted = [part.name for part in chosen if part.name not in states]
    if unstarted:
        words = ["speed", "suite", "--json", config.json, "--only", ",".join(unstarted)]
        console.print(f"next: {command_line(*words, *(['--tiny'] if config.tiny else []))}")
    failed = [name for name, state in states.items() if state == "failed"]
    if failed:
        raise InputError(f"{len(failed)} parts failed: {', '.join(failed)}")


def choose(known: Sequence[Part], only: str) -> list[Part]:
    """The parts that `--only` names, in their own order.

    Raises:
        InputError: if a word names none.
    """
    words = [word.strip() for word in only.split(",") if word.strip()]
    for word in words:
        if not any(is_named(part, word) for part in known):
            raise InputError(f"--only {word}: no part has this name; see --list")
    return [part for part in known if not words or any(is_named(part, word) for word in words)]


def is_named(part: Part, word: str) -> bool:
    return part.name == word or part.name.startswith(f"{word}-")


def run_part(part: Part, config: SuiteSpeed, on: Any, limit: float) -> dict[str, Any]:
    """What is written down of a part, whatever came of it."""
    found: dict[str, Any] = {
        **measured_here("speed", PACKAGES),
        "part": part.name,
        "measures": part.measures,
        "tiny": config.tiny,
    }
    started = time.monotonic()
    if missing := [name for name in part.needs if not installed_version(name)]:
        return {**found, "state": "skipped", "reason": missing_words(missing), "seconds": 0.0}
    environment = QUICK if config.tiny and on == "cpu" else {}
    gpu = "h200" if on == "cpu" and config.gpu == "present" else config.gpu
    try:
        with tempfile.TemporaryDirectory() as place:
            bench = Bench(Path(place), on, gpu, environment, limit)
            with bench.clock():
                outcome = {"state": "done", "figures": part.run(bench)}
    except NotHere as error:
        outcome = {"state": "skipped", "reason": str(error)}
    except OutOfMemory as error:
        outcome = {"state": "out of memory", "reason": str(error)}
    except Exception as error:  # whatever it is, the parts after it are to run
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        outcome = {"state": "failed", "reason": f"{kind}{error}"}
    return {**found, **outcome, "environment": environment, "seconds": time.monotonic() - started}


def missing_words(names: Sequence[str]) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not installed"
