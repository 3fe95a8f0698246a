"""Wrong values of every field of every command, made from the fields' declarations.

A field is given each of them from Python and from YAML, and some from flags.
"""

import dataclasses
import importlib
import itertools
import math
import os
import re
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from pydantic import BeforeValidator

import train.lora
from jllama.cli.script import COMMANDS
from jllama.cli.settings import settings_from_yaml
from jllama.errors import LARGEST, AtLeast1, InputError, Share, SomeOf
from train.config import TrainConfig

NO_CHOICE = "no-such-choice"
OF_NO_KIND: dict[type, list[Any]] = {
    int: [NO_CHOICE, "", 1.5, math.nan, math.inf, -math.inf, True, None, [1]],
    float: [NO_CHOICE, "", math.nan, math.inf, -math.inf, True, None, [1.0]],
    bool: [NO_CHOICE, 2, 1, 0.0, math.nan, None, [True]],
    str: [7, 0.5, math.nan, True, None, ["text"]],
    Path: [7, math.nan, True, None, ["text"]],
}
BEYOND = {"ge": -1, "gt": 0, "le": 1, "lt": 0}  # from a bound to a number that is not allowed


def unpacked(declared: Any) -> tuple[Any, tuple[Any, ...], list[Any]]:
    """A declaration's type, the types or choices in it, and its marks."""
    kind, *marks = get_args(declared) if get_origin(declared) is Annotated else (declared,)
    origin = get_origin(kind) or kind
    return Union if origin is types.UnionType else origin, get_args(kind), marks


def bounds(declared: Any) -> list[tuple[str, Any]]:
    """Annotated[int, Field(ge=1)] -> [("ge", 1)]"""
    limits = [limit for mark in unpacked(declared)[2] for limit in getattr(mark, "metadata", [])]
    return [(side, getattr(x, side)) for x in limits for side in BEYOND if hasattr(x, side)]


def choices(declared: Any) -> list[str]:
    kind, parts, marks = unpacked(declared)
    listed = [choice for mark in marks if isinstance(mark, SomeOf) for choice in mark.choices]
    return listed + [choice for choice in parts if kind is Literal and choice]


def out_of_range(declared: Any) -> list[Any]:
    """The numbers next to the bounds; of text, what names no choice."""
    kind, parts, _ = unpacked(declared)
    if kind in (Union, tuple):
        wrong = [value for part in parts for value in out_of_range(part)]
        return [[value] for value in wrong] if kind is tuple else wrong
    known = choices(declared)
    lists = ["", f"{known[0]},{known[0]}", f"{known[0]},{NO_CHOICE}"] if known else []
    return [bound + BEYOND[side] for side, bound in bounds(declared)] + (
        [NO_CHOICE] if kind is Literal else lists
    )


def wrong_values(declared: Any) -> list[Any]:
    """Values that a declaration does not allow: of another kind than its own, or out of range."""
    kind, parts, marks = unpacked(declared)
    if kind is Literal:
        return [NO_CHOICE, 0.5, math.nan, True, None, [*parts]]
    if kind in (Union, tuple):
        wrong = [value for part in parts if part in OF_NO_KIND or get_origin(part)
                 for value in wrong_values(part)]  # fmt: skip
        if kind is tuple:
            text = [] if any(isinstance(x, BeforeValidator) for x in marks) else [NO_CHOICE]
            return [7, *text, None, *([value] for value in wrong)]  # one text may stand for itself
        return [value for value in wrong if value is not None or type(None) not in parts]
    return OF_NO_KIND[kind] + out_of_range(declared)


def named(declared: Any) -> list[str]:
    """What a message on a field tells: every choice, every bound but that of all numbers."""
    kind, parts, _ = unpacked(declared)
    inner = [name for part in parts for name in named(part)] if kind in (Union, tuple) else []
    limits = [str(bound) for _, bound in bounds(declared) if bound != LARGEST]
    return [*choices(declared), *limits, *inner]


def test_wrong_values_are_made_from_a_declaration():
    assert wrong_values(AtLeast1)[-2:] == [0, 2**31]
    assert out_of_range(Share | Literal["auto"] | None) == [-1, 1, NO_CHOICE]
    assert out_of_range(tuple[AtLeast1, ...]) == [[0], [2**31]]
    assert None not in wrong_values(Share | None)
    assert named(Share | Literal["auto"]) == ["0", "1", "auto"]


@pytest.fixture(params=COMMANDS)
def main(request):
    """Of a command; skipped where it needs torch and there is none."""
    module = COMMANDS[request.param].module
    if module.startswith("convert"):
        pytest.importorskip("torch")
    return importlib.import_module(module).main


@pytest.fixture
def kinds(main, monkeypatch) -> list[tuple[list[str], type]]:
    """The words that choose settings among the command's, and their class."""
    given: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setitem(
            main.__globals__, "run_command", lambda _, kind, *__, **___: given.append(kind)
        )
        main([])
    (kind,) = given
    if isinstance(kind, type):
        return [([], kind)]
    parts = [unpacked(part) for part in get_args(kind)]
    return [([marks[0].name], part) for part, _, marks in parts]


def declarations(settings: type) -> dict[str, Any]:
    return get_type_hints(settings, include_extras=True)


def required(settings: type) -> dict[str, str]:
    """Values for the fields that have none, all of them folders."""
    fields = dataclasses.fields(settings)
    return {field.name: field.name for field in fields if field.default is dataclasses.MISSING}


