"""What the commands that write a model folder in another format share: flags, reading, the end."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from tyro.conf import Positional, arg

from convert.blocks import block_progress, fingerprint
from convert.change.merge import Merge, show_report
from convert.dtypes import BY_NAME, Dtype, Stored, cast, forget
from jllama.cli.terminal import console
from jllama.config import Base, tensor_shapes
from jllama.errors import InputError, checked
from jllama.folders.adapter import read_passport, weights_file
from jllama.folders.codes import matrix_of
from jllama.folders.files import bytes_begun, check_destination, room_for, whole_folder
from jllama.folders.json_files import write_json
from jllama.folders.manifest import manifest_sha256, read_manifest
from jllama.folders.model import check_manifest, read_base, read_block, read_config
from jllama.folders.peft_config import PEFT_CONFIG
from jllama.quantize.weights import quantised


@checked
class Outgoing:
    """The flags of every export, to a folder or to a file."""

    src: Annotated[Positional[Path], arg(metavar="SRC")]
    """The model folder."""
    dst: Annotated[Positional[Path], arg(metavar="DST")]
    """The folder to make."""
    adapter: Annotated[Path | None, arg(metavar="DIR")] = None
    """PEFT adapter to merge in: W + scale * B A, summed in fp32 and rounded once."""
    force: bool = False
    """Merge an adapter that was trained on a different base model."""


@checked
class Export(Outgoing):
    """The flags of an export to a folder."""

    dtype: Dtype | None = None
    """Writes every tensor in this dtype; by default each in its own, and named for one that is
    stored in 8 or 4 bits."""


class Model:
    """A model folder on its way out: iterating gives the tensors of block after block.

    Args:
        asked: the dtype that the user names; None leaves each tensor in its own.
        choices: the dtypes that can be named.
        vectors: the dtype of the norms, where the format has one for them.

    Raises:
        InputError: if the folder is incomplete or damaged, or the adapter does not fit.
    """

    def __init__(
        self,
        settings: Outgoing,
        asked: str | None,
        choices: Mapping[str, np.dtype],
        vectors: np.dtype | None = None,
    ):
        self.src, self.adapter = settings.src, settings.adapter
        self.config = read_config(self.src)
        self.blocks = tensor_shapes(self.config)
        self.shapes = {
            name: shape for block in self.blocks.values() for name, shape in block.items()
        }
        check_manifest(self.src, self.config)
        manifest, self.base = read_manifest(self.src), read_base(self.src)
        self.trained_on: Base | None = None  # the format that the adapter's base was held in
        if settings.adapter is not None:
            self.trained_on = Base.of(read_passport(settings.adapter).get("base"))
        base = self.base or self.trained_on
        if base is not None and asked is None:
            raise InputError(
                f"the weights come from {base.words}, so none has a dtype of its own; name the one "
                f"to write: --dtype {', '.join(choices)}"
            )
        dtype = choices[asked] if asked else None
        self.dtypes: dict[str, np.dtype] = {}
        for name, shape in self.shapes.items():
            fixed = vectors if vectors is not None and len(shape) == 1 else dtype
            self.dtypes[name] = fixed or np.dtype(manifest["tensors"][name]["dtype"])
        self.stored = Stored(self.config, self.dtypes)
        self.merge: Merge | None = None
        if settings.adapter is not None:
            self.merge = Merge(self.src, settings.adapter, self.dtypes, force=settings.force)
        self.advance: Callable[[int], None] = lambda size: None

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for given in self.unrounded():
            yield {name: cast(tensor, self.dtypes[name]) for name, tensor in given.items()}

    def unrounded(self) -> Iterator[dict[str, np.ndarray]]:
        """The same, but not yet in the dtype asked for, unless merging has already rounded it."""
        for block in self.blocks:
            tensors = read_block(self.src, block)
            whole = self._matrices(block, tensors)
            if self.merge is None:
                yield whole
            else:
                yield self.merge(block, whole, tensors if self.trained_on else None)
            self.advance(sum(tensor.nbytes for tensor in tensors.values()))
            forget(tensors.values())

    def _matrices(self, block: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A block's tensors; in fp32 those that are in codes, or were while the adapter learned."""
        found: dict[str, np.ndarray] = {}
        base = self.base or self.trained_on
        for name, shape in self.blocks[block].items():
            if base is None or not base.holds(name):
                found[name] = tensors[name]
                continue
            if self.base is not None:
                found[name] = matrix_of(name, tensors, (shape[0], shape[1]), base)
            else:
                weight = quantised(jnp.asarray(tensors[name]), base)
                found[name] = np.asarray(weight.matrix(jnp.float32))
        return found


@contextlib.contextmanager
def exporting(settings: Export) -> Iterator[tuple[Path, Model]]:
    """The folder to fill, and the model to fill it with; says in the end what was written.

    An interrupted export goes on where it was. A merged one has `merge.json`, what merging changed.

    Raises:
        InputError: as `Model`, and if the folder exists, the disk is too small, or what would be
            written is not finite.
    """
    check_destination(settings.dst)
    model, dst = Model(settings, settings.dtype, BY_NAME), settings.dst
    origin: dict[str, Any] = {"manifest": manifest_sha256(model.src), "settings": str(settings)}
    if settings.adapter is not None:
        adapter = settings.adapter
        origin["adapter"] = fingerprint([weights_file(adapter), adapter / PEFT_CONFIG])
    with room_for(model.stored.bytes - bytes_begun(dst), dst), whole_folder(dst, origin) as folder:
        with block_progress("exporting", len(model.blocks)) as model.advance:
            yield folder, model
        if model.merge is not None:
            report = model.merge.report()
            write_json(folder / "merge.json", report)
            show_report(report)
    console.print(model.stored.words)
    console.print(f"wrote {dst}: {', '.join(_names(dst))}")


def _names(folder: Path) -> list[str]:
    """The files of a folder, the many of one model as one."""
    names = sorted(path.name for path in folder.iterdir())
    parts = [name for name in names if name.startswith("model-")]
    return [*([f"{parts[0]} ... {parts[-1]}"] if parts else []), *sorted({*names} - {*parts})]
