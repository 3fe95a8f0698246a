"""Every reader of foreign text, given hostile ones: a right end or one message, in bounded time."""

import contextlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from convert.from_hf import main as from_hf
from convert.from_meta import main as from_meta
from convert.to_hf import main as to_hf
from convert.verify import main as verify
from eval.chat import main as chat
from eval.prompts import main as prompts
from eval.report.command import main as report
from eval.score import main as score
from faults.call import Call, Watched, in_process
from faults.place import Place, prompts_flags, score_flags, train_flags
from faults.texts import Form, hostile
from faults.verdict import ended_well, readable, refused
from jllama.folders.json_files import as_line
from jllama.folders.manifest import write_sealed
from train.data.lint.command import main as lint
from train.lora import main as train

LIMIT = 30  # seconds of one command
# What may lie where a file is expected, besides a file.
NO_FILES: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a named pipe": os.mkfifo,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda path: None,
}


@dataclass(frozen=True)
class Text:
    """A file that a command reads.

    Args:
        file: where it lies in a case.
        inputs: the good ones that it wants, the file's folder among them.
        sealed: whether a valid hash of itself stands in it.
        typed: whether it is what is typed into the command, which is nothing to end for.
    """

    file: str
    form: Form
    command: str
    main: Callable[[list[str]], None]
    inputs: tuple[str, ...]
    argv: Callable[[Path], list[str]]
    sealed: bool = False
    typed: bool = False

    @property
    def name(self) -> str:
        return f"{self.file}, {self.command}"


def _short(case: Path, **more: object) -> list[str]:
    return train_flags(case, output_dir=case / "out", max_steps=1, val_size=0, **more)


def _merged(case: Path) -> list[str]:
    return [str(case / "model"), str(case / "out"), "--adapter", str(case / "adapter")]


def _report(case: Path) -> list[str]:
    return ["--run", str(case / "run"), "--ablation", str(case / "ablation"), "--only-read"]


def _prompts(case: Path) -> list[str]:
    return [*prompts_flags(case, "--model", case / "model"), "--output", str(case / "out.json")]


def _of_run(case: Path) -> list[str]:
    return [*prompts_flags(case, "--run", case / "run"), "--output", str(case / "out.json")]


def _score(case: Path) -> list[str]:
    return [*score_flags(case, "--model", case / "model"), "--output", str(case / "out.json")]


def _converted(name: str) -> Callable[[Path], list[str]]:
    return lambda case: [str(case / name), str(case / "out")]


_DATA, _RUN = ("model", "rows.json"), ("model", "run", "ablation")
TEXTS = (
    Text("rows.json", "json", "lint", lint, _DATA,
         lambda case: [str(case / "rows.json"), "--model", str(case / "model")]),
    Text("rows.json", "json", "train", train, _DATA, _short),
    Text("rows.json", "json", "score", score, _DATA, _score),
    Text("prompts.json", "json", "prompts", prompts, ("model", "prompts.json"), _prompts),
    Text("reference.json", "json", "prompts --reference", prompts,
         ("model", "prompts.json", "reference.json"),
         lambda case: [*_prompts(case), "--reference", str(case / "reference.json")]),
    Text("reference.json", "json", "report --reference", report, (*_RUN, "reference.json"),
         lambda case: [*_report(case), "--reference", str(case / "reference.json")]),
    Text("run/config.yaml", "yaml", "train --config", train, ("model", "rows.json", "run"),
         lambda case: ["--config", str(case / "run" / "config.yaml"), "--output-dir",
                       str(case / "out"), "--dry-run"]),
    Text("run/config.yaml", "yaml", "prompts --run", prompts, ("model", "run", "prompts.json"),
         _of_run),
    Text("begun/config.yaml", "yaml", "train --resume", train, (*_DATA, "begun"),
         lambda case: ["--resume", str(case / "begun")]),
    Text("begun/run.json", "json", "train --resume", train, (*_DATA, "begun"),
         lambda case: ["--resume", str(case / "begun")], sealed=True),
    Text("begun/metrics.jsonl", "lines", "train --resume", train, (*_DATA, "begun"),
         lambda case: ["--resume", str(case / "begun")], sealed=True),
    Text("run/run.json", "json", "report", report, _RUN, _report, sealed=True),
    Text("run/metrics.jsonl", "lines", "report", report, _RUN, _report, sealed=True),
    Text("run/generations.jsonl", "lines", "report", report, _RUN, _report, sealed=True),
    Text("run/score.json", "json", "report", report, _RUN, _report, sealed=True),
    Text("ablation/ablation.json", "json", "report", report, _RUN, _report),
    Text("ablation/cells.jsonl", "lines", "report", report, _RUN, _report, sealed=True),
    Text("run/adapter/jllama.json", "json", "prompts --run", prompts,
         ("model", "run", "prompts.json"), _of_run, sealed=True),
    Text("run/adapter/jllama.json", "json", "chat", chat, ("model", "run"),
         lambda case: ["--run", str(case / "run"), "--temperature", "0"], sealed=True),
    Text("talk.txt", "binary", "chat", chat, ("model", "run", "talk.txt"),
         lambda case: ["--run", str(case / "run"), "--temperature", "0", "--max-new-tokens", "2"],
         typed=True),
    Text("adapter/adapter_config.json", "json", "to-hf", to_hf, ("model", "adapter"), _merged),
    Text("adapter/adapter_config.json", "json", "train --init-adapter", train, (*_DATA, "adapter"),
         lambda case: _short(case, init_adapter=case / "adapter", lora_rank=None)),
    Text("adapter/adapter_model.safetensors", "binary", "to-hf", to_hf, ("model", "adapter"),
         _merged),
    Text("model/config.json", "json", "verify", verify, ("model",),
         lambda case: [str(case / "model")]),
    Text("model/manifest.json", "json", "verify", verify, ("model",),
         lambda case: [str(case / "model")], sealed=True),
    Text("model/manifest.json", "json", "to-hf", to_hf, ("model",), _converted("model"),
         sealed=True),
    Text("meta/params.json", "json", "from-meta", from_meta, ("meta",), _converted("meta")),
    Text("meta/tokenizer.model", "binary", "from-meta", from_meta, ("meta",), _converted("meta")),
    Text("sample/tokenizer.model", "binary", "from-meta", from_meta, ("sample",),
         _converted("sample")),
    Text("meta/consolidated.00.pth", "binary", "from-meta", from_meta, ("meta",),
         _converted("meta")),
    Text("hf/config.json", "json", "from-hf", from_hf, ("hf",), _converted("hf")),
    Text("hf/tokenizer.json", "json", "from-hf", from_hf, ("hf",), _converted("hf")),
    Text("hf/tokenizer_config.json", "json", "from-hf", from_hf, ("hf",), _converted("hf")),
    Text("hf/model.safetensors.index.json", "json", "from-hf", from_hf, ("hf",), _converted("hf")),
    Text("hf/model-00001-of-00003.safetensors", "binary", "from-hf", from_hf, ("hf",),
         _converted("hf")),
)  # fmt: skip


