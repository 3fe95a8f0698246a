"""Meta's files to a model folder, one block in memory at a time.

    python -m convert.from_meta ~/llama-2-7b models/llama-2-7b

Everything that shapes can tell is checked before the first byte is written, and the folder has
its name only when it is whole. Tensors are copied, never changed: `manifest.json` certifies them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from convert.blocks import to_model_folder
from convert.dtypes import Dtype
from convert.meta.params import PARAMS, read_params
from convert.meta.weights import open_meta
from jllama import bundled
from jllama.cli.command import run_command
from jllama.cli.terminal import command_line, console
from jllama.config import BaseChoice, BaseSkip, asked_base
from jllama.errors import AtLeast1, InputError, Positive, checked
from jllama.folders.files import check_destination
from jllama.folders.json_files import read_bytes
from jllama.folders.model import CONFIG, refuse_other_kinds
from jllama.text.tokenizer import FILE_NAME


@checked
class FromMeta:
    """Converts Meta's consolidated.NN.pth files to a model folder."""

    src: Annotated[Positional[Path], arg(metavar="SRC")] = bundled.SAMPLE
    """Folder with consolidated.NN.pth and params.json; by default the bundled sample."""
    dst: Annotated[Positional[Path | None], arg(metavar="DST")] = None
    """Folder to make; by default models/ and the name of SRC."""
    tokenizer: Path | None = None
    """Meta's tokenizer.model; by default the one in SRC or one folder above."""
    rope_scaling_factor: Positive | None = None
    """How far a scaled rope is stretched; by default 32 for tied models (3.2), 8 for others."""
    max_seq_len: AtLeast1 | None = None
    """The trained context in tokens; by default that of the family."""
    dtype: Dtype | None = None
    """Stores every tensor in this dtype, rounded once; by default each as it is."""
    base: BaseChoice = "stored"
    """Stores the linears of the blocks in 8 or 4 bits: int8, int4 or nf4."""
    base_skip: BaseSkip = "none"
    """With --base: linears that stay as they are."""

    def __post_init__(self):
        asked_base(self.base, self.base_skip)


def convert(settings: FromMeta) -> None:
    """Makes the model folder, whole or not at all.

    Raises:
        InputError: if the files are damaged or contradict each other, or the disk is too small.
    """
    src, dst = settings.src, settings.dst or Path("models") / settings.src.resolve().name
    check_destination(dst)
    refuse_other_kinds(src)
    if (src / CONFIG).is_file() and not (src / PARAMS).exists():
        raise InputError(
            f"{src}: found {CONFIG}; expected Meta's files (consolidated.00.pth, ...). For Hugging "
            f"Face's files: python -m convert.from_hf {src} DST"
        )
    weights = open_meta(src, _params(settings))
    tokenizer = find_tokenizer(settings)
    content = read_bytes(tokenizer, f"Meta's {FILE_NAME}")
    to_model_folder(
        weights,
        {FILE_NAME: content},
        tokenizer.parent,
        dst,
        settings.dtype,
        asked_base(settings.base, settings.base_skip),
    )
    sample = src == bundled.SAMPLE and dst == Path(bundled.MODEL)
    flags = [] if sample else ["--model", dst, "--data", "FILE"]
    console.print("next: " + command_line("train", *flags))


def _params(settings: FromMeta) -> dict:
    """params.json with the flags' values in it."""
    params = read_params(settings.src / PARAMS)
    if settings.rope_scaling_factor is not None and not params.get("use_scaled_rope"):
        raise InputError(
            f"{settings.src / PARAMS} has no use_scaled_rope, so there is nothing to scale; "
            f"drop --rope-scaling-factor"
        )
    for name in ("rope_scaling_factor", "max_seq_len"):
        value = getattr(settings, name)
        params |= {} if value is None else {name: value}
    return params


def find_tokenizer(settings: FromMeta) -> Path:
    """The tokenizer file; InputError if there is none."""
    beside = settings.src.resolve()
    places = [settings.tokenizer or beside / FILE_NAME]
    if settings.tokenizer is None:
        places.append(beside.parent / FILE_NAME)  # where Meta put LLaMA 1's
    file = next((place for place in places if place.exists()), None)
    if file is None:
        raise InputError(
            f"no tokenizer: {' and '.join(map(str, places))} missing; copy Meta's {FILE_NAME} "
            f"into {settings.src} or name it with --tokenizer FILE"
        )
    return file


def main(argv: Sequence[str] | None = None) -> None:
    run_command(convert, FromMeta, argv, name="from-meta", gpu=False)


if __name__ == "__main__":
    main()
