"""Settings to start from, by name: `jllama train --config 7b-24gb`.

NAME.yaml     the settings; the first line says what for
plans.json    what those for a card are planned to take there
command.py    `jllama recipes`
plans.py      how they are planned
"""

import difflib
from pathlib import Path

from jllama.errors import InputError

RECIPES = Path(__file__).parent


def recipe_names() -> list[str]:
    """Those for cards first, by model and memory."""

    def order(name: str) -> tuple[bool, str, int]:
        model, _, memory = name.partition("-")
        return not memory, model, int(memory.removesuffix("gb") or 0)

    return sorted((file.stem for file in RECIPES.glob("*.yaml")), key=order)


def recipe_file(name: str) -> Path:
    """Where a recipe's settings are.

    Raises:
        InputError: with the nearest name, or all of them, if there is none of this name.
    """
    names = recipe_names()
    if name in names:
        return RECIPES / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, 1, 0.5)
    meant = f"did you mean {near[0]}?" if near else f"the recipes are {', '.join(names)}"
    raise InputError(f"no recipe {name!r}; {meant}")


def settings_file(named: str) -> Path:
    """What `--config` names: a file, or a recipe where there is no such file.

    Raises:
        InputError: if it is neither.
    """
    file = Path(named)
    if file.exists() or file.suffix in (".yaml", ".yml") or len(file.parts) > 1:
        return file
    try:
        return recipe_file(named)
    except InputError as error:
        raise InputError(f"--config {named}: there is no such file, and {error}") from None
