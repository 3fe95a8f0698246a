"""What counts as survived: the right result, or one message that names the file, and nothing left.

A verdict is a few words for a failure, empty for what survived.
"""

import hashlib
import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults.call import Call

LONGEST_MESSAGE = 8000  # characters; what a terminal holds
_RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What metrics.jsonl says of how fast this machine was, and the check sum of that.
_TIMES = ("step_seconds", "tokens_per_second", "peak_memory_mib", "compilations", "crc32")


def ended_well(call: Call) -> str:
    """Whatever was wrong with its input: no traceback, no hanging, nothing left running."""
    if call.hung:
        return f"hung for {call.seconds:.0f} seconds"
    if call.orphans:
        return f"orphans: {call.orphans} processes"
    if call.raised:
        return f"traceback: {call.raised}"
    if call.code < 0:
        return f"died of {signal.Signals(-call.code).name}"
    return ""


def refused(call: Call, command: str, names: Sequence[str]) -> str:
    """Exit code 2 and one message, which has one of the names in it."""
    if call.code != 2:
        return f"exit code {call.code}"
    message = call.errors.strip()
    if not message.startswith(f"jllama {command}: "):
        return f"other words than one message: {message[:150]!r}"
    if message.count(f"jllama {command}: ") > 1:
        return f"several messages: {message[:150]!r}"
    if not any(name in message for name in names):
        return f"the message does not name {names[0]}: {message[:200]!r}"
    return ""


def readable(call: Call) -> str:
    """Words that do nothing to a terminal, and that somebody can read."""
    if found := _RAW.search(call.words):
        return f"raw control character {found.group()!r} on the terminal"
    if len(call.errors) > LONGEST_MESSAGE:
        return f"a message of more than {LONGEST_MESSAGE} characters"
    return ""


def after_damage(
    call: Call, command: str, names: Sequence[str], right: Any, *, must_refuse: bool = False
) -> str:
    """Of a command one of whose files is damaged: the right result, or refused."""
    if wrong := ended_well(call) or readable(call):
        return wrong
    if call.code == 0 and not must_refuse:
        return "" if right is None or call.result == right else "loss: another result, not a word"
    return refused(call, command, names)


def contents(folder: Path, *patterns: str) -> dict[str, str]:
    """The sha256 of all files of a folder, or of those that match a pattern."""
    files = {file for pattern in patterns or ("**/*",) for file in folder.glob(pattern)}
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
        if file.is_file()
    }


def run_result(run: Path) -> dict[str, Any]:
    """All that two equal runs have in common, to the bit: results, best, figures without times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    figures = [
        {name: value for name, value in json.loads(line).items() if name not in _TIMES}
        for line in lines
    ]
    kept = contents(run, "adapter/*", "best/**/*", "model/**/*", "config.yaml")
    names = sorted(path.name for path in run.iterdir())
    return {"files": kept, "figures": figures, "names": names}
