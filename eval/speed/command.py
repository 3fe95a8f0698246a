"""`python -m eval.speed train|generate|suite`: how fast, as ratios from one call."""

from collections.abc import Sequence
from typing import Annotated

import tyro

from eval.speed.generate import GenerateSpeed, measure_generation
from eval.speed.suite.run import SuiteSpeed, measure_suite
from eval.speed.train import TrainSpeed, measure_training
from jllama.cli.command import run_command

What = (
    Annotated[TrainSpeed, tyro.conf.subcommand("train")]
    | Annotated[GenerateSpeed, tyro.conf.subcommand("generate")]
    | Annotated[SuiteSpeed, tyro.conf.subcommand("suite")]
)


def measure(config: TrainSpeed | GenerateSpeed | SuiteSpeed) -> None:
    """What the first argument names."""
    if isinstance(config, GenerateSpeed):
        measure_generation(config)
    elif isinstance(config, SuiteSpeed):
        measure_suite(config)
    else:
        measure_training(config)


def main(argv: Sequence[str] | None = None) -> None:
    run_command(measure, What, argv, name="speed")  # type: ignore[arg-type]
