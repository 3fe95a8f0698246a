"""`python -m train.lora`, or `jllama train`: fine-tunes a LLaMA with LoRA, into a run folder."""

import sys
from collections.abc import Sequence

from jllama.cli.command import run_command
from train.config import TrainConfig, read_defaults


def train(config: TrainConfig) -> None:
    """One run; JAX and the rest are imported when the flags are known to be right."""
    from train.run.signals import Stopped
    from train.trainer import Trainer

    try:
        Trainer(config=config).train()
    except Stopped as stopped:
        sys.exit(128 + stopped.number)


def main(argv: Sequence[str] | None = None) -> None:
    run_command(train, TrainConfig, argv, name="train", default=read_defaults)


if __name__ == "__main__":
    main()
