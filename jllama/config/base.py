"""How the linears of the blocks are held: as they are, or in 8 or 4 bits."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np

from jllama.config.choices import PRECISIONS, Precision
from jllama.config.llama import LlamaConfig, tensor_shapes
from jllama.errors import InputError, SomeOf, checked
from jllama.names import HF_LINEARS, LINEAR_CHOICES, linear_names

# How a frozen linear of a block is stored: as the model folder has it, or in codes
# (`jllama.quantize`).
Format = Literal["int8", "int4", "nf4"]
BaseChoice = Literal["stored", "int8", "int4", "nf4"]  # what a user names
BaseSkip = Annotated[str, SomeOf((*LINEAR_CHOICES, "none"))]
GROUP = 64  # inputs that share a scale (int4), weights that share an absmax (nf4)
NESTED = 256  # absmax of nf4 that share an absmax


@checked
class Base:
    """In what format the linears of the blocks are held, where they are not as they were found."""

    format: Format
    skip: tuple[str, ...] = ()  # linears that stay as they are
    double: bool = True  # nf4: whether the absmax are in 8 bits, too

    def __post_init__(self):
        skip = linear_names(",".join(self.skip)) if self.skip else ()
        object.__setattr__(self, "skip", skip)
        if self.format != "nf4" and not self.double:
            raise InputError(f"{self.format} has no double quantisation to leave out")

    @property
    def entry(self) -> dict[str, Any]:
        """As JSON: {"format": "int4", "skip": ["w2"], "double": true}."""
        return {"format": self.format, "skip": list(self.skip), "double": self.double}

    @classmethod
    def of(cls, entry: Mapping[str, Any] | None) -> "Base | None":
        """The inverse of `entry`; None of None."""
        return None if entry is None else cls(**{**entry, "skip": tuple(entry["skip"])})

    @property
    def words(self) -> str:
        """`nf4 without double quantisation, but for w2`."""
        single = " without double quantisation" if not self.double else ""
        return self.format + single + (f", but for {', '.join(self.skip)}" if self.skip else "")

    def holds(self, name: str) -> bool:
        """Whether the weight `layers.0.attention.wq.weight` is in codes."""
        linear = name.removesuffix(".weight").rpartition(".")[2]
        return linear in HF_LINEARS and linear not in self.skip

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
        """The arrays of a matrix `[out, in]` on disk: name -> shape, dtype.

        Two 4-bit codes are a byte there; in memory they are `[out, in]`.
        """
        rows, width = shape
        if self.format == "int8":
            return {"codes": (shape, "int8"), "scale": ((rows,), "float32")}
        packed = (-(-rows * width // 2),), "uint8"
        if self.format == "int4":
            return {"codes": packed, "scale": ((rows, -(-width // GROUP)), "bfloat16")}
        blocks = -(-rows * width // GROUP)
        if not self.double:
            return {"codes": packed, "absmax": ((blocks,), "float32")}
        nested = {"nested_absmax": ((-(-blocks // NESTED),), "float32"),
                  "nested_offset": ((), "float32")}  # fmt: skip
        return {"codes": packed, "absmax": ((blocks,), "uint8"), **nested}

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Of a matrix `[out, in]` in codes, on disk and in a GPU's memory."""
        parts = self.parts(shape).values()
        return sum(math.prod(part) * np.dtype(dtype).itemsize for part, dtype in parts)


def asked_base(base: BaseChoice, skip: str = "none") -> Base | None:
    """What `--base` and `--base-skip` ask for; None for a model as it is stored.

    Raises:
        InputError: if linears are to be left out of no format.
    """
    if base == "stored":
        if skip != "none":
            raise InputError(f"base_skip {skip}, which needs base int8, int4 or nf4")
        return None
    return Base(base, () if skip == "none" else tuple(skip.split(",")))


def weight_bytes(config: LlamaConfig, precision: Precision, base: Base | None = None) -> int:
    """Bytes of the base weights in memory."""
    itemsize = PRECISIONS[precision].itemsize
    size = config.parameter_count * itemsize
    for block in tensor_shapes(config).values():
        for name, shape in block.items():
            if base is not None and base.holds(name):
                size += base.bytes(shape) - math.prod(shape) * itemsize
    return size


def stored_shapes(config: LlamaConfig, base: Base | None) -> dict[str, dict[str, tuple[int, ...]]]:
    """`tensor_shapes` as a model folder of a base holds them.

    int4: layers.0.attention.wq.weight  ->  ....wq.weight.codes, ....wq.weight.scale
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for block, shapes in tensor_shapes(config).items():
        found[block] = {}
        for name, shape in shapes.items():
            if base is not None and base.holds(name):
                parts = base.parts(shape).items()
                found[block] |= {f"{name}.{part}": size for part, (size, _) in parts}
            else:
                found[block][name] = shape
    return found
