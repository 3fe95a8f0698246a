"""How Meta cuts tensors over shards, and which of a file's tensors are no weights.

The blocks a tensor belongs to, and its whole shape, are `jllama.config.tensor_shapes`.
Source of the cuts: the parallel layers of Meta's model.py (column-parallel: rows are cut;
row-parallel: columns are cut).
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

ROWS, COLUMNS, REPLICATED = 0, 1, None

# Name without layer and suffix -> the dimension that is cut. tok_embeddings is cut by columns in
# LLaMA 1 and 2 and by rows in Llama 3, so its shape must tell: see `embeddings_cut`.
CUT: Mapping[str, int | None] = MappingProxyType(
    {
        "attention.wq": ROWS,
        "attention.wk": ROWS,
        "attention.wv": ROWS,
        "attention.wo": COLUMNS,
        "feed_forward.w1": ROWS,
        "feed_forward.w2": COLUMNS,
        "feed_forward.w3": ROWS,
        "attention_norm": REPLICATED,
        "ffn_norm": REPLICATED,
        "norm": REPLICATED,
        "output": ROWS,
    }
)

# Tables that the model's code computes anew: one frequency for every rotary pair.
_SKIPPED = re.compile(
    r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs"
    r"|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)


def is_skipped(name: str) -> bool:
    """Whether a tensor is no weight: `rope.freqs`, and older Hugging Face files' `inv_freq`."""
    return _SKIPPED.fullmatch(name) is not None


def cut_of(name: str) -> int | None:
    """The dimension in which a tensor is cut: `layers.3.attention.wo.weight` -> 1 (columns)."""
    return CUT[re.sub(r"^layers\.\d+\.", "", name).removesuffix(".weight")]


def embeddings_cut(columns: int, dim: int) -> int:
    """The cut of tok_embeddings, told by the columns of one shard's part: whole rows or not."""
    return ROWS if columns == dim else COLUMNS


def part_shape(shape: tuple[int, ...], axis: int | None, shards: int) -> tuple[int, ...]:
    """The shape of one shard's part of a tensor that is cut in a dimension."""
    if axis is REPLICATED:
        return shape
    return tuple(size // shards if i == axis else size for i, size in enumerate(shape))
