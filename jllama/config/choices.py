"""What a user chooses by name: a precision, devices, what is recomputed."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np

from jllama.errors import SizesOf

# The dtype of activations. Adapters, optimizer moments, norm statistics, softmax and loss are fp32
# in both. A frozen weight is stored in the same dtype, unless its own type says otherwise
# (`jllama.layers.Weight`).
Precision = Literal["bf16", "fp32"]
PRECISIONS: Mapping[str, Any] = MappingProxyType(
    {"bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32)}
)

# How several devices are used (`jllama.sharding`).
MESH_AXES = SizesOf(("data", "fsdp", "tensor"))
MeshChoice = Annotated[str, MESH_AXES]  # what a user names

# What is recomputed in the backward pass:
#   none     nothing
#   dots     all but the results of matmuls and of attention
#   offload  all but the results of matmuls, which wait in the host's memory
#   ffn      ffn_norm + feed_forward
#   block    whole blocks
Remat = Literal["none", "dots", "offload", "ffn", "block"]
