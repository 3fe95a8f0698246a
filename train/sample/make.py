"""`python -m train.sample`: makes the bundled sample, from its text to Meta's files.

    seed -> world -> plain text -> tokenizer.model
                  -> windows of text -> a LLaMA, pre-trained -> consolidated.00.pth, params.json
                  -> instructions -> train.json, heldout.json

The same seed and versions give the same bytes on the same machine.
"""

import dataclasses
import functools
import io
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from flax import nnx
from jaxtyping import Array, Float, Int

from jllama import bundled
from jllama.attention import Documents
from jllama.cli import children
from jllama.cli.command import run_command
from jllama.cli.terminal import Progress, command_line, console
from jllama.config import PRESETS, tensor_shapes
from jllama.errors import AtLeast1, Positive, Seed, checked
from jllama.folders.files import whole_folder
from jllama.folders.json_files import read_json, write_json
from jllama.folders.model import ModelWriter
from jllama.model import Llama, named_arrays
from jllama.text.tokenizer import FILE_NAME, SentencePieceTokenizer, Tokenizer
from train.data.documents import lay_out
from train.optimizer import learning_rate_schedule
from train.sample import world

COMMAND = command_line("sample")
TOKENIZER_DOCUMENTS = 20_000
SHORTEST = 5  # no document has fewer tokens


@checked
class SampleConfig:
    """Make the bundled sample: a tokenizer, a small pre-trained LLaMA, instructions."""

    output_dir: Path = Path("jllama/sample")
    """Folder to make."""
    seed: Seed = 0
    """Seed of the text, the split into taught and held-out facts, and the weights."""
    steps: AtLeast1 = 2600
    """Optimizer steps of the pre-training."""
    batch_size: AtLeast1 = 16
    """Windows of text in a step."""
    window: AtLeast1 = 128
    """Tokens in a window."""
    learning_rate: Positive = 3e-3
    """Peak learning rate of AdamW, over all parameters."""


MODEL = PRESETS["sample"]
TAUGHT_ROWS, HELD_OUT_ROWS = 90, 20  # of each kind of instruction, at most

README = """\
# The bundled sample

A small LLaMA in Meta's file format, with instructions to fine-tune it on. Everything here was
generated or trained by this project itself, with

    {command}

| file | what |
|---|---|
| `consolidated.00.pth` | the base model: {model.parameter_count:,} parameters in bf16 |
| `params.json` | {model.n_layers} layers, dim {model.dim}, {model.n_heads} heads, \
{model.n_kv_heads} key-value heads |
| `tokenizer.model` | SentencePiece BPE, {model.vocab_size:,} pieces |
| `train.json` | {taught} instructions to learn from |
| `heldout.json` | {held_out} instructions in the same words about other things |

The base read {tokens:,} tokens of plain text in {steps:,} steps; its loss over the last 100 was
{loss:.3f} nats a token. The text is about opposites, plurals, past tenses, kinds of things,
capitals, colours, young animals, first letters, sums and hexadecimal numbers; it holds every fact
that the instructions ask for but the held-out sums, and no question or instruction. LoRA teaches
the model to answer them. The whole world is in `train/sample/facts.py` and
`train/sample/world.py`.

Licence: Apache-2.0, as the project.
"""


class Text(NamedTuple):
    """A batch of windows: documents one after the other, blind to each other."""

    tokens: Int[Array | np.ndarray, "B T"]
    positions: Int[Array | np.ndarray, "B T"]  # in the document
    documents: tuple[Documents, ...]


