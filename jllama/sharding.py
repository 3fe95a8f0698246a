"""Several devices: one mesh, and one table of where every weight lies on it.

    --mesh data=2,fsdp=4

    data     devices that hold the whole base, each with rows of its own
    fsdp     rows of their own, and a part of every weight; the rest is gathered where it is needed
    tensor   the same rows, and a part of every product

What learns with LoRA is small and the same everywhere; with full tuning it lies as the base does.
A weight whose rows or columns an axis does not divide is whole along them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jllama.config import MESH_AXES, MeshChoice
from jllama.errors import InputError

Axes = str | tuple[str, ...] | None

# Linear, by Meta's names -> the axes that cut its rows (outputs) and its columns (inputs). Between
# the two products of attention, and of the feed-forward layer, no device waits for another. What is
# gathered is cut by rows: cut by columns, XLA keeps a transposed copy of each device's part.
RULES: Mapping[str, tuple[Axes, Axes]] = {
    **dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), (("tensor", "fsdp"), None)),
    **dict.fromkeys(("wo", "w2"), ("fsdp", "tensor")),
    "tok_embeddings": (None, ("fsdp", "tensor")),  # looked up by rows of tokens, which are dealt
}
ROWS = ("data", "fsdp")  # the axes that deal the rows of a batch
Weights = TypeVar("Weights")
_HALF_BYTES = (jnp.dtype(jnp.int4), jnp.dtype(jnp.uint4))

Place = Callable[[str, tuple[int, ...]], NamedSharding]  # of a weight's name and shape


class MeshShape(NamedTuple):
    """How many devices lie along each axis."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        return math.prod(self)

    @property
    def rows(self) -> int:
        """Among how many devices the rows of a batch are dealt."""
        return self.data * self.fsdp

    @property
    def parts(self) -> int:
        """Into how many parts a weight is cut."""
        return self.fsdp * self.tensor

    @property
    def words(self) -> str:
        """`data=2,fsdp=4`, as it is typed; axes of one device left out."""
        return ",".join(f"{axis}={n}" for axis, n in self._asdict().items() if n > 1)


ONE_DEVICE = MeshShape()


def mesh_shape(text: MeshChoice) -> MeshShape:
    """`data=2,fsdp=4` -> (2, 4, 1); an empty text is one device."""
    return MeshShape(**MESH_AXES.read(text))


def make_mesh(devices: Any, shape: MeshShape | None = None) -> Mesh:
    """The devices as a mesh; by default all of them along fsdp.

    Raises:
        InputError: if there are others than as many as the shape asks for.
    """
    devices = np.asarray(devices).reshape(-1)
    shape = shape or MeshShape(fsdp=devices.size)
    if shape.size > devices.size:
        raise InputError(
            f"--mesh {shape.words} needs {shape.size} devices, and there are {devices.size}"
        )
    processes = {device.process_index for device in devices}
    if shape.size < devices.size and len(processes) > 1:
        raise InputError(
            f"--mesh {shape.words or 'data=1'} is of {shape.size} devices, and the "
            f"{len(processes)} processes have {devices.size}, of which none may be left out"
        )
    return Mesh(devices[: shape.size].reshape(shape), MeshShape._fields)


def of_the_base(mesh: Mesh) -> Place:
    """Where a weight lies, or a part of its codes: their scales are cut as they are."""

    def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
        words = name.split(".")
        rule = next((RULES[word] for word in words if word in RULES), ())
        if "lora" in words:
            rule = ()
        axes = zip(rule, shape, strict=False)
        return NamedSharding(
            mesh, PartitionSpec(*(_dividing(mesh, axis, size) for axis, size in axes))
        )

    return place


def _dividing(mesh: Mesh, axis: Axes, size: int) -> Any:
    """Of an axis, or of several, those with more than one device, if they divide `size`."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    names = tuple(name for name in names if mesh.shape[name] > 1)
    return names if size % math.prod(mesh.shape[name] for name in names) == 0 else None


def whole(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def deal_rows(mesh: Mesh, axis: int) -> NamedSharding:
    """A batch's place: its rows, which lie along `axis`, are dealt to the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))


