"""Hostile texts, from nothing but a seed and a good file.

Half are the same for every reader: no text at all, texts of other kinds, endless nesting, numbers
without end. Half are the good file with a field changed, cut, or given twice.
"""

import copy
import gzip
import json
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any, Literal

import yaml

Form = Literal["json", "lines", "yaml", "binary"]

MANY = 100_000
DIGITS = "9" * 5_000
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\x00\u202e"

NO_TEXT: tuple[bytes, ...] = (
    b"", b" ", b"\n\n\n", b"\0", b"\0" * 5000, b"\xff\xfe", b"\xef\xbb\xbf", b"\xff" * 100,
    b'{"a": "\xed\xa0\x80"}', "{'a': '\N{LATIN SMALL LETTER E WITH ACUTE}'}".encode("latin-1"),
    '[{"prompt": "a", "completion": "b"}]'.encode("utf-16"), gzip.compress(b"{}"), b"PAR1" * 9,
    b"PK\x03\x04" + b"\0" * 50, pickle.dumps({"a": 1}), b"\x89PNG\r\n\x1a\n", b"%PDF-1.7",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"<!DOCTYPE html><html>404</html>", b"prompt,completion\na,b\n", b"#!/bin/sh\nexit 1\n",
)  # fmt: skip
OTHER_TEXT: tuple[str, ...] = (
    "[" * MANY, '{"a":' * MANY, "[" * MANY + "]" * MANY, '[{"a":' * 2000, DIGITS, f"[{DIGITS}]",
    f'{{"a": {DIGITS}}}', f'[{{"prompt": "a", "completion": {DIGITS}}}]', "1e999", "[1e999]",
    "NaN", "[NaN, Infinity, -Infinity]", '{"a": NaN}', "null", "true", "0", '"x"', "[]", "{}",
    "[[]]", "[null]", "[1, 2]", '["x"]', "[{}]", "[[[[{}]]]]", '{"a": 1, "a": 2}', '{"": ""}',
    '{"prompt": "a"}{"prompt": "b"}', '{"prompt": "a"}\n{"prompt"', '[{"prompt": "a"},]',
    '{"a": "\\ud800"}', '[{"prompt": "\\ud800", "completion": "\\udfff"}]', "'single'", "{a: 1}",
    '{"a": "' + "x" * 1_000_000 + '"}', " " * 1_000_000, "x" * 1_000_000, "\n" * MANY,
    '[{"prompt": "' + " " * 1_000_000 + '", "completion": "b"}]', "{} " * 1000, "{}\n" * 1000,
    json.dumps({ESCAPES: ESCAPES}), ESCAPES, json.dumps([ESCAPES]), "\u2028{}\u2029",
    "\ufeff\ufeff{}",
    "/" + "../" * 50 + "etc/passwd", "%s%n{0}", "$(touch owned)", "{{7*7}}",
    "<script>1</script>",
)  # fmt: skip
YAML_TEXT: tuple[str, ...] = (
    "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "- &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"- &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "&a [*a]", "model: &a {b: *a}", "!!python/object/apply:os.system ['touch owned']",
    "!!python/name:os.system", "model: !!binary aGVsbG8=", "model: !!set {a, b}", "? [a, b]\n: c",
    "? {a: b}\n: c", "1: 2\nx: 3\nnull: 4\n2.5: 1", "[[[" * 2000, "{a: " * 2000, "- " * 5000,
    "a:\n b:\n  c\n d", "model: 2020-01-01", "epochs: 0o17",
    "epochs: 1_000_000_000_000_000_000_000",
    "epochs: .inf", "learning_rate: .nan", "learning_rate: -.inf", "epochs: 1:30:00", "epochs: ~",
    "seed: -1", f"seed: {DIGITS}", "model: [a]", "model: {a: b}", "a: b: c", "\tmodel: x", "@a",
    "%a",
    "--- a\n--- b", "model: a\nmodel: b", "<<: {epochs: 2}", "<<: [1]",
    "'\\ud800': 1", "packing: 1",
    'model: "\\x1b[2J"', '"\\e]0;owned\\a": 1', "epochs: '3'", "epochs: 3.0",
    "lora_targets: [wq, wv]",
    "learning_rate: 1e-4", "resume: x", "dry_run: yes", "model: |\n " + "x" * 100_000,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, -0.0, float("nan"), float("inf"), 1e308, 10**30, 2**63, "",
    " ",
    "x", "NaN", "-1", ESCAPES, "\ud800", "../../etc/passwd", "/dev/null", "9" * 200, [], {}, [[]],
    [None], [1, "x", {}], {"a": {"b": None}}, "x" * 10_000, [0] * 1000, "(", "(a+)+$", "\0",
    "\n# a",
)  # fmt: skip


