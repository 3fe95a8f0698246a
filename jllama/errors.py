"""Wrong input: the one exception that means it, and settings that raise it when they are made."""

import dataclasses
import functools
from typing import Any, TypeVar, dataclass_transform, get_type_hints

import pydantic

Settings = TypeVar("Settings")


class InputError(ValueError):
    """What was found, what was expected and what to do. A command prints it and exits with 2."""


@dataclass_transform(frozen_default=True)
def checked(settings: type[Settings]) -> type[Settings]:
    """A frozen dataclass whose fields are checked by their declarations, however it is made.

        @checked
        class Warmup:
            steps: Annotated[int, Field(ge=1)] = 100
            shape: Literal["linear", "cosine"] = "linear"

        Warmup(0, "cubic")  ->  InputError: steps 0, expected greater than or equal to 1;
                                shape 'cubic', expected 'linear' or 'cosine'

    Numbers are finite; text becomes a number where it is one, for YAML reads 5e-5 as text. What
    only several fields together can tell is checked by `__post_init__`.

    Raises:
        InputError: everything that is wrong with the fields.
    """
    made = pydantic.dataclasses.dataclass(
        frozen=True, config=pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
    )(settings)
    check = made.__init__
    names = [field.name for field in dataclasses.fields(made)]

    @functools.wraps(check)
    def init(self: Any, *values: Any, **named: Any) -> None:
        given = {**dict(zip(names, values, strict=False)), **named}
        wrong = _switches(made, given)
        try:
            check(self, *values, **named)
        except pydantic.ValidationError as error:
            wrong += _in_words(error)
        if wrong:
            raise InputError("; ".join(wrong)) from None

    made.__init__ = init  # type: ignore[method-assign]
    return made  # type: ignore[return-value]


def _switches(settings: type, given: dict[str, Any]) -> list[str]:
    """Fields for which True or False was given but something else is expected: no 1 and no 0."""
    hints = get_type_hints(settings)
    return [
        f"{name} {value}, expected a number or text"
        for name, value in given.items()
        if isinstance(value, bool) and name in hints and "bool" not in str(hints[name])
    ]


def _in_words(error: pydantic.ValidationError) -> list[str]:
    """One sentence a field, whichever of its types was missed; __post_init__ speaks for itself."""
    own, expected = [], dict[str, list[str]]()
    for problem in error.errors():
        said = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if problem["type"] == "value_error":
            own.append(said)
        elif problem["type"] == "unexpected_keyword_argument":
            own.append(f"{problem['loc'][0]}: no such field")
        else:
            expected.setdefault(f"{problem['loc'][0]} {problem['input']!r}", []).append(said)
    return own + [f"{found}, expected {' or '.join(said)}" for found, said in expected.items()]
