"""`python -m eval.harness`: the tasks of lm-evaluation-harness for the base and the tuned model.

Both are asked the same requests, from one load and one compilation: the adapter's scale is an
argument. Writes harness.json (results.py).
"""

import dataclasses
import difflib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from eval.harness.results import show, side_by_side
from eval.score import result_sha256
from eval.subject import Subject, load_voices, resolve
from jllama.cli.command import run_command
from jllama.cli.terminal import console
from jllama.errors import AtLeast0, AtLeast1, InputError, checked
from jllama.folders.manifest import write_sealed
from jllama.folders.run import HARNESS
from jllama.machine import installed_version

SEEDS = 0, 1234  # of Python and NumPy: lm_eval's own defaults, which draw the few-shot examples
UNTIL = "generate_until"
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", UNTIL)


@checked
class HarnessConfig(Subject):
    """Ask the base and the tuned model the tasks of lm-evaluation-harness.

    Without --run and --model, of the newest run. Needs the extra `lm-eval`. A task downloads its
    rows from the Hugging Face hub unless it names files of its own.
    """

    tasks: Annotated[str, tyro.conf.arg(metavar="NAME,...")] = ""
    """Tasks, groups or tags, as `lm_eval ls tasks` lists them, with commas between."""
    include_path: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """A folder with further tasks, as YAML."""
    num_fewshot: AtLeast0 | None = None
    """Examples before each question; by default what the task says. A task that says 0 keeps it."""
    limit: AtLeast0 = 0
    """Only the first rows of each task; 0 takes all."""
    apply_chat_template: bool = False
    """Ask in the chat template that the adapter brings, else in the model's own."""
    batch_size: AtLeast1 = 8
    """Requests at a time."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Where to write; by default harness.json in the run folder, else here."""


def harness(config: HarnessConfig) -> None:
    """Asks, writes and shows.

    Raises:
        InputError: if lm_eval is not installed, a task is not known or wants what jllama has not,
            or the models cannot be loaded.
    """
    if config.prompt_style not in (None, "chat"):
        raise InputError(
            f"--prompt-style {config.prompt_style}: a task writes its own prompts; "
            "--apply-chat-template asks in the style of the training"
        )
    if not config.tasks:
        raise InputError("--tasks wants the names of tasks, as --tasks hellaswag,arc_easy")
    if config.include_path and not Path(config.include_path).is_dir():
        raise InputError(f"--include-path {config.include_path}: no such folder")
    need_lm_eval()
    config, _ = resolve(config)
    output = Path(config.output) if config.output else Path(config.run) / HARNESS
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder; --output wants a file in a folder")
    results = evaluate(config, load_tasks(config))
    lines = side_by_side(results)
    write_sealed(output, {
        "tuned_sha256": result_sha256(config.adapter or config.tuned),
        "lm_eval": installed_version("lm_eval"),
        "results": lines,
        "settings": dataclasses.asdict(config),
    })  # fmt: skip
    show(lines, list(results))
    console.print(f"wrote {output}")


def need_lm_eval() -> None:
    """Raises InputError if lm_eval is not installed."""
    if not installed_version("lm_eval"):
        raise InputError(
            "this needs lm-evaluation-harness, which is not installed: "
            "pip install 'jllama[lm-eval]'"
        )


def load_tasks(config: HarnessConfig) -> dict[str, Any]:
    """The tasks with their rows, as `lm_eval.evaluate` takes them.

    Raises:
        InputError: as for `harness`.
    """
    from lm_eval.tasks import TaskManager

    names = list(dict.fromkeys(name.strip() for name in config.tasks.split(",")))
    given = {"include_path": config.include_path or None}
    manager = TaskManager(**given, include_defaults=False)
    if not {*names} <= {*manager.all_subtasks}:  # the index of theirs, 14,000, takes seconds
        manager = TaskManager(**given)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 1, 0.5)
            meant = f"did you mean {near[0]}?" if near else "lm_eval ls tasks lists all"
            raise InputError(f"--tasks: no task {name!r}; {meant}")
    loaded = manager.load(names)
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE not in REQUESTS or getattr(task, "MULTIMODAL", False):
            raise InputError(f"task {name} asks for {task.OUTPUT_TYPE}; jllama answers text alone")
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"task {name} runs what a model has written as code; leave it out")
        few = task.get_config("num_fewshot")
        if few is None or (few and config.num_fewshot is not None):
            task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
    return loaded


def evaluate(config: HarnessConfig, tasks: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `lm_eval.evaluate` says of each model: "base", and "tuned" if something was tuned."""
    import lm_eval

    from eval.harness.backend import JllamaLM, texts_of

    names = ["base", "tuned"] if config.adapter or config.tuned else ["base"]
    texts = {who: texts_of(config, who) for who in names}
    if config.apply_chat_template and not all(x.tokenizer.template for x in texts.values()):
        raise InputError(
            f"--apply-chat-template: {config.adapter or config.model} has no chat template; give "
            "--prompt-template FILE"
        )
    results = {}
    for who, voice in load_voices(config).items():
        random.seed(SEEDS[0])
        np.random.seed(SEEDS[1])
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(seed=SEEDS[1])
        results[who] = lm_eval.evaluate(
            lm=JllamaLM(who, voice, texts[who], config.batch_size),
            task_dict=tasks,
            limit=config.limit or None,
            log_samples=False,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.apply_chat_template,
        )
    return results


def main(argv: Sequence[str] | None = None) -> None:
    run_command(harness, HarnessConfig, argv, name="harness")


if __name__ == "__main__":
    main()
