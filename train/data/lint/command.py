"""`python -m train.data FILE --model DIR`: what data files hold, as training will see it.

Shows rows with their learned tokens, counts what a run would trip over, says what it costs, and
exits with 1 if something would be learned wrongly or not at all.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from jllama import bundled
from jllama.cli.command import run_command
from jllama.cli.terminal import command_line, console, print_json, quiet_if
from jllama.config import BaseChoice, Precision, Remat
from jllama.errors import AtLeast0, AtLeast1, InputError, NotNegative, Seed, SomeOf, checked
from jllama.machine import AnyCase, GpuName
from jllama.names import LINEAR_CHOICES
from jllama.text.messages import Learn
from jllama.text.prompt import PromptStyle
from jllama.text.row_file import Rows, read_sources
from jllama.text.row_formats import Sources
from jllama.text.rows import Examples, LongRows, make_examples
from jllama.text.tokenizer import Tokenizer, load_tokenizer
from train.config import TrainConfig, Tune
from train.data.batches import hold_out
from train.data.lint import findings
from train.data.lint.cost import cost, layouts, on_card
from train.data.lint.show import noted, show
from train.data.load import weighted
from train.data.view import show_row
from train.plan.cards import find_gpu, present_gpu
from train.prepare import training_batches


@checked
class LintConfig:
    """Check data files and show what would be learned; exit code 1 on a hard error."""

    data: tyro.conf.Positional[Sources] = ()
    """Rows with instruction/input/output, prompt/completion, messages, conversations or text: files
    of JSON, JSONL, CSV or Parquet, packed by gzip or not, or folders of them. A weight says how
    often an epoch has each row: a.json b.json:0.5 has half of b's. By default the bundled
    sample's."""
    model: Annotated[str, tyro.conf.arg(metavar="DIR")] = str(bundled.SAMPLE)
    """Model folder, or any folder with a tokenizer."""
    columns: Annotated[str, tyro.conf.arg(metavar="NAME=COLUMN,...")] = ""
    """What the columns are called: prompt=question,completion=answer."""
    max_rows: AtLeast0 = 0
    """Only the first rows of each file; 0 takes all."""
    prompt_style: PromptStyle = "plain"
    """How a row becomes text; saved with the adapter."""
    prompt_template: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """A chat template in Jinja, instead of the model's own; saved with the adapter."""
    max_seq_len: AtLeast1 = 512
    """Tokens a row may have, and with --packing the length of a sequence."""
    long_rows: LongRows = "cut"
    """Rows that are longer lose their end (cut), are left out (drop), or go on as further rows
    (split)."""
    learn: Learn = "all"
    """Which answers of a conversation: each one that no mark excepts, the last one, or those that
    are marked (weight 1, train true)."""
    train_on_prompt: bool = False
    """Learn the prompt as well as the answer."""
    packing: bool = False
    """Put several rows into one sequence; they do not see each other."""
    length_buckets: AtLeast1 = 1
    """Without --packing: lengths to which rows are padded, each compiled once; a step's rows are
    of one of them."""
    val_size: NotNegative = 0.0
    """Rows held out for evaluation: a share below 1, or a number."""
    val_data: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Rows for evaluation from a file of their own, instead of --val-size."""
    seed: Seed = 0
    """Seed of the adapters, the order, the dropout and the held-out rows."""

    epochs: AtLeast1 = 3
    """Passes over the data."""
    max_steps: AtLeast0 = 0
    """Optimizer steps to stop after; 0 runs all epochs."""
    micro_batch_size: AtLeast1 = 4
    """Sequences in one forward pass."""
    gradient_accumulation_steps: AtLeast1 = 4
    """Micro-batches in one optimizer step."""
    gpu: Annotated[Literal[GpuName, "present", ""], AnyCase] = ""
    """The card to predict the time for, as in plan; compiles the step for it once."""
    precision: Precision = "bf16"
    """Dtype of frozen weights and activations; what learns, its moments and the loss are fp32."""
    base: BaseChoice = "stored"
    """With --gpu: format of the frozen linears, as in training."""
    remat: Remat = "block"
    """With --gpu: what the backward pass recomputes, as in training."""
    tune: Tune = "lora"
    """What learns: adapters, or every weight (full); the result is then a model folder."""
    lora_rank: AtLeast1 = 16
    """Rank R of the adapters."""
    lora_targets: Annotated[str, SomeOf(LINEAR_CHOICES)] = "wq,wv"
    """Linears that get an adapter: wq,wk,wv,wo,w1,w2,w3 (or q_proj, ...), or all."""

    show: AtLeast0 = 3
    """Rows to show."""
    picture: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Also draw the lengths of rows: FILE.svg or FILE.png."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self):
        training = self.training
        object.__setattr__(self, "data", training.data)
        object.__setattr__(self, "prompt_style", training.prompt_style)
        if self.picture and Path(self.picture).suffix.lower() not in (".svg", ".png"):
            raise InputError(f"--picture {self.picture}: expected a name that ends in .svg or .png")
        if not Path(self.picture).parent.is_dir():
            raise InputError(f"{Path(self.picture).parent}: no such folder for --picture")

    @property
    def training(self) -> TrainConfig:
        """The settings of the run that is looked at."""
        names = {field.name for field in dataclasses.fields(TrainConfig)}
        given = {name: value for name, value in vars(self).items() if name in names}
        return TrainConfig(**given | {"data": self.data or (str(bundled.ROWS),)})


def lint(config: LintConfig) -> None:
    """Prints the view and what was found.

    Raises:
        InputError: if the files cannot be read at all.
    """
    training = config.training
    tokenizer = load_tokenizer(config.model, config.prompt_template)
    with quiet_if(config.json):
        found, examples, lengths = find(config, training, tokenizer)
    if config.picture:
        from train.data.lint.picture import lengths_picture  # matplotlib takes its time

        file = Path(config.picture)
        lengths_picture(lengths, examples.learned_counts, config.max_seq_len, file)
    if config.json:
        print_json(found)
    else:
        for example in itertools.islice(examples, config.show):
            show_row(example, tokenizer)
        show(found)
    if found["errors"]:
        sys.exit(1)
    if config.json:
        return
    console.print(f"{found['rows']:,} rows, no errors")
    model = "DIR" if config.model == str(bundled.SAMPLE) else config.model
    flags = ["--model", model, "--data", *training.data, *_flags(config, training)]
    console.print("next: " + command_line("train", *flags))


def find(
    config: LintConfig, training: TrainConfig, tokenizer: Tokenizer
) -> tuple[dict[str, Any], Examples, np.ndarray]:
    """All that is found, as `--json` prints it; the examples; and the tokens of whole rows.

    Args:
        training: `config.training`.
    """
    rows, examples, problems = _examples(training, training.data, tokenizer, training.max_rows)
    if training.val_data:
        _, held_out, more = _examples(training, (training.val_data,), tokenizer)
        learned, problems = examples, problems + more
    else:
        learned, held_out = hold_out(examples, training.val_size, training.seed)
    seen = findings.look_at(rows, tokenizer)
    lengths = findings.whole_lengths(rows, examples, tokenizer, training)
    borders, errors = findings.borders(examples, tokenizer)
    leaking, asked = findings.leaks(learned, held_out)
    if problems:
        errors = [f"{len(problems)} rows with nothing to learn", *errors]
    if leaking:
        first = leaking[: findings.FIRST]
        errors.append(f"{len(leaking)} held-out rows are also trained on: {first}")
    warnings = {note: noted(numbers) for note, numbers in examples.notes.items()}
    if asked:
        warnings["are held out, and asked in training with another answer"] = noted(asked)
    cut = lengths[lengths > training.max_seq_len] if examples.cut.any() else lengths[:0]
    batches = training_batches(training, learned)
    costs = cost(learned, training, batches)
    if config.gpu:
        present = config.gpu == "present"
        gpu = present_gpu() if present else find_gpu(config.gpu)
        model = bundled.MODEL if config.model == str(bundled.SAMPLE) else config.model
        planned = dataclasses.replace(training, model=model)
        costs["card"] = on_card(costs["positions"], planned, batches, gpu, present)
    return (
        {
            "rows": len(rows),
            "examples": len(examples),
            "held_out": len(held_out),
            "kinds": dict(seen.kinds.most_common()),
            "ignored_columns": dict(seen.ignored),
            "answers": {str(n): seen.answers[n] for n in sorted(seen.answers)},
            "tokens": findings.token_figures(examples),
            "histogram": findings.histogram(lengths),
            "unusable": noted(problems),
            "borders": borders,
            "duplicates": findings.copies(examples),
            "truncated": {
                "rows": len(cut),
                "tokens": int((cut - training.max_seq_len).sum()),
                "longest": int(lengths.max()),
            },
            "leaks": noted(leaking),
            "special_tokens": {
                name: {
                    "rows": count,
                    "known": name in tokenizer.specials,
                    "read_as": [tokenizer.piece(token) for token in tokenizer.encode(name)],
                }
                for name, count in seen.specials.most_common(findings.FIRST)
            },
            "layouts": layouts(learned, training),
            "cost": costs,
            "warnings": warnings,
            "errors": errors,
            "settings": dataclasses.asdict(config),
        },
        examples,
        lengths,
    )


def _examples(
    config: TrainConfig, sources: Sequence[str], tokenizer: Tokenizer, max_rows: int = 0
) -> tuple[Rows, Examples, list[str]]:
    """The rows of files, the usable ones as training takes them, and what is wrong with others."""
    rows, counts = read_sources(sources, config.columns, max_rows)
    examples, problems = make_examples(
        rows,
        tokenizer,
        config.prompt_style,
        max_seq_len=config.max_seq_len,
        train_on_prompt=config.train_on_prompt,
        skip_bad_rows=len(rows),
        source=", ".join(sources),
        learn=config.learn,
        long_rows=config.long_rows,
    )
    return rows, weighted(examples, sources, counts), problems


def _flags(config: LintConfig, training: TrainConfig) -> Iterator[str]:
    """Those of training that are not as they are by default."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if hasattr(training, field.name) and field.name not in ("data", "model"):
            if value is True:
                yield f"--{field.name.replace('_', '-')}"
            elif value != field.default:
                shown = f"{value:g}" if isinstance(value, float) else str(value)
                yield from (f"--{field.name.replace('_', '-')}", shown)


def main(argv: Sequence[str] | None = None) -> None:
    run_command(lint, LintConfig, argv, name="lint")
