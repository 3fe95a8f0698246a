"""`python -m eval.score`: how likely the base and the tuned model find the answers of a data file.

All in nats, over the tokens that training learns from (the answer and its end token):

    NLL    -log p(token), summed over a row or the file; per token it is the sum over the count, so
           long answers weigh more; perplexity = exp(NLL per token)
    KL     KL(tuned || base) = sum over v of p_tuned(v) (log p_tuned(v) - log p_base(v)), the mean
           over the same tokens: how far tuning has moved what the model would say
    exact  share of the short answers that greedy decoding gives to the letter and then stops
    neutral  NLL of text that has nothing to do with any tuning (neutral.json), every token but the
           first; its rise from base to tuned is a sign of forgetting

The network runs in --precision; logits and log-softmax are fp32, sums over tokens fp64.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

import jllama
from eval.exact import exact_answers, short_answers
from eval.likelihood import Learned, Score, count_batches, score_sequences
from eval.subject import Subject, load_voices, resolve
from jllama.cli.command import run_command
from jllama.cli.terminal import Progress, console, print_json, quiet_if, show_table
from jllama.errors import AtLeast0, AtLeast1, InputError, checked
from jllama.folders.adapter import weights_file
from jllama.folders.json_files import read_json
from jllama.folders.manifest import file_sha256, manifest_sha256, write_sealed
from jllama.folders.model import read_config
from jllama.folders.run import SCORES, RunFolder
from jllama.text.messages import Learn
from jllama.text.row_file import read_sources
from jllama.text.row_formats import Sources, several, source_of
from jllama.text.rows import LongRows, make_examples
from jllama.text.tokenizer import tokenizer_sha256

NEUTRAL = Path(__file__).parent / "neutral.json"
# Rows of the table, and where their figures stand in the result of a model.
SHOWN = {
    "NLL per token (nats)": ("answers", "nll_per_token"),
    "perplexity": ("answers", "perplexity"),
    "KL(tuned || base) per token (nats)": ("answers", "kl_per_token"),
    "exact short answers": ("exact", "share"),
    "NLL per token of neutral text (nats)": ("neutral", "nll_per_token"),
}


Part = Literal["held-out", "training", "all"]


@checked
class ScoreConfig(Subject):
    """Score the answers of a data file with the base and the tuned model.

    Without --run and --model, of the newest run. Only answers are scored, also of a run that
    learned its prompts.
    """

    data: Sources = ()
    """Rows as for training; by default those of the run."""
    columns: Annotated[str, tyro.conf.arg(metavar="NAME=COLUMN,...")] = ""
    """What the columns are called: prompt=question,completion=answer; by default as in the run."""
    max_rows: AtLeast0 = 0
    """Only the first rows of each file; 0 takes as many as the run, else all."""
    long_rows: LongRows | None = None
    """Rows that are longer are cut, left out (drop) or go on as further rows (split); by default as
    in the run, else cut."""
    learn: Learn | None = None
    """Which answers of a conversation are scored; by default those that the run learned, else
    all."""
    rows: Part | None = None
    """Which rows of the run's own data: those it held out, those it learned from, or all. By
    default those held out, if there are any."""
    max_seq_len: AtLeast0 = 0
    """Tokens after which a row is cut; 0 takes the run's, else 512."""
    skip_bad_rows: AtLeast0 = 0
    """Rows without an answer that may be left out; at least as many as in the run."""
    exact_tokens: AtLeast0 = 32
    """Longest answer, in tokens with its end, that greedy decoding is asked for; 0 asks none."""
    batch_size: AtLeast1 = 8
    """Rows at a time."""
    limit: AtLeast0 = 0
    """Only the first rows; 0 takes all."""
    json: bool = False
    """Print one JSON object instead of a table."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Where to write that object; by default score.json in the run folder, else here (with --json
    nowhere)."""


# What a run's settings say otherwise.
_DEFAULTS: Mapping[str, Any] = {
    "max_seq_len": 512, "skip_bad_rows": 0, "columns": "", "long_rows": "cut", "learn": "all",
    "max_rows": 0, "data": "", "val_data": "",
}  # fmt: skip