class Reading:
    """One reader, given one hostile text after the other."""

    def __init__(self, text: Text, place: Place, draw: random.Random):
        self.text, self.place, self.draw = text, place, draw

    def run(self, faults: int) -> Iterator[dict[str, Any]]:
        """Each text as a record of it and what came of it."""
        text = self.text
        good = (self.place.good / text.file).read_bytes()
        cases: list[tuple[str, bytes | None]] = []
        if not text.typed:
            cases += [(name, None) for name in NO_FILES]
        cases += hostile(good, text.form, max(0, faults - len(cases)), self.draw)
        for (name, _), call in Watched(self.call, ("good", good), LIMIT).run(cases[:faults]):
            if name == "good":
                continue
            wrong = ended_well(call) or readable(call) or call.result
            if not wrong and call.code != 0 and not (text.command == "lint" and call.code == 1):
                # A field may be the name of a file, which is then what a message is about.
                given = re.findall(r" is '(.{2,29})'$", name)
                wrong = refused(call, text.command.split()[0], [*_names(text.file), *given])
            yield {
                "command": text.name, "fault": "hostile text", "at": name,
                "refused": call.code == 2, "verdict": wrong or "", "seconds": call.seconds,
            }  # fmt: skip

    def call(self, case: tuple[str, bytes | None]) -> Call:
        (name, content), text = case, self.text
        with self.place.fresh(text.inputs) as folder:
            file = folder / text.file
            if content is None:
                file.unlink()
                NO_FILES[name](file)
            else:
                file.write_bytes(_sealed(content, file) if text.sealed else content)
            given = file.read_bytes() if text.typed else b"Say 3.\n"
            call = in_process(text.main, text.argv(folder), given)
            call.result = _not_finite(folder) if call.code == 0 else ""
            if (folder / "owned").exists():
                call.result = "a command in the text was run"
            return call


def _sealed(content: bytes, file: Path) -> bytes:
    """The content with the hashes of itself, where it is of objects: somebody took the trouble."""
    with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
        if file.suffix == ".jsonl":
            values = [json.loads(line) for line in content.splitlines()]
            for value in values:
                value.pop("crc32", None)
            return "".join(map(as_line, values)).encode(errors="surrogatepass")
        value = json.loads(content)
        value.pop("sha256", None)
        write_sealed(file, value)
        return file.read_bytes()
    return content


def _not_finite(folder: Path) -> str:
    """Which weights that a command made are not finite."""
    for file in sorted((folder / "out").rglob("*.safetensors")):
        for name, array in safetensors.numpy.load_file(file).items():
            if not np.isfinite(array.astype(np.float32)).all():
                return f"loss: {name} is not finite"
    return ""


def _names(file: str) -> Sequence[str]:
    return [Path(file).name, f"{Path(file).parent}/"] if "/" in file else [file]
