"""The commands that write, killed at any moment: the same command, or --resume, then gives the
bytes of the command that nobody killed.
"""

import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.from_hf import main as from_hf
from convert.from_meta import main as from_meta
from convert.to_hf import main as to_hf
from convert.to_meta import main as to_meta
from eval.ablate.command import main as ablate
from eval.prompts import main as prompts
from eval.report.command import main as report
from eval.score import main as score
from faults.call import FORK, Call, in_fork
from faults.moments import Changes, Fault, with_fault
from faults.place import Place, full_flags, prompts_flags, score_flags, train_flags
from faults.verdict import contents, ended_well, run_result
from train.lora import main as train

LIMIT = 120  # seconds of one command
FIRST_MOMENTS, LAST_MOMENTS = 20, 40  # changes of the file system
LIVES = 3  # faults in a row, each in what goes on after the one before
# Of ten faults eight are kills, the others take turns.
KINDS = ("kill", "kill", "kill", "kill", "torn", "torn", "seconds", "seconds")
OTHER_KINDS = ("SIGTERM", "full disk", "file size", "SIGINT")


@dataclass(frozen=True)
class Writer:
    """A command that writes.

    Args:
        inputs: the good ones that it wants.
        start: its arguments, in a folder of such inputs.
        again: arguments that go on after a fault, the first of them that are accepted; the last
            ones are those of `start`.
        result: what it made, to be compared.
        slow: it starts processes that import all anew.
    """

    name: str
    command: str
    main: Callable[[list[str]], None]
    inputs: tuple[str, ...]
    start: Callable[[Path], list[str]]
    result: Callable[[Path], Any]
    resume: Callable[[Path], list[str]] | None = None
    slow: bool = False

    def again(self, case: Path) -> list[list[str]]:
        return [*([self.resume(case)] if self.resume else []), self.start(case)]


def _resume(case: Path) -> list[str]:
    return ["--resume", str(case / "run")]


def _run(case: Path) -> Any:
    return run_result(case / "run")


def _latest(case: Path) -> Any:
    return run_result(case / "runs" / "latest")


def _out(case: Path) -> Any:
    return contents(case / "out")


def _report(case: Path) -> Any:
    return contents(case / "run", "report*")


def _cells(case: Path) -> Any:
    cells, trials = (
        [json.loads(line) for line in (case / "out" / name).read_text().splitlines()]
        for name in ("cells.jsonl", "accuracy.jsonl")
    )
    return (
        sorted((cell["tune"], cell["micro_batch_size"], cell["loss"]) for cell in cells),
        sorted((trial["tune"], trial["learning_rate"], trial["eval_loss"]) for trial in trials),
    )


_TRAINS = ("model", "rows.json")
_WORSE = {"learning_rate": 0.5, "epochs": 20, "patience": 1, "eval_steps": 1}
_ABLATION = [
    "--precision", "fp32", "--accumulation", "1", "--remat", "none", "--tune", "full,lora",
    "--sequences", "2", "--max-seq-len", "32", "--steps", "2", "--repeats", "1", "--val-size", "2",
    "--accuracy-steps", "2", "--seeds", "1",
]  # fmt: skip

