"""What a LLaMA is, in numbers, and what a user chooses of it.

llama.py    sizes of a model, shapes of its weights    lora.py     settings of an adapter
base.py     weights in 8 and 4 bits                    choices.py  precisions, remats, meshes
presets.py  the published models
"""

from jllama.config.base import (
    GROUP,
    NESTED,
    Base,
    BaseChoice,
    BaseSkip,
    Format,
    asked_base,
    stored_shapes,
    weight_bytes,
)
from jllama.config.choices import MESH_AXES, PRECISIONS, MeshChoice, Precision, Remat
from jllama.config.llama import (
    LinearScaling,
    LlamaConfig,
    RopeScaling,
    linear_shapes,
    rope_scaling_of,
    tensor_shapes,
)
from jllama.config.lora import LoraConfig
from jllama.config.presets import PRESETS

__all__ = [
    "GROUP",
    "MESH_AXES",
    "NESTED",
    "PRECISIONS",
    "PRESETS",
    "Base",
    "BaseChoice",
    "BaseSkip",
    "Format",
    "LinearScaling",
    "LlamaConfig",
    "LoraConfig",
    "MeshChoice",
    "Precision",
    "Remat",
    "RopeScaling",
    "asked_base",
    "linear_shapes",
    "rope_scaling_of",
    "stored_shapes",
    "tensor_shapes",
    "weight_bytes",
]
