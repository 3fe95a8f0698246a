"""The sections of a report about one run: each reads the run folder's files and says what is there.

A section that misses a file or a field raises `Missing`; `eval.report` then says so in its place.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.report.document import Block, Code, Fold, Lacking, Paragraph, Picture, Table, Text
from eval.report.evidence import EVERY, Evidence, Figure, Missing, combine
from eval.report.pictures import memory_bars
from jllama.cli.terminal import command_line, quoted
from jllama.folders.run import CONFIG, GENERATIONS, METRICS, RECORD

PROMPTS = 200  # shown side by side; all are counted

# What `remat` recomputes in the backward pass -> of each block, what is kept and what is not.
PLACES: Mapping[str, tuple[str, str]] = {
    "none": ("every intermediate result", "nothing"),
    "dots": ("results of matrix products", "norms, activations and attention weights"),
    "offload": ("results of matrix products, in the host's memory", "all else"),
    "ffn": ("attention and attention_norm", "ffn_norm and feed_forward"),
    "block": ("the input of the block", "the whole block"),
}


def settings(run: Evidence) -> Iterator[Block]:
    """The settings that were chosen; all others, and the sizes of the model, to be opened."""
    yield Paragraph([
        f"Trained on {run.value(RECORD, 'device')} by jllama "
        f"{run.value(RECORD, 'versions', 'jllama')}; config.yaml has these settings and "
        "gives the same run again."
    ])  # fmt: skip
    chosen = run.value(RECORD, "chosen")
    rows: dict[bool, list[list[Text]]] = {True: [], False: []}
    for name, value in run.content(CONFIG).items():
        if value not in ("", None):
            rows[name in chosen].append([name, setting(run, CONFIG, name)])
    if rows[True]:
        yield Table(["setting", "value"], rows[True])
    yield Fold("All settings that are the defaults", [Table(["setting", "value"], rows[False])])
    sizes = run.value(RECORD, "model")
    table = Table(
        ["size", "value"],
        [[name, setting(run, RECORD, "model", name)] for name in sizes],
    )
    yield Fold("The sizes of the model", [table])


def setting(run: Evidence, file: str, *path: str) -> Text:
    """A number as a figure, a path by its end, all else as text."""
    value = run.value(file, *path)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return run.figure(file, *path, form="" if isinstance(value, float) else ",")
    return short(str(value))


def short(named: str | list[str]) -> str:
    """/home/me/models/llama-2-7b  ->  models/llama-2-7b; the file that was read has the whole.
    Several in one line."""
    names = [named] if isinstance(named, str) else named
    return ", ".join("/".join(Path(x).parts[-2:]) if x.startswith("/") else x for x in names)


def parameters(run: Evidence) -> Iterator[Block]:
    """Trainable and total, and what the original report's biases make of it."""
    trainable = run.figure(RECORD, "parameters", "trainable", form=",")
    total = run.figure(RECORD, "parameters", "total", form=",")
    share = combine("percent", trainable, total, form=".2f")
    yield Table(
        ["parameters", "number"],
        [["trainable", trainable], ["frozen", combine("difference", total, trainable, form=",")],
         ["total", total], ["trainable, percent of total", share]],
    )  # fmt: skip
    if run.value(RECORD, "model", "ffn_bias"):
        biases = run.compute(
            "feed-forward biases",
            *((RECORD, "model", name) for name in ("n_layers", "hidden_dim", "dim")),
            form=",",
        )
        yield Paragraph([
            "The feed-forward layers have biases here, as the original report counted them: ",
            biases, " numbers, all zero and frozen, which no published file has. Without them the "
            "model has ", combine("difference", total, biases, form=","), " parameters.",
        ])  # fmt: skip


