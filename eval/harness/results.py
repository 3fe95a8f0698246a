"""What lm-evaluation-harness says of base and tuned, as one list: harness.json, and its table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jllama.cli.terminal import show_table


def side_by_side(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for each task and metric, of what `lm_eval.evaluate` gave for each model.

        {"task": "capitals", "metric": "acc", "filter": "none", "higher_is_better": true,
         "samples": 40, "few_shot": 0, "version": 1.0,
         "base": {"value": 0.25, "stderr": 0.07}, "tuned": {"value": 0.9, "stderr": 0.05}}

    A group of tasks has lines, too. What is no finite number is null.
    """
    first = next(iter(results.values()))
    lines = []
    for task, values in first["results"].items():
        for key in values:
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            lines.append({
                "task": task,
                "metric": metric,
                "filter": kind,
                "higher_is_better": first["higher_is_better"].get(task, {}).get(metric),
                "samples": first["n-samples"].get(task, {}).get("effective"),
                "few_shot": first["n-shot"].get(task),
                "version": first["versions"].get(task),
                **{
                    who: {
                        "value": _number(found["results"][task].get(key)),
                        "stderr": _number(found["results"][task].get(f"{metric}_stderr,{kind}")),
                    }
                    for who, found in results.items()
                },
            })  # fmt: skip
    return lines


def _number(value: object) -> float | None:
    usable = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if usable else None  # type: ignore[arg-type]


def measure_of(line: Mapping[str, Any]) -> str:
    """`acc`, `exact_match, strict-match`; an arrow where less is better."""
    name = line["metric"] + (f", {line['filter']}" if line["filter"] != "none" else "")
    return name + (" ↓" if line["higher_is_better"] is False else "")


def show(lines: Sequence[Mapping[str, Any]], models: Sequence[str]) -> None:
    """The figures of the models side by side, with their standard errors, and the change."""
    rows = []
    for line in lines:
        values = [line[who]["value"] for who in models]
        change = [f"{values[1] - values[0]:+.4f}" if None not in values else ""][: len(values) - 1]
        rows.append([
            line["task"], measure_of(line), *(_cell(line[who]) for who in models),
            *change,
        ])  # fmt: skip
    show_table(["task", "metric", *models, *(["change"] if len(models) > 1 else [])], rows)


def _cell(figure: Mapping[str, float | None]) -> str:
    """0.5000 ± 0.1043"""
    value, error = figure["value"], figure["stderr"]
    text = "" if value is None else f"{value:.4f}"
    return text if error is None else f"{text} ± {error:.4f}"
