"""`python -m eval.prompts`: answers prompts with the base and the tuned model, side by side.

Both come from one load and one compilation: the adapter's scale is an argument, 0 or 1. (With
--merge the tuned answers are compiled again; a run that tuned every weight left a second model,
which is loaded after the first has answered.) Writes `generations.jsonl`, one object a prompt:

    {"prompt": "...", "base": "...", "base_ids": [...], "base_stopped": true,
     "base_score": {"tokens": 12, "nll_per_token": {"base": 0.4, "tuned": 1.9},
                    "kl_per_token": 0.8},
     "tuned": "...", ...}

`stopped` tells an answer that ended itself from one that was cut, which never counts as exact; a
score says how likely (NLL, nats) both models find that answer, and how far the tuned one is from
the base along it. Answers are written before they are scored.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

import jllama
from eval.likelihood import score_sequences
from eval.prompt_file import read_prompts, read_references
from eval.subject import Subject, Voices, is_of_sample, load_on_mesh, load_voices, resolve
from jllama import bundled
from jllama.cli.command import run_command
from jllama.cli.terminal import Progress, console, show_table
from jllama.decode.sampling import Likeliest
from jllama.errors import AtLeast0, AtLeast1, InputError, NotNegative, Seed, checked
from jllama.folders.json_files import write_json_lines
from jllama.folders.model import read_config
from jllama.folders.run import GENERATIONS
from jllama.lora import merge
from jllama.text.messages import row_messages
from jllama.text.tokenizer import Tokenizer

REPORT_PROMPTS = Path(__file__).parent / "report_prompts.json"


@checked
class PromptsConfig(Subject):
    """Answer prompts with the base and the tuned model.

    Without --run and --model, of the newest run. The prompts are the original report's eight; for
    a run on the bundled sample they are its held-out instructions, decoded greedily.
    """

    merge: bool = False
    """Fold the adapter into the base weights before the tuned answers. Saves two small products for
    every adapted weight and token; costs a second compilation and, in bf16, a rounding of the sum,
    by which answers may differ."""
    prompts: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """JSON or JSONL rows as for training (their answers are compared with), or prompts."""
    reference: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """JSON rows with recorded answers, shown as further columns."""
    temperature: NotNegative | None = None
    """0 takes the likeliest token; by default what the prompts' file says, else 0.6."""
    top_p: Likeliest | None = None
    """Share of probability sampled from; by default what the prompts' file says, else 0.9."""
    max_new_tokens: AtLeast1 | None = None
    """Tokens of an answer; by default what the prompts' file says, else 128."""
    seed: Seed | None = None
    """Seed of the samples; by default what the prompts' file says, else 1."""
    batch_size: AtLeast1 = 16
    """Prompts answered at a time."""
    limit: AtLeast0 = 0
    """Only the first prompts; 0 takes all."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Where to write; by default generations.jsonl in the run folder, else here."""


def answer_prompts(config: PromptsConfig) -> None:
    """Generates, writes and shows the answers."""
    config, settings = resolve(config)
    if is_of_sample(settings) and not config.prompts:
        config = with_sample(config)
    assert config.prompt_style
    if config.merge and not config.adapter:
        raise InputError("--merge, but no adapter to fold in; name one with --adapter or a LoRA "
                         "run with --run")  # fmt: skip
    output = Path(config.output) if config.output else Path(config.run) / GENERATIONS
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder; --output wants a file in a folder")
    references = read_references(config.reference) if config.reference else {}
    tokenizer = jllama.load_tokenizer(config.model, config.prompt_template)
    prompts = read_prompts(
        config.prompts or REPORT_PROMPTS,
        tokenizer,
        config.prompt_style,
        context=min(read_config(x).max_seq_len for x in (config.model, config.tuned) if x),
        flags=vars(config),
        limit=config.limit,
    )
    names = ["base", "tuned"] if config.adapter or config.tuned else ["base"]
    answers: dict[str, list[list[int]]] = {name: [] for name in names}
    starts = range(0, len(prompts.ids), config.batch_size)
    voices: Voices = {}
    with Progress("answer", len(starts) * len(answers), "batches") as progress:
        for model, scales in models(config):
            if len(scales) == len(names):
                voices = {name: (model, scale) for name, scale in scales.items()}
            for start, (name, scale) in itertools.product(starts, scales.items()):
                chosen = slice(start, start + config.batch_size)
                answers[name] += jllama.generate(
                    model,
                    prompts.ids[chosen],
                    prompts.budgets[chosen],
                    prompts.decoding,
                    seed=prompts.decoding.seed,
                    stop_ids=tokenizer.stop_ids,
                    adapter_scale=scale,
                )
                progress.advance()
            del model  # before the next one is loaded
    generations = [
        shown | references.get(shown["prompt"].strip(), {})
        for shown in described(prompts.rows, answers, tokenizer)
    ]
    # Scoring may hold two models and find no memory for them.
    unscored = output.with_suffix(f".unscored{output.suffix}")
    write_json_lines(unscored, generations)
    console.print(f"wrote {unscored}; scoring the answers")
    scores = score_answers(voices or load_voices(config), prompts.ids, answers, config.batch_size)
    for index, generation in enumerate(generations):
        generation |= {f"{name}_score": scores[name][index] for name in names}
    write_json_lines(output, generations)
    unscored.unlink()
    show(generations, names)
    console.print(f"wrote {output}")


