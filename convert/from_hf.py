"""Hugging Face's files to a model folder, one block in memory at a time.

    python -m convert.from_hf ~/Llama-2-7b-hf models/llama-2-7b

Rows of q and k are put back into Meta's order; every value is kept. A model that came to Hugging
Face from Meta gives the same tensors, and the same certificate of them, as Meta's own files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from convert.blocks import to_model_folder
from convert.dtypes import Dtype
from convert.hf.files import open_hf
from convert.hf.stored import PICKLED, SAFETENSORS
from convert.hf.tokenizer import ORIGINAL, read_hf_tokenizer
from convert.meta.shards import shard_files
from jllama.cli.command import run_command
from jllama.cli.terminal import command_line, console
from jllama.config import BaseChoice, BaseSkip, asked_base
from jllama.errors import InputError, checked
from jllama.folders.files import check_destination
from jllama.folders.json_files import read_bytes
from jllama.folders.model import CONFIG, refuse_other_kinds
from jllama.text.hf_files import TOKENIZER_JSON
from jllama.text.tokenizer import FILE_NAME


@checked
class FromHf:
    """Converts a Hugging Face LLaMA to a model folder."""

    src: Annotated[Positional[Path], arg(metavar="SRC")]
    """Folder with config.json, *.safetensors (or pytorch_model*.bin) and a tokenizer."""
    dst: Annotated[Positional[Path | None], arg(metavar="DST")] = None
    """Folder to make; by default models/ and the name of SRC."""
    tokenizer: Path | None = None
    """A tokenizer.model or tokenizer.json, or a folder with the files; by default what SRC has."""
    dtype: Dtype | None = None
    """Stores every tensor in this dtype, rounded once; by default each as it is."""
    base: BaseChoice = "stored"
    """Stores the linears of the blocks in 8 or 4 bits: int8, int4 or nf4."""
    base_skip: BaseSkip = "none"
    """With --base: linears that stay as they are."""

    def __post_init__(self):
        asked_base(self.base, self.base_skip)


def convert(settings: FromHf) -> None:
    """Makes the model folder, whole or not at all.

    Raises:
        InputError: if the files are damaged or contradict each other, or the disk is too small.
    """
    src, dst = settings.src, settings.dst or Path("models") / settings.src.resolve().name
    check_destination(dst)
    refuse_other_kinds(src)
    if not (src / CONFIG).exists() and shard_files(src):
        raise InputError(f"{src}: found Meta's files; run: {command_line('from-meta', src, 'DST')}")
    weights = open_hf(src)
    place = settings.tokenizer or src
    if place.is_dir():
        tokenizer = read_hf_tokenizer(place)
    else:
        name = TOKENIZER_JSON if place.suffix == ".json" else FILE_NAME
        tokenizer, place = {name: read_bytes(place, f"a {name}")}, place.parent
    to_model_folder(
        weights,
        tokenizer,
        place,
        dst,
        settings.dtype,
        asked_base(settings.base, settings.base_skip),
    )
    read = {CONFIG, *tokenizer, *(file.name for file in weights.files), ORIGINAL.parts[0]}
    used = read | {SAFETENSORS.table, PICKLED.table}
    if left := sorted(file.name for file in src.iterdir() if file.name not in used):
        console.print(f"left out, for nothing here reads it: {', '.join(left)}")
    console.print("next: " + command_line("train", "--model", dst, "--data", "FILE"))


def main(argv: Sequence[str] | None = None) -> None:
    run_command(convert, FromHf, argv, name="from-hf", gpu=False)


if __name__ == "__main__":
    main()