def memory(run: Evidence) -> Iterator[Block]:
    """Planned by class, measured, and against the device."""
    classes = {
        name.replace("_", " "): run.compute("MiB", (RECORD, "memory_bytes", name), form=",.1f")
        for name in run.value(RECORD, "memory_bytes")
    }
    planned = run.compute("max", (METRICS, EVERY, "planned_memory_mib"), form=",.1f")
    rest = combine("difference", planned, *classes.values(), form=",.1f")
    measured = run.compute("max", (METRICS, EVERY, "peak_memory_mib"), form=",.1f")
    device = run.figure(RECORD, "device_memory_mib", form=",")
    rows: list[list[Text]] = [[name, size] for name, size in classes.items()]
    rows += [
        ["batch, activations and temporaries", rest],
        ["the step, planned by the compiler", planned],
        ["peak, measured", measured],
        ["device", device],
        ["measured, percent of the device", combine("percent", measured, device, form=".1f")],
    ]
    yield Table(["memory", "MiB"], rows)
    if "cpu" in str(run.value(RECORD, "device")).lower():
        yield Paragraph([
            "On a CPU the measured peak is that of the whole process, with Python, its libraries "
            "and the compiler; the planned one is of the training step alone."
        ])  # fmt: skip
    bars = {name: figure.value for name, figure in classes.items() if figure.value >= 0}
    bars["activations and temporaries"] = max(0.0, rest.value)
    yield Picture(
        "memory",
        memory_bars({"one step": bars}, None),
        f"Planned memory of one training step by class, {planned.text} MiB in all.",
    )
    yield Paragraph([
        "Median step: ", run.compute("median", (METRICS, EVERY, "step_seconds")),
        " s; median ", run.compute("median", (METRICS, EVERY, "tokens_per_second"), form=",.0f"),
        " learned tokens/s; all steps together ",
        run.compute("sum", (METRICS, EVERY, "step_seconds"), form=",.1f"), " s.",
    ])  # fmt: skip


def checkpointing(run: Evidence) -> Iterator[Block]:
    """Where activations are kept, and where they are computed again."""
    remat = run.value(CONFIG, "remat")
    if remat not in PLACES:
        raise Missing(f"{CONFIG} has remat {remat!r}, which is not known")
    kept, again = PLACES[remat]
    yield Table(
        ["in each of the blocks", "number or place"],
        [["blocks", run.figure(RECORD, "model", "n_layers", form=",")], ["remat", str(remat)],
         ["kept for the backward pass", kept], ["computed again there", again]],
    )  # fmt: skip


def learned(run: Evidence) -> tuple[Sequence[Any], list[int], dict[int, int]]:
    """The lines of metrics.jsonl, which of them end an epoch, and step -> that of an evaluation."""
    lines = run.content(METRICS)
    epochs = [i for i, line in enumerate(lines) if "epoch_loss" in line]
    held_out = {line["step"]: i for i, line in enumerate(lines) if "eval_loss" in line}
    if not epochs:
        raise Missing(f"{METRICS} has no epoch_loss: no epoch has ended")
    return lines, epochs, held_out


def loss(run: Evidence, reference: Sequence[Figure]) -> Iterator[Block]:
    """Every epoch's average, held-out loss and the reference's."""
    lines, epochs, held_out = learned(run)
    header = ["epoch", "after step", "training", *(["held-out"] if held_out else [])]
    header += ["reference"] if reference else []
    rows: list[list[Text]] = []
    if 0 in held_out:
        rows.append(["before", run.figure(METRICS, held_out[0], "step", form=","), "",
                     run.figure(METRICS, held_out[0], "eval_loss", form=".4f"),
                     *([""] if reference else [])])  # fmt: skip
    for number, i in enumerate(epochs):
        row: list[Text] = [
            run.figure(METRICS, i, "epoch", form=","),
            run.figure(METRICS, i, "step", form=","),
            run.figure(METRICS, i, "epoch_loss", form=".4f"),
        ]
        if held_out:
            at = held_out.get(lines[i]["step"])
            row.append("" if at is None else run.figure(METRICS, at, "eval_loss", form=".4f"))
        if reference:
            row.append(reference[number] if number < len(reference) else "")
        rows.append(row)
    yield Table(header, rows)
    yield Paragraph(["Nats per learned token, averaged over tokens; one row an epoch."])
    asked = run.figure(CONFIG, "epochs", form=",")
    if len(epochs) < asked.value:
        yield Lacking(["Not all of the ", asked, " epochs have ended."])


