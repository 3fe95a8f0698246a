"""`jllama recipes`: the settings that come with jllama, listed, or one of them as YAML.

jllama recipes                        # name, model, card, memory and speed as planned
jllama recipes 7b-24gb > my.yaml      # to be changed; jllama train --config my.yaml
"""

from collections.abc import Sequence
from typing import Annotated

from tyro.conf import Positional, arg

from jllama.cli.command import run_command
from jllama.cli.terminal import command_line, console, show_table
from jllama.errors import checked
from train.recipes import recipe_file, recipe_names
from train.recipes.plans import planned


@checked
class RecipesConfig:
    """List the recipes, or print one as YAML; jllama train --config NAME trains by it."""

    name: Annotated[Positional[str], arg(metavar="NAME")] = ""
    """A recipe, whose settings are printed and nothing else."""


def recipes(config: RecipesConfig) -> None:
    """Prints the list, or the file of the one that is asked for."""
    if config.name:
        console.print(recipe_file(config.name).read_text(encoding="utf-8"), end="")
        return
    plans, rows = planned(), []
    for name in recipe_names():
        plan = plans.get(name)
        figures = ("", "", "") if plan is None else (
            plan["gpu"], f"{plan['peak_mib']:,.0f}", f"{plan['predicted_tokens_per_second']:,.0f}",
        )  # fmt: skip
        rows.append((name, *figures, what_for(name)))
    show_table(("recipe", "planned for", "peak MiB", "tokens/s", "settings for"), rows)
    console.print(
        "Planned for the card, not measured: rows of 300 tokens, packed; docs/planning.md says "
        "what the figures cover."
    )
    console.print(f"next: {command_line('recipes', '7b-24gb')}, which says how to begin")


def what_for(name: str) -> str:
    """The first line of a recipe, without its full stop."""
    with recipe_file(name).open(encoding="utf-8") as lines:
        return next(lines).removeprefix("# ").rstrip().removesuffix(".")


def main(argv: Sequence[str] | None = None) -> None:
    run_command(recipes, RecipesConfig, argv, name="recipes", gpu=False)