def described(
    rows: Sequence[dict], answers: Mapping[str, Sequence[list[int]]], tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """A line of the file for each prompt, without scores."""
    for index, row in enumerate(rows):
        messages = row_messages(row)
        last = messages.pop() if messages[-1].role == "assistant" else None
        right = last and (
            json.dumps(last.calls, ensure_ascii=False) if last.calls else last.content
        )
        asked = (message for message in messages if message.role in ("user", "text"))
        parts = (part for message in asked for part in (message.content, message.context))
        line: dict[str, Any] = {"prompt": "\n".join(filter(None, parts))}
        for name, ids in answers.items():
            kept = [token for token in ids[index] if token not in tokenizer.stop_ids]
            line |= {
                name: tokenizer.decode(kept).strip(),
                f"{name}_ids": ids[index],
                f"{name}_stopped": len(kept) < len(ids[index]),
            }
        yield line if right is None else line | {"expected": right}


def score_answers(
    voices: Voices, prompts: list[list[int]], answers: dict[str, list[list[int]]], batch_size: int
) -> dict[str, list[dict[str, Any]]]:
    """For each answer how likely both models find it; unmerged adapters, also with --merge."""
    found = {}
    for name, ids in answers.items():
        sequences = [
            ([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
            for prompt, answer in zip(prompts, ids, strict=True)
        ]
        found[name] = [
            {
                "tokens": score.tokens,
                "nll_per_token": {who: nll / score.tokens for who, nll in score.nll.items()},
                "kl_per_token": score.kl / score.tokens,
            }
            if score.tokens
            else {"tokens": 0}
            for score in score_sequences(voices, sequences, batch_size, lambda: None)
        ]
    return found


def models(config: PromptsConfig) -> Iterator[tuple[jllama.Llama, dict[str, float]]]:
    """Each model in turn; for the names that it answers under, the scale of its adapter.

    an adapter      ->  (the two, {"base": 0, "tuned": 1})
    --merge         ->  (the two, {"base": 0}), (merged, {"tuned": 1})
    a second model  ->  (the first, {"base": 0}), (the second, {"tuned": 1})
    """
    model = load_on_mesh(config, config.model, config.asked_base)
    if config.adapter:
        jllama.load_adapter(model, config.adapter)
    if config.adapter and not config.merge:
        yield model, {"base": 0.0, "tuned": 1.0}
        return
    yield model, {"base": 0.0}
    if config.merge:
        merge(model)
        yield model, {"tuned": 1.0}
    if config.tuned:
        del model
        yield load_on_mesh(config, config.tuned), {"tuned": 1.0}


def with_sample(config: PromptsConfig) -> PromptsConfig:
    """The bundled sample's held-out instructions, greedily and shortly answered unless asked."""
    return replace(
        config,
        prompts=str(bundled.HELD_OUT),
        temperature=0.0 if config.temperature is None else config.temperature,
        max_new_tokens=config.max_new_tokens or 32,
    )


def show(generations: Sequence[dict], models: Sequence[str]) -> None:
    """The first prompts side by side, and the share of exact answers where they are known."""
    shown = generations[:8]
    answers = [key for key in shown[0] if key.endswith("answer")]
    columns = ["prompt", *models, *(["expected"] if "expected" in shown[0] else []), *answers]
    show_table(columns, [[str(row.get(column, "")) for column in columns] for row in shown])
    if len(generations) > len(shown):
        console.print(f"... and {len(generations) - len(shown)} more in the file")
    known = [generation for generation in generations if "expected" in generation]
    for name in models if known else ():
        exact = sum(g[f"{name}_stopped"] and g[name] == g["expected"].strip() for g in known)
        share = 100 * exact / len(known)
        console.print(f"exact answers, {name}: {exact} of {len(known)} ({share:.0f} %)")


def main(argv: Sequence[str] | None = None) -> None:
    run_command(answer_prompts, PromptsConfig, argv, name="prompts")


if __name__ == "__main__":
    main()