def answers(run: Evidence, recorded: Mapping[str, Mapping[str, str]]) -> Iterator[Block]:
    """The prompts with every answer side by side, and what can be counted of each."""
    lines = run.content(GENERATIONS)
    if not lines:
        raise Missing(f"{GENERATIONS} has no prompt")
    models = [who for who in ("base", "tuned") if who in lines[0]]
    for who in models if all("expected" in line for line in lines) else ():
        places = ((GENERATIONS, EVERY, name) for name in (who, "expected", f"{who}_stopped"))
        right = run.compute("exact answers", *places, form=",")
        asked = run.compute("length", (GENERATIONS, EVERY, who), form=",")
        yield Paragraph([f"Exact answers, {who}: ", right, " of ", asked, "."])
    wrong_first = sorted(range(len(lines)), key=lambda number: _right(lines[number], models[-1]))
    for number in wrong_first[:PROMPTS]:
        line = lines[number]
        rows = [_answer(run, number, who) for who in models]
        if "expected" in line:
            rows.append(["expected", line["expected"], "", "", "", ""])
        known = {k: str(v) for k, v in line.items() if k.endswith("answer")}
        known |= recorded.get(line["prompt"].strip(), {})
        for name, text in known.items():
            rows.append([name.removesuffix("_answer").replace("_", ", "), text, "", "", "", ""])
        table = Table(["who", "answer", "ends", "repeats", "NLL", "KL"], rows, wide=True)
        yield Fold(f"{number + 1}. {' '.join(line['prompt'].split())}", [table])
    if len(lines) > PROMPTS:
        yield Paragraph([f"{GENERATIONS} has the others."])
    yield Paragraph([
        "ends: whether the answer ended itself (EOS) or was cut at its token limit. repeats: "
        "percent of the runs of four tokens that stood in the answer before. NLL: nats per token "
        "that the answering model gives its own answer. KL: of the tuned model from the base along "
        "that answer, nats per token."
    ])  # fmt: skip


def _right(line: Mapping[str, Any], who: str) -> bool:
    """Whether an answer is what was expected; also where nothing was."""
    return "expected" not in line or line[who].strip() == line["expected"].strip()


def _answer(run: Evidence, number: int, who: str) -> list[Text | Sequence[Text]]:
    line = run.content(GENERATIONS)[number]
    ended = {True: "EOS", False: "cut"}.get(line.get(f"{who}_stopped"), "not recorded")
    repeats: Sequence[Text] = [
        run.compute("repetition", (GENERATIONS, number, f"{who}_ids"), form=".0f"), " %"
    ]  # fmt: skip
    measured: list[Text] = ["not measured", "not measured"]
    found = line.get(f"{who}_score") or {}
    if found.get("tokens"):
        place = (GENERATIONS, number, f"{who}_score")
        measured[0] = run.figure(*place, "nll_per_token", who, form=".3f")
        measured[1] = run.figure(*place, "kl_per_token", form=".3f")
    return [who, line[who], ended, repeats, *measured]


def data(run: Evidence) -> Iterator[Block]:
    """What the data held."""
    names = {
        "rows": "rows to train on",
        "held_out_rows": "rows held out",
        "tokens": "tokens of them",
        "learned_tokens": "learned tokens",
        "longest": "longest row, tokens",
        "cut_rows": "rows that lost their end",
        "padding_share": "share of positions that hold no token",
        "windows": "given windows of an epoch",
    }
    yield Table(
        ["data", "number"],
        [
            [title, run.figure(RECORD, "data", name, form=".3f" if "share" in name else ",")]
            for name, title in names.items()
            if name in run.value(RECORD, "data")
        ],
    )
    yield Paragraph([f"From {short(run.value(CONFIG, 'data'))}."])


def reproduce(run: Evidence) -> Iterator[Block]:
    """The commands, and what must be the same."""
    yield Code(
        command_line(
            "train", "--config", f"{short(str(run.folder))}/{CONFIG}", "--output-dir", "NEW"
        )
        + "\n"
        + command_line("report", "--run", "NEW")
    )
    hashes = ("base_manifest_sha256", "tokenizer_sha256", "data_sha256", "config_sha256")
    rows = [[name, str(run.value(RECORD, name))] for name in hashes]
    rows += [[name, str(version)] for name, version in run.value(RECORD, "versions").items()]
    program, *flags = map(str, run.value(RECORD, "command")[1:])
    rows.append(["command", quoted("python", short(program), *flags)])
    yield Table(["what", "value"], rows, wide=True)


def lacking(reason: object, advice: str) -> Lacking:
    """In place of a section or a part of it."""
    return Lacking([f"Missing: {reason}. {advice}".strip()])