def hostile(good: bytes, form: Form, number: int, draw: random.Random) -> list[tuple[str, bytes]]:
    """Names and contents of so many files: none of them is the good one.

    Args:
        good: a file as its reader wants it.
        form: what its text is; of "binary" ones bytes are changed.
    """
    common = [(f"no text {i}", content) for i, content in enumerate(NO_TEXT)]
    texts = (*YAML_TEXT, *OTHER_TEXT) if form == "yaml" else OTHER_TEXT
    common += [(f"text {i}", _bytes(text)) for i, text in enumerate(texts)]
    draw.shuffle(common)
    common = common[: number // 2] if form != "yaml" else common[: number * 2 // 3]
    make = _changed_bytes if form == "binary" else _changed_fields
    changed = make(good, form, draw)
    return common + [next(changed) for _ in range(number - len(common))]


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _changed_bytes(good: bytes, form: Form, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    while True:
        content, how = bytearray(good), draw.choice(("cut", "line", "byte", "lines", "twice"))
        at = draw.randrange(len(good))
        lines = good.split(b"\n")
        if how == "cut":
            content = content[:at]
        elif how == "byte":
            for _ in range(draw.randint(1, 5)):
                content[draw.randrange(len(content))] = draw.randrange(256)
        elif how == "twice":
            content += content[at:]
        elif how == "line":
            lines[draw.randrange(len(lines))] = draw.choice(
                (b"", b"AA==", b"AA== -1", b"AA== 999999999999", b"AA== x", b"AA== " + b"9" * 5000,
                 b"!!!! 3", lines[0], b"\xff 1", b"QQ==  7")
            )  # fmt: skip
            content = bytearray(b"\n".join(lines))
        else:
            content = bytearray(b"\n".join(draw.sample(lines, max(1, len(lines) // 2))))
        yield f"{how} at {at}", bytes(content)


def _changed_fields(good: bytes, form: Form, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    parse: Callable[[str], Any] = yaml.safe_load if form == "yaml" else json.loads
    values = (
        [parse(line) for line in good.decode().splitlines()]
        if form == "lines"
        else parse(good.decode())
    )
    if form == "json" and isinstance(values, dict) and len(json.dumps(values)) > 200_000:
        raise ValueError("too long to be changed a hundred times")
    while True:
        changed = copy.deepcopy(values)
        place = draw.choice(list(_places(changed)))
        name, what = _change(changed, place, draw)
        yield name, _bytes(_written(what, form, draw))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand: ("files", "config.json"), (3, "prompt"), ..."""
    steps = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for step, inner in list(steps)[:40]:
        yield (*path, step)
        yield from _places(inner, (*path, step))


def _change(content: Any, place: tuple[Any, ...], draw: random.Random) -> tuple[str, Any]:
    """The content with one place changed, and the change in words."""
    holder = content
    for step in place[:-1]:
        holder = holder[step]
    at, how = place[-1], draw.choice(("value", "value", "value", "value", "gone", "named"))
    if how == "value":
        value = draw.choice(VALUES)
        holder[at] = value
        return f"{place} is {str(value)[:30]!r}", content
    removed = holder.pop(at)
    if how == "named" and isinstance(holder, dict):
        holder[draw.choice(("x", "", ESCAPES, f"{at} ", str(at).upper(), "__class__"))] = removed
    return f"{place} {how}", content


def _written(content: Any, form: Form, draw: random.Random) -> str:
    if form == "lines":
        return "".join(json.dumps(line) + "\n" for line in content)
    if form == "yaml":
        return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    text = json.dumps(content, indent=draw.choice((None, 2)))
    return text.replace('"9999999999', DIGITS[:4999] + '"', 1) if draw.random() < 0.02 else text