def make_sample(config: SampleConfig) -> None:
    """Writes the whole folder, or nothing."""
    with whole_folder(config.output_dir) as folder:
        facts = world.make_world(config.seed)
        taught = world.instructions(facts.taught, TAUGHT_ROWS, config.seed)
        held_out = world.instructions(facts.held_out, HELD_OUT_ROWS, config.seed)

        documents = itertools.islice(world.plain_text(facts, config.seed), TOKENIZER_DOCUMENTS)
        prompts = [row["instruction"] for row in taught]
        tokenizer_model = train_tokenizer([*documents, *prompts], MODEL.vocab_size)
        tokenizer = SentencePieceTokenizer(tokenizer_model)

        text = windows(
            world.plain_text(facts, config.seed), tokenizer, config.batch_size, config.window
        )
        model, loss = pretrain(config, text)
        write_meta(model, tokenizer_model, folder)
        (folder / "train.json").write_text(world.as_json(taught), encoding="utf-8")
        (folder / "heldout.json").write_text(world.as_json(held_out), encoding="utf-8")
        readme = describe(config, loss, len(taught), len(held_out))
        (folder / "README.md").write_text(readme, encoding="utf-8")
    console.print(f"wrote {config.output_dir}")
    console.print(f"next: {command_line('from-meta', config.output_dir, bundled.MODEL)}")


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model with LLaMA 1's and 2's settings; one thread, so the same bytes."""
    lines = (line for text in texts for line in text.split("\n"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def windows(
    documents: Iterator[str], tokenizer: Tokenizer, batch_size: int, window: int
) -> Iterator[Text]:
    """Documents as bos ... eos in windows that begin with a document and cut their last one.

    bos 4 eos, bos 5 6 7 eos  ->  tokens [1 4 2 1 5 6], positions [0 1 2 0 1 2]
    """

    def one_window():
        tokens, positions = [], []
        while len(tokens) < window:
            ids = [tokenizer.bos_id, *tokenizer.encode(next(documents)), tokenizer.eos_id]
            tokens += ids
            positions += range(len(ids))
        return tokens[:window], positions[:window]

    shapes = ((-(-window // SHORTEST), window),)
    while True:
        rows = zip(*(one_window() for _ in range(batch_size)), strict=True)
        tokens, positions = (np.array(column, np.int32) for column in rows)
        lengths = [np.diff(np.flatnonzero(row == 0), append=window) for row in positions]
        yield Text(tokens, positions, lay_out(lengths, tokens.shape, shapes))


def pretrain(config: SampleConfig, text: Iterator[Text]) -> tuple[Llama, float]:
    """Trains every parameter in fp32; returns the model and its loss over the last steps."""
    graphdef, weights = nnx.split(Llama(MODEL, rngs=nnx.Rngs(config.seed)))
    schedule = learning_rate_schedule(
        "cosine", config.learning_rate, round(0.05 * config.steps), config.steps
    )
    matrices = jax.tree.map(lambda leaf: leaf.ndim > 1, weights)  # norms are not decayed
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=matrices),
    )
    moments = optimizer.init(weights)
    losses = []
    tokens_per_step = config.batch_size * config.window
    start = time.perf_counter()
    with Progress("pre-train", config.steps, "steps") as progress:
        for step in range(1, config.steps + 1):
            weights, moments, loss = pretrain_step(
                weights, moments, next(text), graphdef=graphdef, optimizer=optimizer
            )
            losses.append(float(loss))
            rate = step * tokens_per_step / (time.perf_counter() - start)
            progress.advance(f"loss {losses[-1]:.4f}  {rate:,.0f} tokens/s")
    return nnx.merge(graphdef, weights), float(np.mean(losses[-100:]))


@functools.partial(
    jax.jit, static_argnames=("graphdef", "optimizer"), donate_argnames=("weights", "moments")
)
def pretrain_step(
    weights: nnx.State,
    moments: optax.OptState,
    text: Text,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
) -> tuple[nnx.State, optax.OptState, Float[Array, ""]]:
    """One step of full training; returns the average cross-entropy (nats) of next tokens."""

    def average_loss(weights):
        model = nnx.merge(graphdef, weights, copy=True)
        logits = model(text.tokens, text.positions, text.documents)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, text.tokens[:, 1:])
        # A document's end does not foretell the next document.
        inside = text.positions[:, 1:] > 0
        return jnp.sum(losses * inside) / jnp.sum(inside)

    loss, gradient = jax.value_and_grad(average_loss)(weights)
    updates, moments = optimizer.update(gradient, moments, weights)
    return optax.apply_updates(weights, updates), moments, loss


def write_meta(model: Llama, tokenizer_model: bytes, folder: Path) -> None:
    """consolidated.00.pth, params.json and tokenizer.model, in bf16, by way of a model folder.

    The conversion is a process of its own: `train` imports neither `convert` nor torch.
    """
    tensors = {
        name: np.asarray(leaf.astype(jnp.bfloat16))
        for name, leaf in named_arrays(nnx.state(model)).items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        source, meta = Path(scratch) / "model", Path(scratch) / "meta"
        source.mkdir()
        writer = ModelWriter(source, MODEL, COMMAND)
        for block, shapes in tensor_shapes(MODEL).items():
            writer.write_block(block, {name: tensors[name] for name in shapes})
        writer.finish({FILE_NAME: tokenizer_model})
        children.run("convert.to_meta", [source, meta])
        # As in Meta's files of Llama 2, whose readers take the number from the tensors.
        params = read_json(meta / "params.json") | {"vocab_size": -1}
        write_json(folder / "params.json", params)
        for name in ("consolidated.00.pth", FILE_NAME):
            shutil.copyfile(meta / name, folder / name)


def describe(config: SampleConfig, loss: float, taught: int, held_out: int) -> str:
    """The README of the sample."""
    flags = " ".join(
        f"--{field.name.replace('_', '-')} {getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name != "output_dir" and getattr(config, field.name) != field.default
    )
    tokens = config.steps * config.batch_size * config.window
    return README.format(
        command=f"{COMMAND} {flags}".strip(),
        model=MODEL,
        steps=config.steps,
        tokens=tokens,
        loss=loss,
        taught=taught,
        held_out=held_out,
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_command(make_sample, SampleConfig, argv, name="sample")