WRITERS = (
    Writer("train", "train", train, _TRAINS, train_flags, _run, _resume),
    Writer("train, ended by patience", "train", train, _TRAINS,
           lambda case: train_flags(case, **_WORSE), _run, _resume),
    Writer("train, ended by --max-steps", "train", train, _TRAINS,
           lambda case: train_flags(case, max_steps=4, save_steps=2), _run, _resume),
    Writer("train --tune full", "train", train, _TRAINS, full_flags, _run, _resume),
    Writer("train into runs/latest", "train", train, _TRAINS,
           lambda case: train_flags(case, output_dir=None, max_steps=2),
           _latest, lambda case: ["--resume", "latest"]),
    Writer("from-meta", "from-meta", from_meta, ("meta",),
           lambda case: [str(case / "meta"), str(case / "out")], _out),
    Writer("from-hf", "from-hf", from_hf, ("hf",),
           lambda case: [str(case / "hf"), str(case / "out")], _out),
    Writer("to-meta", "to-meta", to_meta, ("model",),
           lambda case: [str(case / "model"), str(case / "out"), "--shards", "2"], _out),
    Writer("to-hf", "to-hf", to_hf, ("model",),
           lambda case: [str(case / "model"), str(case / "out")], _out),
    Writer("to-hf --adapter", "to-hf", to_hf, ("model", "adapter"),
           lambda case: [str(case / "model"), str(case / "out"), "--adapter",
                         str(case / "adapter")], _out),
    Writer("prompts", "prompts", prompts, ("model", "run", "prompts.json"),
           lambda case: prompts_flags(case, "--run", case / "run"),
           lambda case: contents(case / "run", "generations.jsonl*")),
    Writer("score", "score", score, ("model", "run", "rows.json"),
           lambda case: score_flags(case, "--run", case / "run"),
           lambda case: contents(case / "run", "score.json*")),
    Writer("report", "report", report, ("model", "run", "ablation"),
           lambda case: ["--run", str(case / "run"), "--ablation", str(case / "ablation")],
           _report),
    Writer("report, which also answers and scores", "report", report,
           ("model", "begun-full", "full", "rows.json"),
           lambda case: ["--run", str(case / "full")],
           lambda case: contents(case / "full", "report*", "generations*", "score*"), slow=True),
    Writer("ablate", "ablate", ablate, _TRAINS,
           lambda case: ["--model", str(case / "model"), "--data", str(case / "rows.json"),
                         "--output", str(case / "out"), *_ABLATION], _cells, slow=True),
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """What a command does when nothing happens to it."""

    result: Any
    names: list[str]
    seen: Changes
    seconds: float


class Killing:
    """One command, killed again and again.

    Args:
        draw: where the moments come from.
    """

    def __init__(self, writer: Writer, place: Place, draw: random.Random):
        self.writer, self.place, self.draw = writer, place, draw
        self._told: list[Any] = []

    def run(self, faults: int) -> Iterator[dict[str, Any]]:
        """So many faults or a few more, each as a record of it and what came of it."""
        whole, number = self.reference(), 0
        while number < faults:
            records = list(self.one_life(whole, number, faults))
            yield from records
            number += max(1, len(records))  # a moment that was never reached is no fault

    def reference(self) -> Reference:
        """The uninterrupted command."""
        here, there = FORK.Pipe(duplex=False)
        with here, there, self.place.fresh(self.writer.inputs) as case:
            call = self.call(case, self.writer.start(case), None, there)
            if call.code:
                raise RuntimeError(f"{self.writer.name} fails by itself:\n{call.words[-3000:]}")
            names = sorted(path.name for path in case.iterdir())
            return Reference(self.writer.result(case), names, here.recv(), call.seconds)

    def call(self, case: Path, argv: list[str], fault: Fault | None, tell: Any = None) -> Call:
        def function() -> None:
            os.environ["TMPDIR"] = str(case.parent)  # what a killed command leaves goes with us
            tempfile.tempdir = None
            sys.argv = ["jllama", self.writer.command, *argv]
            self.writer.main(argv)

        kill_after = fault.at if fault and fault.kind == "seconds" else None
        faulty = with_fault(function, case, fault, tell)
        return in_fork(faulty, case.parent, limit=LIMIT, kill_after=kill_after)

    def draw_fault(self, whole: Reference, number: int, faults: int) -> Fault:
        """Kills spread over the command, two of three near its ends; and other faults."""
        kinds = (*KINDS, OTHER_KINDS[number // 10 % 4], OTHER_KINDS[(number // 10 + 1) % 4])
        kind: Any = kinds[number % 10]
        if self.writer.slow:
            kind = ("seconds", "kill", "seconds", "SIGTERM")[number % 4]
        share = (number + self.draw.random()) / faults
        if kind == "seconds":
            return Fault(kind, whole.seconds * share)
        if kind == "file size":
            return Fault(kind, int(whole.seen.largest * share))
        if kind == "torn":
            return Fault(kind, 1 + int(whole.seen.files * share))
        first, last = 1, whole.seen.changes
        if number % 3 == 1:
            last = min(last, FIRST_MOMENTS)
        elif number % 3 == 2:
            first = max(first, last - LAST_MOMENTS)
        return Fault(kind, first + int((last + 1 - first) * share))

    def one_life(self, whole: Reference, number: int, faults: int) -> Iterator[dict[str, Any]]:
        """Faults one after the other, until the command has ended well; then what it made."""
        records: list[dict[str, Any]] = []
        with self.place.fresh(self.writer.inputs) as case:
            todo, tried = [self.writer.start(case)], []
            for life in range(LIVES + 1):
                fault = None
                if life < LIVES:
                    fault = self.draw_fault(whole, (number + life) % faults, faults)
                ended, met = False, False
                for argv in todo:
                    call = self.call(case, argv, fault)
                    tried.append(f"{argv[0] if argv[0] == '--resume' else 'start'} {fault}")
                    met = fault is not None and _met(fault, call)
                    ended = call.code == 0
                    wrong = _wrong_end(call, fault, self.writer.command)
                    if met or wrong or ended:
                        break
                if fault and (met or wrong):
                    records.append(self.record(fault, wrong, call))
                if wrong or ended or (not met and fault):
                    break
                todo = self.writer.again(case)
            wrong = records[-1]["verdict"] if records else wrong
            wrong = wrong or self.compare(whole, case, call)
            if wrong and not records:  # a fault that the command passed over without a word
                records.append(self.record(fault or Fault("kill", 0), wrong, call))
        if records:
            records[-1] |= {"verdict": wrong, "tried": tried}
        yield from records

    def record(self, fault: Fault, verdict: str, call: Call) -> dict[str, Any]:
        return {
            "command": self.writer.name, "fault": fault.kind, "at": fault.at, "verdict": verdict,
            "seconds": call.seconds,
        }  # fmt: skip

    def compare(self, whole: Reference, case: Path, call: Call) -> str:
        """Whether all is there, to the byte, and nothing else."""
        try:
            found = self.writer.result(case)
        except (OSError, ValueError) as error:
            return f"loss: {error}; the last words: {call.words.strip()[-300:]!r}"
        if found != whole.result:
            last = call.words.strip()[-200:]
            return f"loss: {_difference(whole.result, found)}; the last words: {last!r}"
        names = sorted(path.name for path in case.iterdir())
        if names != whole.names:
            return f"left behind: {sorted({*names} ^ {*whole.names})}"
        return ""


def _met(fault: Fault, call: Call) -> bool:
    """Whether the fault was in the command, which otherwise ended or was refused before it."""
    if fault.kills:
        return call.code == -signal.SIGKILL and not call.hung
    if fault.kind in ("SIGTERM", "SIGINT"):
        number = signal.Signals[fault.kind]
        return call.code in (-number, 128 + number)
    full = ("No space left", "File too large", "missing on this", "torch could not write")
    return any(words in call.words for words in full)


def _wrong_end(call: Call, fault: Fault | None, command: str) -> str:
    killed = fault is not None and call.code < 0 and not call.hung and not call.orphans
    if killed and "Traceback" not in call.words:
        return ""
    if wrong := ended_well(call):
        return wrong
    if call.code == 2 and call.words.count(f"jllama {command}: ") != 1:
        return f"other words than one message: {call.words.strip()[-200:]!r}"
    if call.code not in (0, 2, 130, 143):
        return f"exit code {call.code}: {call.words.strip()[-200:]!r}"
    return ""


def _difference(right: Any, found: Any) -> str:
    """The first thing that is not as it should be."""
    if isinstance(right, dict) and isinstance(found, dict):
        names = [name for name in {**right, **found} if right.get(name) != found.get(name)]
        return f"{names[0]}: {_difference(right.get(names[0]), found.get(names[0]))}"
    return f"{str(found)[:60]} in place of {str(right)[:60]}"
