"""The suite's figures as the tables of docs/performance.md: planned and measured side by side."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.speed.suite.settings import CARD, TINY, Setting, Sizes
from jllama.folders.json_files import read_json
from jllama.machine import PACKAGES as OURS

PACKAGES = (*OURS, "torch", "transformers", "peft", "jax-cuda13-plugin", "nvidia-cudnn-cu13")
NOTHING, UNPLANNED = "not measured yet", "not planned yet"

Results = Mapping[str, dict[str, Any]]  # what the file of each part holds


def tables(folder: Path) -> str:
    """Markdown of all that a folder of results has; what it lacks is called not measured.

    Raises:
        InputError: if a file cannot be read.
    """
    results = {file.stem: read_json(file) for file in sorted(folder.glob("*.json"))}
    sizes = TINY if any(found["tiny"] for found in results.values()) else CARD
    made = [source(results), *(make(results, sizes) for make in TABLES)]
    return "\n\n".join(filter(None, made)) + "\n"


def source(results: Results) -> str:
    """When, where and with what it was measured and planned; what has no figures, and why."""
    lines = []
    done = {name: found for name, found in results.items() if "figures" in found}
    measured = next((found for name, found in done.items() if name != "plans"), None)
    if measured is None:
        lines.append("Nothing of this has been measured yet.")
    else:
        where = ", ".join(measured.get("gpu", {"device": measured["device"]}).values())
        tried = " with tiny sizes: the figures mean nothing" * measured["tiny"]
        lines.append(f"Measured {measured['date']} on {where}{tried}; {versions(measured)}.")
    if plans := results.get("plans", {}).get("figures"):
        cards = sorted({first(plan)["gpu"]["name"] for plan in plans.values()})
        here = results["plans"]
        lines.append(f"Planned {here['date']} for {', '.join(cards)}; {versions(here)}.")
    lines += [
        f"`{name}`: {found['state']}{f' ({reason(found)})' * ('reason' in found)}."
        for name, found in results.items()
        if found["state"] != "done"
    ]
    return "\n".join(lines)


def reason(found: Mapping[str, Any]) -> str:
    return found["reason"].strip().splitlines()[-1][:200]


def versions(found: Mapping[str, Any]) -> str:
    """Of all that is installed."""
    known = found["versions"].items()
    return ", ".join(f"{name} {is_}" for name, is_ in known if is_ and is_ != "not installed")


def first(plan: Any) -> Any:
    """Of a plan for generation, that of prefill."""
    return plan[0] if isinstance(plan, list) else plan


def ceilings(results: Results, sizes: Sizes) -> str:
    """What the card can do at most."""
    found = figures(results, "ceilings")
    rows = [
        [f"copy of {4 * sizes.copied // 2**20:,} MiB", number(found, "copy_gb_per_second", "GB/s")],
        [f"bf16 matmul, {sizes.matmul:,} square", number(found, "bf16_tflops", "TFLOP/s")],
        ["fp32 matmul", number(found, "fp32_tflops", "TFLOP/s")],
    ]
    return table("Ceilings", ["", "measured"], rows)


def memory(results: Results, sizes: Sizes) -> str:
    """Planned without the card, planned by the program that ran, and measured."""
    rows = []
    for setting in sizes.training:
        plan, found = planned(results, setting), measured_training(results, setting)
        of_process = found.get("peak_memory_of") == "process"  # Python and all, as on a CPU
        measured = None if of_process else found.get("peak_memory_mib")
        rows.append([
            words(setting),
            number(plan, "peak_mib", "MiB", nothing=UNPLANNED),
            number(found, "planned_mib", "MiB"),
            number(found, "peak_memory_mib", "MiB") + " of the process" * of_process,
            ratio(measured, plan.get("peak_mib")),
        ])  # fmt: skip
    heads = ["training", "planned", "compiled where it ran", "measured", "measured / planned"]
    return table("Peak memory", heads, rows)


def training(results: Results, sizes: Sizes) -> str:
    """Tokens per second: bound, predicted, measured, and the peer at the equal setting."""
    rows = []
    for setting in sizes.training:
        plan, found = planned(results, setting), measured_training(results, setting)
        suffix = "-checkpointed" if setting.remat == "block" else ""
        peer = {} if setting.packing else figures(results, f"peer-train-{setting.shape}{suffix}")
        mine = found.get("tokens_per_second")
        rows.append([
            words(setting),
            number(plan, "bound_tokens_per_second", nothing=UNPLANNED),
            number(plan, "predicted_tokens_per_second", nothing=UNPLANNED),
            number(found, "tokens_per_second"),
            ratio(mine, plan.get("predicted_tokens_per_second")),
            "" if setting.packing else number(peer, "tokens_per_second"),
            "" if setting.packing else ratio(mine, peer.get("tokens_per_second"), "x"),
        ])  # fmt: skip
    heads = ["training, tokens/s", "bound", "predicted", "measured", "measured / predicted",
             "transformers + peft", "jllama is faster by"]  # fmt: skip
    return table("Training", heads, rows)


def classes(results: Results, sizes: Sizes) -> str:
    """Predicted and measured time of a step by class of kernel, where a profile was taken."""
    made = []
    for setting in sizes.training:
        plan, found = planned(results, setting), measured_training(results, setting)
        guess, real = plan.get("time_us_by_class", {}), found.get("time_us_by_class", {})
        if not setting.profile or not (guess or real):
            continue
        rows = [
            [name, microseconds(guess, name, UNPLANNED), microseconds(real, name, NOTHING)]
            for name in dict.fromkeys([*guess, *real])
        ]
        title = f"Time of a step by class: {words(setting)}"
        made.append(table(title, ["microseconds", "predicted", "measured"], rows))
    return "\n\n".join(made)


def microseconds(found: Mapping[str, float], name: str, nothing: str) -> str:
    return f"{found.get(name, 0):,.0f}" if found else nothing


def generation(results: Results, sizes: Sizes) -> str:
    """Decoding with adapters merged and unmerged, the peer, and what the bandwidth allows."""
    rows = []
    bandwidth = figures(results, "ceilings").get("copy_gb_per_second")
    for batch in sizes.batches:
        plan = figures(results, "plans").get(f"generate-{batch}", [{}, {}])[-1]
        merged, beside, peer = (
            figures(results, name)
            for name in (
                f"generate-{batch}",
                f"generate-{batch}-unmerged",
                f"peer-generate-{batch}",
            )
        )
        rate = merged.get("decode_tokens_per_second")
        limit = 0.0  # tokens a second, if nothing but the weights were read
        if bandwidth and merged:
            limit = 1e9 * bandwidth / merged["weight_bytes_per_token"] * batch
        rows.append([
            f"{batch} together",
            number(plan, "predicted_tokens_per_second", nothing=UNPLANNED),
            number(merged, "decode_tokens_per_second"),
            number(beside, "decode_tokens_per_second"),
            ratio(rate, limit),
            number(peer, "decode_tokens_per_second") + (f" ({peer['cache']})" if peer else ""),
            ratio(rate, peer.get("decode_tokens_per_second"), "x"),
        ])  # fmt: skip
    heads = ["decoding, tokens/s", "predicted", "adapters merged", "unmerged",
             "of the bandwidth's limit", "transformers (cache)", "jllama is faster by"]  # fmt: skip
    return table("Generation", heads, rows)


def repeats(results: Results, sizes: Sizes) -> str:
    """Whether 20 steps are the same in two processes, and how long a start takes."""
    rows = []
    for flags in sizes.repeated_with:
        found = figures(results, "repeat-deterministic" if flags else "repeat")
        equal = ("yes" if found["bit_equal"] else "no") if found else NOTHING
        cold, warm = (found.get(way, {}) for way in ("cold", "warm"))
        rows.append([
            f"{words(sizes.repeated)}{', deterministic' * bool(flags)}",
            equal,
            number(cold, "seconds_to_first_step", "s", 1),
            number(warm, "seconds_to_first_step", "s", 1),
        ])  # fmt: skip
    found = figures(results, "start")
    cold, warm = (
        number(found.get(way, {}), "seconds_to_first_step", "s", 1) for way in ("cold", "warm")
    )
    rows.append(["`jllama train` on the bundled sample", "", cold, warm])
    heads = ["", "20 steps bit-equal in two processes", "to the first step, cold", "warm"]
    return table("Repeating and starting", heads, rows)


def several(results: Results, sizes: Sizes) -> str:
    """Every mesh beside its plan; nothing where there is one card."""
    found = figures(results, "devices")
    if not found:
        return ""
    rows = [
        [
            mesh,
            number(step, "tokens_per_second"),
            number(step["plan"], "predicted_tokens_per_second"),
            number(step, "peak_memory_mib", "MiB"),
            number(step["plan"], "peak_mib", "MiB"),
        ]
        for mesh, step in found["steps"].items()
    ]
    heads = [words(sizes.repeated), "tokens/s", "planned", "memory of a card", "planned"]
    return table("Several cards", heads, rows)


TABLES: tuple[Callable[[Results, Sizes], str], ...] = (
    ceilings, memory, training, classes, generation, repeats, several,
)  # fmt: skip


def figures(results: Results, part: str) -> dict[str, Any]:
    """Of a part; {} where it has none."""
    return results.get(part, {}).get("figures", {})


def planned(results: Results, setting: Setting) -> dict[str, Any]:
    return figures(results, "plans").get(f"train-{setting.name}", {})


def measured_training(results: Results, setting: Setting) -> dict[str, Any]:
    return figures(results, f"train-{setting.name}")


def words(setting: Setting) -> str:
    """llama-2-7b, 4 x 4096, no remat, packed"""
    remat = "no remat" if setting.remat == "none" else f"{setting.remat} remat"
    more = ["all linears"] * (setting.targets == "all") + ["packed"] * setting.packing
    shape = f"{setting.micro_batch_size} x {setting.max_seq_len}"
    return ", ".join([setting.model, shape, remat, *more])


def number(
    found: Mapping[str, Any], name: str, unit: str = "", digits: int = 0, nothing: str = NOTHING
) -> str:
    if found.get(name) is None:
        return nothing
    return f"{found[name]:,.{digits}f} {unit}".strip()


def ratio(one: float | None, other: float | None, unit: str = "") -> str:
    """One over the other: 1.04, or with a unit 1.04x; empty where one is missing."""
    return f"{one / other:.2f}{unit}" if one and other else ""


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
