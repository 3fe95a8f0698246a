"""The commands that read, with one byte of one file changed: the right result, or refused by name.

All that a command reads of a model, an adapter or a run vouches for itself. So a changed byte is
found, or it is none that the command needs.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.to_hf import main as to_hf
from convert.to_meta import main as to_meta
from convert.verify import main as verify
from eval.chat import main as chat
from eval.prompts import main as prompts
from eval.report.command import main as report
from eval.score import main as score
from faults.call import Call, Watched, in_process
from faults.place import Place, prompts_flags, score_flags, train_flags
from faults.verdict import after_damage, contents, run_result
from train.data.lint.command import main as lint
from train.lora import main as train

LIMIT = 30  # seconds of one command
TALK = b"Say 3.\n/base\nSay 4.\n"


@dataclass(frozen=True)
class Reader:
    """A command that reads.

    Args:
        damaged: the folder of which a file is changed.
        needs: the good inputs it wants besides.
        result: what it made or said, to be compared.
    """

    name: str
    command: str
    main: Callable[[list[str]], None]
    damaged: str
    needs: tuple[str, ...]
    argv: Callable[[Path], list[str]]
    result: Callable[[Path, Call], Any]
    given: bytes = b""
    must_refuse: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.damaged.partition("/")[0], *self.needs)


@dataclass(frozen=True)
class Flip:
    """One bit of one byte of a file."""

    file: str
    byte: int
    bit: int


def _out(case: Path, call: Call) -> Any:
    return contents(case / "out")


def _weights(case: Path, call: Call) -> Any:
    """What was learned; the passport beside it may say from which adapter."""
    return contents(case / "out", "adapter/adapter*", "model/**/*.safetensors")


def _words(case: Path, call: Call) -> Any:
    return call.words


def _file(case: Path, call: Call) -> Any:
    return (case / "out.json").read_text()


def _to(case: Path, name: str = "out.json") -> list[str]:
    return ["--output", str(case / name)]


def _resumed(name: str) -> Callable[[Path, Call], Any]:
    """All but `best/`, which a resume does not read: whoever does is told of its damage."""

    def result(case: Path, call: Call) -> Any:
        whole = run_result(case / name)
        kept = {file: x for file, x in whole["files"].items() if not file.startswith("best/")}
        return whole | {"files": kept}

    return result


def _short(case: Path, **more: object) -> list[str]:
    return train_flags(case, output_dir=case / "out", max_steps=1, val_size=0, **more)


_MODEL, _DATA = ("model",), ("model", "rows.json")
READERS = (
    Reader("verify", "verify", verify, "model", (), lambda case: [str(case / "model")], _words,
           must_refuse=True),
    Reader("to-hf", "to-hf", to_hf, "model", (),
           lambda case: [str(case / "model"), str(case / "out")], _out),
    Reader("to-meta", "to-meta", to_meta, "model", (),
           lambda case: [str(case / "model"), str(case / "out")], _out),
    Reader("to-hf --adapter", "to-hf", to_hf, "run/adapter", _MODEL,
           lambda case: [str(case / "model"), str(case / "out"), "--adapter",
                         str(case / "run" / "adapter")], _out),
    Reader("lint --model", "lint", lint, "model", ("rows.json",),
           lambda case: [str(case / "rows.json"), "--model", str(case / "model")], _words),
    Reader("train", "train", train, "model", ("rows.json",), _short, _weights),
    Reader("train --init-adapter", "train", train, "run/adapter", _DATA,
           lambda case: _short(case, init_adapter=case / "run" / "adapter", lora_rank=None),
           _weights),
    Reader("train --resume", "train", train, "begun", _DATA,
           lambda case: ["--resume", str(case / "begun")], _resumed("begun")),
    Reader("train --resume, --tune full", "train", train, "begun-full", _DATA,
           lambda case: ["--resume", str(case / "begun-full")], _resumed("begun-full")),
    Reader("prompts --run", "prompts", prompts, "run", ("model", "prompts.json"),
           lambda case: [*prompts_flags(case, "--run", case / "run"), *_to(case)], _file),
    Reader("prompts --model", "prompts", prompts, "model", ("adapter", "prompts.json"),
           lambda case: [*prompts_flags(case, "--model", case / "model", "--adapter",
                                        case / "adapter"), *_to(case)], _file),
    Reader("prompts --run, --tune full", "prompts", prompts, "full", ("model", "prompts.json"),
           lambda case: [*prompts_flags(case, "--run", case / "full"), *_to(case)], _file),
    Reader("chat", "chat", chat, "run", _MODEL,
           lambda case: ["--run", str(case / "run"), "--temperature", "0", "--max-new-tokens", "4"],
           _words, given=TALK),
    Reader("score", "score", score, "run", _DATA,
           lambda case: [*score_flags(case, "--run", case / "run"), *_to(case)], _file),
    Reader("report", "report", report, "run", ("ablation",),
           lambda case: ["--run", str(case / "run"), "--ablation", str(case / "ablation"),
                         "--only-read"], lambda case, call: contents(case / "run", "report*")),
    Reader("report --ablation", "report", report, "ablation", ("run",),
           lambda case: ["--run", str(case / "run"), "--ablation", str(case / "ablation"),
                         "--only-read"], lambda case, call: contents(case / "run", "report*")),
)  # fmt: skip


def flips(folder: Path, number: int, draw: random.Random) -> list[Flip]:
    """So many flips: half of them in as many files as there are, half wherever bytes are."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    sizes = [file.stat().st_size for file in files]
    names = [os.fspath(file.relative_to(folder)) for file in files]
    found = []
    for index in range(number):
        (at,) = [index // 2 % len(files)] if index % 2 else draw.choices(range(len(files)), sizes)
        found.append(Flip(names[at], draw.randrange(sizes[at]), draw.randrange(8)))
    return found


class Flipping:
    """One command, with one byte after the other changed."""

    def __init__(self, reader: Reader, place: Place, draw: random.Random):
        self.reader, self.place, self.draw = reader, place, draw

    def run(self, faults: int) -> Iterator[dict[str, Any]]:
        """Each flip as a record of it and what came of it."""
        chosen = flips(self.place.good / self.reader.damaged, faults, self.draw)
        right = None
        for flip, call in Watched(self.call, None, LIMIT).run(chosen):
            if flip is None:
                right = call.result
                continue
            path = Path(self.reader.damaged, flip.file)
            wrong = after_damage(
                call, self.reader.command, _names(path, self.reader.damaged), right,
                must_refuse=self.reader.must_refuse,
            )  # fmt: skip
            yield {
                "command": self.reader.name, "fault": "byte flip", "file": str(path),
                "at": [flip.byte, flip.bit], "refused": call.code == 2, "verdict": wrong,
                "seconds": call.seconds,
            }  # fmt: skip

    def call(self, flip: Flip | None) -> Call:
        reader = self.reader
        with self.place.fresh(reader.inputs) as case:
            if flip is not None:
                file = case / reader.damaged / flip.file
                content = bytearray(file.read_bytes())
                content[flip.byte] ^= 1 << flip.bit
                file.write_bytes(content)
            call = in_process(reader.main, reader.argv(case), reader.given)
            if call.code == 0:
                with contextlib.suppress(OSError, ValueError):
                    call.result = reader.result(case, call)
            return call


def _names(path: Path, folder: str) -> list[str]:
    """What a message may call a damaged file: its name, or a folder between it and the damaged."""
    inside = [str(parent) for parent in path.parents if str(parent).startswith(f"{folder}/")]
    return [path.name, *inside]
