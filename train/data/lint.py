"""`python -m train.data FILE --model DIR`: what a data file holds, as training will see it.

Shows rows with their learned tokens, counts what a run would trip over, and exits with 1 if
something would be learned wrongly or not at all.
"""

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import tyro

from jllama import bundled
from jllama.cli.command import run_command
from jllama.cli.terminal import command_line, console, show_table
from jllama.errors import AtLeast0, AtLeast1, InputError, NotNegative, Seed, checked
from jllama.text.messages import Learn, ignored
from jllama.text.prompt import PromptStyle, chat_style
from jllama.text.row_file import read_rows
from jllama.text.rows import Examples, LongRows, make_examples
from jllama.text.tokenizer import Tokenizer, load_tokenizer
from train.data.batches import Batches, hold_out
from train.data.view import show_row


@checked
class LintConfig:
    """Check a data file and show what would be learned; exit code 1 on a hard error."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")] = str(bundled.ROWS)
    """Rows, as for training; by default the bundled sample's."""
    model: Annotated[str, tyro.conf.arg(metavar="DIR")] = str(bundled.SAMPLE)
    """Model folder, or any folder with a tokenizer.model."""
    columns: Annotated[str, tyro.conf.arg(metavar="NAME=COLUMN,...")] = ""
    """What the columns are called: prompt=question,completion=answer."""
    max_rows: AtLeast0 = 0
    """Only the first rows; 0 takes all."""
    prompt_style: PromptStyle = "plain"
    """How a row becomes text."""
    prompt_template: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """A chat template in Jinja, instead of the model's own."""
    max_seq_len: AtLeast1 = 512
    """Tokens a row may have."""
    long_rows: LongRows = "cut"
    """Rows that are longer are cut, left out (drop) or go on as further rows (split)."""
    learn: Learn = "all"
    """Which answers of a conversation: all, the last one, or those that are marked (weighted)."""
    train_on_prompt: bool = False
    """Learn the prompt as well as the answer."""
    val_size: NotNegative = 0.0
    """Rows held out, as in training: checked for leaks."""
    seed: Seed = 0
    """Seed of the held-out rows."""
    show: AtLeast0 = 3
    """Rows to show."""

    def __post_init__(self):
        if self.prompt_template:
            object.__setattr__(self, "prompt_style", chat_style(self.prompt_style))


def lint(config: LintConfig) -> None:
    """Prints the view and the counts.

    Raises:
        InputError: if the file cannot be read at all.
    """
    tokenizer = load_tokenizer(config.model, config.prompt_template)
    rows = read_rows(config.file, config.columns)[: config.max_rows or None]
    examples, skipped = make_examples(
        rows,
        tokenizer,
        config.prompt_style,
        max_seq_len=config.max_seq_len,
        train_on_prompt=config.train_on_prompt,
        skip_bad_rows=len(rows),
        source=config.file,
        learn=config.learn,
        long_rows=config.long_rows,
    )
    for example in itertools.islice(examples, config.show):
        show_row(example, tokenizer)
    training, held_out = hold_out(examples, config.val_size, config.seed)
    show_lengths(examples)
    show_plans(training, config.max_seq_len, config.seed)

    errors = [f"{len(skipped)} rows with nothing to learn"] if skipped else []
    for problem in skipped:
        console.print(f"  {problem}")
    errors += special_token_errors(examples, tokenizer)
    held = {example.ids.tobytes() for example in held_out}
    seen = {ids for example in training if (ids := example.ids.tobytes()) in held}
    leaking = [example.row for example in held_out if example.ids.tobytes() in seen]
    if leaking:
        errors.append(f"{len(leaking)} held-out rows are also trained on: {leaking[:10]}")
    copies = [n for n in Counter(example.ids.tobytes() for example in examples).values() if n > 1]
    console.print(f"duplicates: {len(copies)} rows occur more than once")
    console.print(f"truncated: {examples.cut.sum()} rows lose their end at {config.max_seq_len}")
    for name, count in ignored_columns(rows).items():
        console.print(f"ignored: column '{name}' of {count:,} rows")
    for note, noted in examples.notes.items():
        console.print(f"warning: {len(noted):,} rows {note}: {list(noted[:10])}")
    for error in errors:
        console.print(f"error: {error}")
    if errors:
        sys.exit(1)
    console.print(f"{len(rows):,} rows, no errors")
    style = [] if config.prompt_style == "plain" else ["--prompt-style", config.prompt_style]
    model = "DIR" if config.model == str(bundled.SAMPLE) else config.model
    console.print("next: " + command_line("train", "--model", model, "--data", config.file, *style))


def ignored_columns(rows: Sequence[Mapping]) -> Counter[str]:
    """Columns that nothing is made of, and in how many of the rows that can be read."""
    found: Counter[str] = Counter()
    for row in rows:
        with contextlib.suppress(InputError):
            found.update(ignored(row))
    return found


def show_lengths(examples: Examples) -> None:
    """Tokens of prompts, answers and rows."""
    rows = []
    totals, answers = examples.lengths, examples.learned_counts
    for name, counts in ("not learned", totals - answers), ("learned", answers), ("row", totals):
        figures = (counts.min(), np.median(counts), counts.mean(), counts.max(), counts.sum())
        rows.append([name, *(f"{figure:,.0f}" for figure in figures)])
    show_table(["tokens", "least", "median", "mean", "most", "in all"], rows)


def show_plans(examples: Examples, max_seq_len: int, seed: int) -> None:
    """How much of an epoch is padding, row by row, in three lengths, and packed."""
    plans: dict[str, dict[str, Any]] = {
        "padded": {"packing": False},
        "--length-buckets 3": {"packing": False, "length_buckets": 3},
        "--packing": {"packing": True},
    }
    for name, plan in plans.items():
        batches = Batches(
            examples, accumulation=1, batch=1, max_seq_len=max_seq_len, shuffle=True, seed=seed,
            epochs=1, **plan,
        )  # fmt: skip
        console.print(
            f"{name}: {len(batches):,} sequences of "
            f"{' or '.join(map(str, batches.lengths))} tokens, "
            f"{100 * batches.padding_share():.0f} % padding"
        )


def special_token_errors(examples: Examples, tokenizer: Tokenizer) -> list[str]:
    """Rows with no or several BOS for a conversation's start, or learned rows without an end."""
    begins, doubled, bos, ends = [], [], 0, 0
    for example in examples:
        is_bos = example.ids == tokenizer.bos_id
        bos += int(np.count_nonzero(is_bos))
        last = example.ids[np.flatnonzero(example.learned)[-1]]  # a template may write on behind it
        ends += int(last) in tokenizer.stop_ids
        if not is_bos[0]:
            begins.append(example.row)
        if np.any(is_bos[:-1] & is_bos[1:]):
            doubled.append(example.row)
    console.print(f"BOS: {bos:,} in {len(examples):,} rows; {ends:,} rows end in a stop token")
    errors = [f"{len(begins)} rows without BOS: {begins[:10]}"] if begins else []
    return errors + ([f"{len(doubled)} rows with BOS twice: {doubled[:10]}"] if doubled else [])


def main(argv: Sequence[str] | None = None) -> None:
    run_command(lint, LintConfig, argv, name="lint")