def complete(config: ScoreConfig) -> ScoreConfig:
    """The settings with what the run and the passport say filled in; pairs that do not fit refused.

    Raises:
        InputError: if there is no such run, or base and tuned are of different kinds.
    """
    if config.model and not config.data:
        raise InputError("--model without --data; give the rows to score")
    config, run = resolve(config)
    if config.tuned:
        _check_tuned(config.model, config.tuned)
    settings: dict[str, Any] = dict(_DEFAULTS) | run
    data, val_data = several(settings["data"]), several(settings["val_data"])
    own = not config.data or _paths(config.data) in (_paths(data), _paths(val_data))
    chosen = config.data or data
    if not config.data and val_data:  # the two parts lie in a file each
        if config.rows in (None, "held-out"):
            chosen = val_data
        config = dataclasses.replace(config, rows="all")
    record: Any = RunFolder(Path(config.run)).read_record() if run else {"data": {}}
    parted = own and bool(record["data"].get("held_out"))
    if config.rows not in (None, "all") and not parted:
        why = f"{config.run} held no rows out" if own else "that data is not the run's"
        raise InputError(f"--rows {config.rows}: {why}")
    return dataclasses.replace(
        config,
        data=chosen,
        columns=config.columns or (settings["columns"] if own else ""),
        max_rows=config.max_rows or (settings["max_rows"] if chosen == data else 0),
        long_rows=config.long_rows or settings["long_rows"],
        learn=config.learn or settings["learn"],
        rows=config.rows or ("held-out" if parted else "all"),
        max_seq_len=config.max_seq_len or settings["max_seq_len"],
        skip_bad_rows=max(config.skip_bad_rows, settings["skip_bad_rows"]),
    )


def _paths(sources: Sequence[str]) -> list[Path]:
    return [source_of(source).path.resolve() for source in sources]


def _check_tuned(model: str, tuned: str) -> None:
    """Two models are compared token by token, so they must share sizes and tokenizer."""
    configs = [read_config(folder) for folder in (model, tuned)]
    tokenizers = [tokenizer_sha256(folder) for folder in (model, tuned)]
    if configs[0] != configs[1] or tokenizers[0] != tokenizers[1]:
        what = "sizes" if configs[0] != configs[1] else "tokenizer"
        raise InputError(f"{tuned} and {model} differ in {what}; give the base that was tuned")


