"""Several GPUs: one mesh axis; weights are cut over it, adapters are whole on each, rows are dealt.

A weight lies cut along its largest axis and XLA gathers it where it is needed, one layer at a
time. What learns is small and the same everywhere.
"""

from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "gpus"


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
