"""Wrong input: the one exception that means it, and settings that raise it when they are made.

A field of settings is declared once, with its type and its range:

    steps: AtLeast1 = 100
    shape: Literal["linear", "cosine"] = "linear"
    parts: Annotated[str, SomeOf(("head", "layers"))] = "head,layers"
"""

import dataclasses
import difflib
import functools
import reprlib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import pydantic
from pydantic import Field
from pydantic_core import CoreSchema, ErrorDetails, core_schema

LARGEST = 2**31 - 1  # the whole numbers of compiled functions
AtLeast0 = Annotated[int, Field(ge=0, le=LARGEST)]
AtLeast1 = Annotated[int, Field(ge=1, le=LARGEST)]
AtLeast2 = Annotated[int, Field(ge=2, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Positive = Annotated[float, Field(gt=0)]
NotEmpty = Annotated[str, Field(min_length=1)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

Settings = TypeVar("Settings")


class InputError(Exception):
    """What was found, what was expected and what to do. A command prints it and exits with 2."""


class WrongFields(InputError):
    """Values that the declarations of settings do not allow.

    Args:
        settings: the class.
        problems: names of fields, and what is wrong with each.
    """

    def __init__(self, settings: type, problems: Sequence[tuple[str, str]]):
        super().__init__(settings, problems)
        self.settings, self.problems = settings, problems

    def __str__(self) -> str:
        return "; ".join(f"{name} {wrong}" for name, wrong in self.problems)


@dataclasses.dataclass(frozen=True)
class SomeOf:
    """Declares text that names some of `choices`, each once, with commas between them."""

    choices: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, text: str) -> str:
        names = [name.strip() for name in text.split(",")]
        if len(set(names)) < len(names) or not set(names) <= set(self.choices):
            raise ValueError
        return ",".join(names)

    @property
    def words(self) -> str:
        return f"some of {', '.join(self.choices)}, each once, with commas between them"


@dataclasses.dataclass(frozen=True)
class SizesOf:
    """Declares text that gives some of `names` a size, each at most once: data=2,fsdp=4."""

    names: tuple[str, ...]

    @property
    def words(self) -> str:
        example = f"{self.names[0]}=2,{self.names[1]}=4"
        return f"sizes of {', '.join(self.names)}, each at most once, as {example}"

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, text: str) -> str:
        return ",".join(f"{name}={size}" for name, size in self.read(text).items())

    def read(self, text: str) -> dict[str, int]:
        """data=2,fsdp=4  ->  {"data": 2, "fsdp": 4}

        Raises:
            ValueError: if it is no such text.
        """
        pairs = [part.strip().partition("=") for part in text.split(",") if text.strip()]
        sizes = {name: int(size) for name, _, size in pairs if size.isascii() and size.isdigit()}
        if len(sizes) < len(pairs) or not all(sizes.values()) or not sizes.keys() <= {*self.names}:
            raise ValueError
        return sizes


@dataclass_transform(frozen_default=True)
def checked(settings: type[Settings]) -> type[Settings]:
    """A frozen dataclass whose fields are checked by their declarations, however it is made.

        @checked
        class Warmup:
            steps: AtLeast1 = 100
            shape: Literal["linear", "cosine"] = "linear"

        Warmup(0, "cubic")  ->  InputError: steps 0, expected a whole number, at least 1;
                                shape cubic, expected linear or cosine

    Numbers are finite; text becomes a number where it is one, for flags are text and YAML reads
    5e-5 as text. What only several fields together can tell is checked by `__post_init__`.

    Raises:
        WrongFields: everything that is wrong with the fields.
    """
    made = pydantic.dataclasses.dataclass(
        frozen=True, config=pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
    )(settings)
    check, declared = made.__init__, get_type_hints(made, include_extras=True)
    names = [field.name for field in dataclasses.fields(made)]
    switches = {name for name in names if in_words(declared[name]) == _KINDS[bool]}

    @functools.wraps(check)
    def init(self: Any, *values: Any, **named: Any) -> None:
        given = {**dict(zip(names, values, strict=False)), **named}
        wrong: dict[tuple[str, str], str] = {}  # a field and its value are named once
        for name in filter(given.__contains__, names):  # to Python and pydantic True is 1
            value = given[name]
            for part in value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, bool) != (name in switches):
                    wrong[name, _shown(part)] = f", expected {in_words(declared[name])}"
        try:
            check(self, *values, **named)
        except pydantic.ValidationError as error:
            for problem in error.errors():
                name, found, expected = _problem(problem, declared)
                wrong.setdefault((name, found), expected)
        except InputError:  # of __post_init__
            if not wrong:
                raise
        if wrong:
            problems = [(name, found + expected) for (name, found), expected in wrong.items()]
            raise WrongFields(made, problems) from None

    made.__init__ = init  # type: ignore[method-assign]
    return made  # type: ignore[return-value]


def _problem(problem: ErrorDetails, declared: dict[str, Any]) -> tuple[str, str, str]:
    """A field's name, what was found and what was expected."""
    name, found = str(problem["loc"][0]), _shown(problem["input"])
    if problem["type"] == "missing":
        return name, "is", " missing"
    if name in declared:
        words = in_words(declared[name], largest=problem["type"] == "less_than_equal")
        return name, found, f", expected {words}"
    near = difflib.get_close_matches(name, declared, 1)
    known = f"did you mean {near[0]}?" if near else f"there are {', '.join(declared)}"
    return name, "is", f" no such field; {known}"


_SHORT = reprlib.Repr()  # a few lists of each other, each twice in the next, have no end
_SHORT.maxstring = _SHORT.maxother = 80


def _shown(value: Any) -> str:
    word = isinstance(value, str) and value.isprintable() and len(value.split()) == 1
    return (value if word else _SHORT.repr(value))[:80]


def in_words(declared: Any, largest: bool = False) -> str:
    """What a declaration allows.

    Annotated[int, Field(ge=1)] | Literal["auto"]  ->  a whole number, at least 1 or auto

    Args:
        largest: whether to name `LARGEST`, too.
    """
    kind, *marks = get_args(declared) if get_origin(declared) is Annotated else (declared,)
    origin, parts = get_origin(kind), get_args(kind)
    for mark in marks:
        if isinstance(mark, SomeOf | SizesOf):
            return mark.words
    if origin is Literal:
        return " or ".join(", ".join(map(str, filter(None, parts))).rsplit(", ", 1))
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(part, largest) for part in parts if part is not type(None))
    if origin is tuple:
        return f"a list, each {in_words(parts[0], largest)}"
    bounds = [
        f"{words} {getattr(bound, side)}"
        for mark in marks
        for bound in getattr(mark, "metadata", ())
        for side, words in _BOUNDS.items()
        if hasattr(bound, side) and (largest or getattr(bound, side) != LARGEST)
    ]
    return ", ".join([_KINDS.get(kind, kind.__name__), *filter(None, [" and ".join(bounds)])])


_KINDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"
}  # fmt: skip
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below",
           "min_length": "of a length of at least"}  # fmt: skip
