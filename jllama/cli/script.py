"""The `jllama` script: every command under one name, imported when it is asked for."""

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import NamedTuple

from jllama.cli.terminal import complain, console, to_any_reader


class Command(NamedTuple):
    """A module with a `main(argv)`, and what it does in one line."""

    module: str
    does: str


COMMANDS = {
    "from-meta": Command("convert.from_meta", "convert Meta's weights to a model folder"),
    "from-hf": Command("convert.from_hf", "convert a Hugging Face model to a model folder"),
    "quantize": Command("convert.quantize", "store a model's linears in 8 or 4 bits"),
    "to-meta": Command("convert.to_meta", "export a model folder, tuned or not, to Meta's format"),
    "to-hf": Command("convert.to_hf", "export a model folder, tuned or not, to Hugging Face's"),
    "to-gguf": Command("convert.to_gguf", "export a model folder, tuned or not, to one GGUF file"),
    "verify": Command("convert.verify", "check a model folder, alone or against its source"),
    "plan": Command(
        "train.plan.command", "estimate memory and speed for any listed GPU, no GPU required"
    ),
    "lint": Command(
        "train.data.lint.command", "check a data file, and show what a run would learn from it"
    ),
    "recipes": Command(
        "train.recipes.command", "list settings to start from, or print those of one name"
    ),
    "train": Command("train.lora", "fine-tune a model with LoRA"),
    "launch": Command("train.processes.launch", "run a command as several processes, one per GPU"),
    "prompts": Command("eval.prompts", "answer prompts with the base and the tuned model"),
    "chat": Command("eval.chat", "talk with the tuned model and its base"),
    "score": Command("eval.score", "measure how likely the models find a data file's answers"),
    "harness": Command("eval.harness.command", "ask the models the tasks of lm-evaluation-harness"),
    "report": Command("eval.report.command", "write the report of a run, as HTML and as Markdown"),
    "ablate": Command(
        "eval.ablate.command", "measure or plan what each memory technique saves and costs"
    ),
    "speed": Command("eval.speed.command", "measure the speed of training and of generation"),
    "plan-check": Command("train.plan.check", "compare predicted with measured training steps"),
    "speed-step": Command("train.speed", "measure the training step of a model of any size"),
    "speed-convert": Command("convert.speed.command", "measure conversions, beside a copy"),
    "speed-rows": Command("train.data.speed", "measure reading, tokenising and ordering of rows"),
    "sample": Command("train.sample.make", "make the bundled sample model anew"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """`jllama COMMAND ...`"""
    with to_any_reader():
        arguments = list(sys.argv[1:] if argv is None else argv)
        if not arguments or arguments[0] in ("-h", "--help"):
            console.print(overview())
        elif arguments[0] in ("-V", "--version"):
            console.print(f"jllama {importlib.metadata.version('jllama')}")
        elif arguments[0] in COMMANDS:
            importlib.import_module(COMMANDS[arguments[0]].module).main(arguments[1:])
        else:
            near = difflib.get_close_matches(arguments[0], COMMANDS, 1, 0.5)
            meant = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
            complain(f"jllama: no command {arguments[0]!r}; {meant}")
            sys.exit(2)


def overview() -> str:
    """What `jllama --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.does}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jllama COMMAND [--help] ...",
            "",
            "LoRA fine-tuning of LLaMA in JAX. Each command explains its flags with --help.",
            "",
            *lines,
            "",
            f"  {'--version':{width}}  the installed version",
        ]
    )