def measure(config: ScoreConfig) -> dict[str, Any]:
    """The JSON object of a config that `complete` gave.

    The figures at the top are those of the model that `scored` names: the tuned one, if any.

        {"nll_per_token": 0.5, "tokens": 900, "rows": 60, "part": "held-out", "scored": "tuned",
         "tuned_sha256": "...", "cut": 0, "skipped": [],
         "base": {...},
         "tuned": {"answers": {"tokens": 900, "nll": 450.0, "nll_per_token": 0.5,
                               "perplexity": 1.6, "kl_per_token": 0.9},
                   "exact": {"rows": 58, "share": 0.8},
                   "neutral": {...}},
         "settings": {...},
         "per_row": [{"row": 0, "cut": false, "base": {...}, "tuned": {...}}, ...]}
    """
    assert config.prompt_style
    tokenizer = jllama.load_tokenizer(config.model, config.prompt_template)
    assert config.long_rows
    assert config.learn
    rows, _ = read_sources(config.data, config.columns, config.max_rows)
    if config.rows == "all":
        rows = rows[: config.limit or None]
    examples, skipped = make_examples(
        rows, tokenizer, config.prompt_style, max_seq_len=config.max_seq_len,
        train_on_prompt=False, skip_bad_rows=config.skip_bad_rows, source=", ".join(config.data),
        learn=config.learn, long_rows=config.long_rows,
    )  # fmt: skip
    if config.rows != "all":
        held = np.isin(examples.rows, RunFolder(Path(config.run)).read_record()["data"]["held_out"])
        examples = examples.take(held if config.rows == "held-out" else ~held)
        examples = examples.take(slice(config.limit or None))
    paragraphs = [
        [tokenizer.bos_id, *tokenizer.encode(text)] for text in read_json(NEUTRAL)["paragraphs"]
    ]
    sequences: list[Learned] = [(example.ids, example.learned) for example in examples]
    sequences += [(ids, [True] * len(ids)) for ids in paragraphs]
    voices = load_voices(config)
    context = voices["base"][0].config.max_seq_len
    short = short_answers(
        rows, examples, tokenizer, config.prompt_style, most=config.exact_tokens, context=context
    )
    total = count_batches(sequences, config.batch_size)
    total += len(voices) * -(-len(short) // config.batch_size)
    with Progress("score", total, "batches") as progress:
        scores = score_sequences(voices, sequences, config.batch_size, progress.advance)
        exact = {
            who: exact_answers(
                voice, short, tokenizer, config.exact_tokens, config.batch_size, progress.advance
            )
            for who, voice in voices.items()
        }
    answers, neutral = scores[: len(examples)], scores[len(examples) :]
    found = {
        who: {
            "answers": rates(who, answers),
            "exact": share(exact[who]),
            "neutral": rates(who, neutral),
        }
        for who in voices
    }
    last = list(voices)[-1]
    return {
        "nll_per_token": found[last]["answers"]["nll_per_token"],
        "tokens": found[last]["answers"]["tokens"],
        "rows": len(examples),
        "part": config.rows,
        "scored": last,
        "tuned_sha256": result_sha256(config.adapter or config.tuned),
        "cut": int(examples.cut.sum()),
        "skipped": skipped,
        **found,
        "settings": dataclasses.asdict(config),
        "per_row": [
            {"row": example.row, "cut": example.cut}
            | {who: rates(who, [score]) | {"exact": exact[who].get(example.row)} for who in voices}
            for example, score in zip(examples, answers, strict=True)
        ],
    }


def result_sha256(folder: str | Path) -> str:
    """Of an adapter's weights, or of a model folder's certificate; empty of none."""
    if not folder:
        return ""
    file = weights_file(folder)
    return file_sha256(file) if file.is_file() else manifest_sha256(folder)


def share(right: Mapping[int, bool]) -> dict[str, Any]:
    """How many rows were asked, and the share that was right; None of none."""
    rows = len(right)
    return {"rows": rows, "share": sum(right.values()) / rows if rows else None}


def rates(who: str, scores: Sequence[Score]) -> dict[str, Any]:
    """Sums and token-weighted means of one model; for the tuned one with its KL from the base."""
    tokens = sum(score.tokens for score in scores)
    nll = math.fsum(score.nll[who] for score in scores)
    found = {"tokens": tokens, "nll": nll, "nll_per_token": nll / tokens}
    found["perplexity"] = math.exp(min(nll / tokens, 700))  # a float ends soon after
    if who == "tuned":
        found["kl_per_token"] = math.fsum(score.kl for score in scores) / tokens
    return found


def show(result: Mapping[str, Any]) -> None:
    """The figures of the models side by side, and what tuning changed."""
    models = [who for who in ("base", "tuned") if who in result]
    rows = []
    for title, (part, name) in SHOWN.items():
        values = [result[who][part].get(name) for who in models]
        known = [value for value in values if value is not None]
        if known:
            cells = ["" if value is None else f"{value:.4f}" for value in values]
            both = len(known) > 1
            change = [f"{known[1] - known[0]:+.4f}" if both else ""] if len(models) > 1 else []
            rows.append([title, *cells, *change])
    show_table(["", *models, *(["change"] if len(models) > 1 else [])], rows)
    console.print(
        f"{rows_scored(result)}, {result['tokens']} answer tokens; {result['cut']} rows cut at "
        f"{result['settings']['max_seq_len']} tokens, {len(result['skipped'])} left out"
    )


def rows_scored(result: Mapping[str, Any]) -> str:
    """`40 held-out rows`, `the first 10 rows`."""
    words = "rows" if result["part"] == "all" else f"{result['part']} rows"
    return f"{'the first ' if result['settings']['limit'] else ''}{result['rows']} {words}"


def score_data(config: ScoreConfig) -> None:
    """Scores, writes and shows."""
    asked, config = config, complete(config)
    output = Path(asked.output) if asked.output else Path(config.run) / SCORES
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder; --output wants a file in a folder")
    with quiet_if(config.json):
        result = measure(config)
    print_json(result) if config.json else show(result)
    if asked.output or not config.json:
        write_sealed(output, result)
    if not config.json:
        console.print(f"wrote {output}")


def main(argv: Sequence[str] | None = None) -> None:
    run_command(score_data, ScoreConfig, argv, name="score")


if __name__ == "__main__":
    main()
