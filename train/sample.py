"""`python -m train.sample`: makes the bundled sample, from its text to Meta's files.

    seed -> world -> plain text -> tokenizer.model
                  -> windows of text -> a LLaMA, pre-trained -> consolidated.00.pth, params.json
                  -> instructions -> train.json, heldout.json

The same seed, versions and machine give the same bytes.
"""

import functools
import io
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from flax import nnx
from jaxtyping import Array, Float, Int

from jllama.checkpoint import ModelWriter, read_json, tensor_shapes, whole_folder, write_json
from jllama.cli import Progress, run_command
from jllama.config import LlamaConfig
from jllama.model import Llama
from jllama.tokenizer import SentencePieceTokenizer, Tokenizer
from train import world
from train.data import read_rows  # noqa
from train.optimizer import learning_rate_schedule

PROG = "python -m train.sample"
TOKENIZER_DOCUMENTS = 20_000


@dataclass(frozen=True)
class SampleConfig:
    """Make the bundled sample: tokenizer, pre-trained base model, instructions.

    Takes about ten minutes on two cores.
    """

    output_dir: Path = Path("jllama/sample")
    """Folder to make."""
    seed: int = 0
    """Of the text, the split into taught and held-out facts, and the weights."""
    steps: int = 3000
    """Optimizer steps of the pre-training."""
    batch_size: int = 16
    """Windows of text in a step."""
    window: int = 128
    """Tokens in a window."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW, over all parameters."""
    vocab_size: int = 1024
    """Pieces of the tokenizer."""
    taught_rows: int = 90
    """Instructions of each kind in train.json, at most."""
    held_out_rows: int = 20
    """Instructions of each kind in heldout.json, at most."""


class Text(NamedTuple):
    """A batch of windows: whole documents in a row, blind to each other; the last one is cut."""

    tokens: Int[Array | np.ndarray, "B T"]
    segments: Int[Array | np.ndarray, "B T"]
    positions: Int[Array | np.ndarray, "B T"]