def dealt(x: Array) -> Array:
    """x `[rows, ...]`, its rows where `deal_rows` puts a batch's.

    Inside of a compiled function, for the mesh of `jax.set_mesh`: without this XLA would rather cut
    the stream as the weights are, and every device would compute something of every row. The other
    axes are left to it: what waits for the backward pass it cuts among the devices of `tensor`.
    """
    if not _are_dealt():
        return x
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, *rest))


def one_after_another(x: Array, weights: Weights) -> tuple[Array, Weights]:
    """x, and weights that are gathered when x is there.

    Without this XLA gathers those of all blocks at the start, and all of them wait for their turn.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return x, weights
    return jax.lax.optimization_barrier((x, weights))


def over_dealt_rows(sums: Callable[..., Array]) -> Callable[..., Array]:
    """A function of arrays of rows, and of one more array, that adds up over rows.

        sums(x, targets, mask, head)  ->  the same, each device with its own rows

    Inside of a compiled function, for the mesh of `jax.set_mesh`.
    """
    if not _are_dealt():
        return sums

    def of_all(*rows_and_more):
        *rows, more = rows_and_more
        return jax.shard_map(
            lambda *mine: jax.lax.psum(sums(*mine), ROWS), axis_names={*ROWS}, check_vma=False,
            in_specs=(*[PartitionSpec(ROWS)] * len(rows), PartitionSpec()),
            out_specs=PartitionSpec(),
        )(*rows, more)  # fmt: skip

    return of_all


def with_dealt_rows(work: Callable[..., Array]) -> Callable[..., Array]:
    """A function of arrays of rows, which gives rows: each device calls it with its own.

    Inside of a compiled function, for the mesh of `jax.set_mesh`: without this XLA gathers the rows
    of all devices wherever one is found by its number.
    """
    if not _are_dealt():
        return work
    rows = PartitionSpec(ROWS)
    return jax.shard_map(work, axis_names={*ROWS}, check_vma=False, in_specs=rows, out_specs=rows)


def _are_dealt() -> bool:
    """Whether the mesh of `jax.set_mesh` deals rows to several devices."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in ROWS) > 1


def put(tree: Any, places: Any) -> Any:
    """Arrays where `places` has a sharding for each; every process gives the same arrays.

    `jax.device_put` would send each one to all processes, to see that they are the same.
    """

    def put_one(x: Any, place: NamedSharding) -> Array:
        if place.is_fully_addressable or not (isinstance(x, np.ndarray) or x.is_fully_addressable):
            return jax.device_put(x, place)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, place, lambda part: host[part])

    return jax.tree.map(put_one, tree, places)


def on_host(x: Array) -> np.ndarray:
    """A whole array; of one that lies in parts with several processes all of them must ask."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def placed(tree: Any, place: Place) -> Any:
    """Shapes with a sharding, which `place` gives for a name and a shape."""

    def shape_of(path, x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(path_name(path), x.shape))

    return jax.tree_util.tree_map_with_path(shape_of, tree)


def path_name(path: Any) -> str:
    """`layers.0.attention.wq.weight`, within the names that a state has around it."""
    return ".".join(str(entry.key) for entry in path if hasattr(entry, "key"))


def is_half_bytes(x: Any) -> bool:
    """Whether an array, or its shape, is of numbers of 4 bits."""
    return x.dtype in _HALF_BYTES


def local_bytes(tree: Any) -> int:
    """Of placed shapes, on one device."""

    def bits(x: Any) -> int:
        """A CPU has no two numbers in one byte."""
        on_cpu = next(iter(x.sharding.device_set)).platform == "cpu"
        return 4 if is_half_bytes(x) and not on_cpu else 8 * x.dtype.itemsize

    return sum(
        bits(x) * math.prod(x.sharding.shard_shape(x.shape)) // 8 for x in jax.tree.leaves(tree)
    )


def platform_of(mesh: Mesh) -> str:
    """As `jax.default_backend` names it."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(name := mesh.devices.flat[0].platform, name)
