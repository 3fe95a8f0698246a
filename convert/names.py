"""Meta's tensors in tables: how each is cut over the shards, and which are skipped.

The blocks a tensor belongs to, and its whole shape, are `jllama.checkpoint.tensor_shapes`.
Source: the parallel layers of Meta's model.py (column-parallel: rows are cut; row-parallel:
columns are cut).
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

ROWS, COLUMNS, REPLICATED = 0, 1, None

EMBEDDINGS, OUTPUT = "tok_embeddings.weight", "output.weight"

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

# Tables that Meta's code computes anew: one frequency for every rotary pair.
_SKIPPED = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")


def is_skipped(name: str) -> bool:
    """Whether a tensor of Meta's file is no weight: `rope.freqs`."""
    return _SKIPPED.fullmatch(name) is not None


def cut_of(name: str) -> int | None:
    """The dimension in which a tensor is cut: `layers.3.attention.wo.weight` -> 1 (columns)."""
    return CUT[re.sub(r"^layers\.\d+\.", "", name).removesuffix(".weight")]


def embeddings_cut(columns: int, dim: int) -> int:
    """The cut of tok_embeddings, told by the columns of one shard's part: whole rows or not."""
    return ROWS if columns == dim else COLUMNS
