"""Several GPUs: one mesh axis; weights are cut over it, adapters are whole on each, rows are dealt.

A weight lies cut along its largest axis and XLA gathers it where it is needed, one layer at a
time. What learns is small and the same everywhere.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "gpus"
_HALF_BYTES = (jnp.dtype(jnp.int4), jnp.dtype(jnp.uint4))


def make_mesh(devices: Any) -> Mesh:
    """All devices in one line."""
    return Mesh(np.asarray(devices).reshape(-1), (AXIS,))


def cut_largest_axis(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """A weight's place: its largest axis that the mesh divides is cut, else it is whole."""
    for axis in sorted(range(len(shape)), key=lambda i: shape[i], reverse=True):
        if mesh.size > 1 and shape[axis] % mesh.size == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))
    return whole(mesh)


def whole(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def deal_rows(mesh: Mesh, axis: int) -> NamedSharding:
    """A batch's place: its rows, which lie along `axis`, are dealt to the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def placed(tree: Any, place: Any) -> Any:
    """Shapes with a sharding, which `place` gives for a shape."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x.shape)), tree
    )


def local_bytes(tree: Any) -> int:
    """Of placed shapes, on one device."""

    def bits(x: Any) -> int:
        """A CPU has no two numbers in one byte."""
        on_cpu = next(iter(x.sharding.device_set)).platform == "cpu"
        return 4 if x.dtype in _HALF_BYTES and not on_cpu else 8 * x.dtype.itemsize

    return sum(
        bits(x) * math.prod(x.sharding.shard_shape(x.shape)) // 8 for x in jax.tree.leaves(tree)
    )


def platform_of(mesh: Mesh) -> str:
    """As `jax.default_backend` names it."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(name := mesh.devices.flat[0].platform, name)
