"""The bundled sample: a small LLaMA in Meta's files, with instructions, for every command."""

from pathlib import Path

SAMPLE = Path(__file__).parent / "sample"
ROWS, HELD_OUT = SAMPLE / "train.json", SAMPLE / "heldout.json"
MODEL = "models/sample"  # the model folder that it is converted to


def is_missing(model: str | Path) -> bool:
    """Whether a model is the bundled sample, and not converted yet."""
    return str(model) == MODEL and not Path(model).exists()


def convert_sample(folder: Path) -> None:
    """Makes the model folder of the sample.

    Raises:
        InputError: if it cannot be made.
    """
    from jllama.cli import children  # settings that name the sample start no process

    children.run("convert.from_meta", [SAMPLE, folder])


def model_folder(model: str, place: Path) -> Path:
    """The model folder of this name; the sample is converted in `place` if it has none yet."""
    if not is_missing(model):
        return Path(model)
    convert_sample(place / "sample")
    return place / "sample"