def test_every_number_has_a_range(kinds):
    def open_ended(declared: Any) -> bool:
        kind, parts, _ = unpacked(declared)
        inner = [part for part in parts if kind is not Literal]
        return (kind in (int, float) and not bounds(declared)) or any(map(open_ended, inner))

    for _, settings in kinds:
        assert [name for name, kind in declarations(settings).items() if open_ended(kind)] == []


def refusal(make: Callable[..., Any], *values: Any, **fields: Any) -> str:
    """Why something is not made; empty if it is."""
    try:
        make(*values, **fields)
    except InputError as error:
        return str(error)
    return ""


def test_a_wrong_value_is_refused_from_python_and_from_yaml(kinds, tmp_path):
    file = tmp_path / "settings.yaml"
    for _, settings in kinds:
        good = required(settings)
        assert dataclasses.replace(settings(**good)) == settings(**good)
        for name, declared in declarations(settings).items():
            for value in wrong_values(declared):
                said = refusal(settings, **good | {name: value})
                file.write_text(yaml.safe_dump(good | {name: value}))
                assert (name, value, refusal(settings_from_yaml, settings, file)) == (
                    name, value, f"{file}: {said}"
                )  # fmt: skip
                assert said.startswith(f"{name} "), value
                assert [word for word in named(declared) if word not in said] == []


def flag(name: str, declared: Any) -> str:
    named = [mark.name for mark in unpacked(declared)[2] if getattr(mark, "name", None)]
    return "--" + (named or [name])[0].replace("_", "-")


@pytest.mark.parametrize("wrong", ["nan", "out of range"])
def test_wrong_flags_are_named_together_and_nothing_is_made(
    main, kinds, wrong, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for chosen, settings in kinds:
        typed = {
            flag(name, declared): str(values[-1]).strip("[]") if wrong != "nan" else wrong
            for name, declared in declarations(settings).items()
            if (values := out_of_range(declared))  # other fields take any text
        }
        if typed:
            with pytest.raises(SystemExit) as ended:
                main([*chosen, *required(settings), *itertools.chain(*typed.items())])
            said = capsys.readouterr().err
            assert ended.value.code == 2
            assert [x for x in typed.items() if f"{x[0]} {x[1]}, expected " not in said] == []
    assert os.listdir(tmp_path) == []


def test_choices_and_ranges_are_named():
    with pytest.raises(InputError) as refused:
        TrainConfig(precision="fp16", epochs=0, lora_dropout=1, micro_batch_size="many", seed=-1)
    assert str(refused.value).split("; ") == [
        "precision fp16, expected bf16 or fp32",
        "lora_dropout 1, expected a number, at least 0 and below 1",
        "epochs 0, expected a whole number, at least 1",
        "micro_batch_size many, expected a whole number, at least 1 or auto",
        "seed -1, expected a whole number, at least 0 and at most 4294967295",
    ]


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "not YAML .*an alias or anchor.*line 1"),
        ("seed: &x 1\nepochs: *x", "not YAML .*an alias or anchor.*line 1"),
        ("seed: " + "[" * 50_000, "nested too deeply"),
        ("- " * 50_000, "nested too deeply"),
        ("\n".join(" " * i + "a:" for i in range(400)), "nested too deeply"),
        ("1: a\nnull: b\ntrue: c", "1 is no such field; .*None is no such field"),
        ("? [a]\n: b", "not YAML .*unhashable"),
        ("seed: 1\nepochs: 2\nseed: 3", "not YAML .*the field seed twice.*line 3"),
        ("seed: !!int abc", "not YAML .*a tag .*int.*line 1"),
        ("seed: !!python/object/apply:os.getcwd []", "not YAML .*a tag .*line 1"),
        ("seed: 2001-99-99", "not YAML .*month"),
        ("seed: " + "9" * 5000, "not YAML .*digits"),
        ("seed: 2001-01-01", "seed .*, expected a whole number"),
        ("a: 1\n---\nb: 2", "not YAML .*single document"),
        ("a: \x1b[31m", "not YAML .*special characters"),
        ("a: " + "x" * 100_000, "100,003 characters; expected lines"),
        ("[1, 2]", "expected lines of `field: value`, found"),
        ("0", "expected lines of `field: value`, found '0'"),
    ],
)
def test_hostile_yaml_is_one_message_in_bounded_time(text, message, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    start = time.monotonic()
    with pytest.raises(InputError) as refused:
        settings_from_yaml(TrainConfig, file)
    said = " ".join(str(refused.value).split())
    assert said.startswith(f"{file}: ")
    assert re.search(message, said)
    assert time.monotonic() - start < 10


def test_a_value_without_end_is_shown_by_its_beginning():
    value: list[Any] = ["x"]
    for _ in range(60):
        value = [value, value]
    assert refusal(TrainConfig, seed=value).startswith("seed [[[")


def test_an_empty_yaml_file_says_nothing_and_a_pipe_is_none(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert settings_from_yaml(TrainConfig, tmp_path / "a.yaml") == TrainConfig()
    os.mkfifo(tmp_path / "pipe")
    assert "a named pipe" in refusal(settings_from_yaml, TrainConfig, tmp_path / "pipe")


@pytest.mark.real
def test_every_wrong_file_of_the_collection_is_refused(assets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = sorted((assets.parent / "cases" / "yaml").iterdir())
    assert files
    for file in files:
        name = file.stem.partition("__")[0]
        with pytest.raises(SystemExit) as ended:
            train.lora.main(["--config", str(file)])
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert f"{file}: {name} " in said
        assert all(word in said for word in named(declarations(TrainConfig)[name]))
    assert os.listdir(tmp_path) == []
