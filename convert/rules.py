"""Fields of a foreign JSON file, and what each must be: params.json and config.json alike."""

import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

Rule = tuple[str, Callable[[Any], bool]]  # in words, and as a test

COUNT: Rule = ("a positive integer", lambda x: type(x) is int and 0 < x < 2**31)
NUMBER: Rule = ("a positive number", lambda x: type(x) in (int, float) and 0 < x < 1e12)
FLAG: Rule = ("true or false", lambda x: type(x) is bool)


def broken(
    content: Mapping[str, Any], rules: Mapping[str, Rule], required: Collection[str]
) -> list[str]:
    """What is wrong with the fields of an object; one that is not required may be absent."""
    return [
        f"{name} is {reprlib.repr(content.get(name))}, expected {words}"
        for name, (words, holds) in rules.items()
        if (not holds(content[name]) if name in content else name in required)
    ]
