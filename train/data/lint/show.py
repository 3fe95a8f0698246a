"""The lint on the terminal; the JSON object that it shows is `command.found`'s."""

from collections.abc import Mapping, Sequence
from typing import Any

from jllama.cli.terminal import console, show_table, visible
from train.data.lint.findings import FIRST

WIDTH = 80  # characters of a histogram, at most
LEARN = {
    "all": "each answer that no mark excepts",
    "last": "the last answer of each conversation",
    "weighted": "in conversations the answers that a mark names",
}


def show(found: Mapping[str, Any]) -> None:
    """Prints what was found, errors last."""
    names = {"not_learned": "not learned"}
    figures = found["tokens"]
    show_table(
        ["tokens", "least", "median", "mean", "most", "in all"],
        [[names.get(name, name), *(f"{x:,.0f}" for x in of.values())]
         for name, of in figures.items()],
    )  # fmt: skip
    console.print("rows by their tokens:")
    for line in histogram_lines(found["histogram"]):
        console.print(line)
    settings = found["settings"]
    share = 100 * figures["learned"]["all"] / figures["row"]["all"]
    how = "all, prompts too" if settings["train_on_prompt"] else LEARN[settings["learn"]]
    console.print(f"learned: {share:.0f} % of the tokens; --learn {settings['learn']}: {how}")
    for name, layout in found["layouts"].items():
        console.print(
            f"{name}: {layout['sequences']:,} sequences of "
            f"{' or '.join(map(str, layout['lengths']))} tokens, "
            f"{100 * layout['padding']:.0f} % padding"
        )
    kinds = ", ".join(f"{count:,} {visible(kind)}" for kind, count in found["kinds"].items())
    console.print(f"formats: {kinds or 'none'}")
    answers = found["answers"]
    if answers.keys() - {"1"}:
        most = sorted(answers.items(), key=lambda item: -item[1])[:FIRST]
        told = [f"{n} in {rows:,} rows" for n, rows in sorted(most, key=lambda item: int(item[0]))]
        console.print(f"answers: {', '.join(told)}{', ...' if len(answers) > FIRST else ''}")
    for problem in found["unusable"]["first"]:
        console.print(f"  {problem}")
    borders, rows = found["borders"], found["examples"]
    console.print(
        f"BOS: {borders['begins']:,} in {rows:,} rows; {borders['ends']:,} rows end in a stop token"
    )
    console.print(f"duplicates: {found['duplicates']['rows']} rows occur more than once")
    cut = found["truncated"]
    lost = f", {cut['tokens']:,} tokens; the longest row has {cut['longest']:,}"
    console.print(
        f"truncated: {cut['rows']} rows lose their end at {settings['max_seq_len']}"
        + (lost if cut["rows"] else "")
    )
    for name, count in found["ignored_columns"].items():
        console.print(f"ignored: column '{name}' of {count:,} rows")
    if found["special_tokens"]:
        show_table(
            ["spelled out in text", "rows", "this model's", "read as"],
            [[name, f"{of['rows']:,}", "yes" if of["known"] else "no", " ".join(of["read_as"])]
             for name, of in found["special_tokens"].items()],
        )  # fmt: skip
    _show_cost(found["cost"])
    for note, rows in found["warnings"].items():
        console.print(f"warning: {rows['rows']:,} rows {note}: {rows['first']}")
    for error in found["errors"]:
        console.print(f"error: {error}")


def histogram_lines(bars: Sequence[tuple[int, int, int]], width: int = WIDTH) -> list[str]:
    """A line for each bar, at most so wide; of `#` where the terminal has no blocks.

     1-16   ████████████████████ 512
    17-32   ███ 73
    """
    names = [f"{first:,}" + f"-{last:,}" * (last > first) for first, last, _ in bars]
    counts = [f"{count:,}" for _, _, count in bars]
    left, right = max(map(len, names)), max(map(len, counts))
    room = min(width, console.width) - left - right - 2
    most = max(count for _, _, count in bars)
    block = "█" if console.encoding.startswith("utf") else "#"
    return [
        f"{name:>{left}} {block * max(count > 0, room * count // most)} {shown}"
        for name, shown, (_, _, count) in zip(names, counts, bars, strict=True)
    ]


def _show_cost(cost: Mapping[str, Any]) -> None:
    console.print(
        f"cost: {cost['tokens_an_epoch']:,} tokens an epoch, {cost['learned_tokens_an_epoch']:,} "
        f"of them learned; {cost['epochs']} epochs are {cost['steps']:,} optimizer steps of "
        f"{cost['sequences_a_step']} sequences, {100 * cost['padding']:.0f} % padding"
    )
    card = cost.get("card")
    if card:
        how = "predicted" if card["compiled"] else "at least, by the card's data sheet"
        console.print(
            f"on {card['gpu']}: {duration(card['seconds'])} {how} "
            f"({card['tokens_per_second']:,.0f} tokens/s with the padding); "
            f"{card['peak_mib']:,.0f} MiB, "
            + (f"{card['free_mib']:,.0f} free" if card["free_mib"] >= 0
               else f"{-card['free_mib']:,.0f} too many: jllama plan --fit finds what fits")
        )  # fmt: skip


def duration(seconds: float) -> str:
    """3 h 12 min, 12 min, 40 s."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60} min"
    return f"{minutes} min" if seconds >= 100 else f"{seconds:.0f} s"


def noted(rows: Sequence[Any]) -> dict[str, Any]:
    """How many rows, and the first of their numbers or of what is said of them."""
    return {"rows": len(rows), "first": list(rows[:FIRST])}
