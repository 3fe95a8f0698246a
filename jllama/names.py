"""The names of a LLaMA's parts: Meta's, which this project uses, and Hugging Face's and PEFT's.

Meta          layers.0.attention.wq.weight
Hugging Face  model.layers.0.self_attn.q_proj.weight
PEFT          base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

Rows of q and k change their order with the name: `jllama.layers.to_half_rotated`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from jllama.errors import InputError

EMBEDDINGS, NORM, OUTPUT = "tok_embeddings.weight", "norm.weight", "output.weight"

# Meta's name of a block's part, of a linear, of a norm -> Hugging Face's.
_HF_PARTS = {"attention": "self_attn", "feed_forward": "mlp"}
HF_LINEARS: Mapping[str, str] = MappingProxyType(
    {
        "wq": "q_proj",
        "wk": "k_proj",
        "wv": "v_proj",
        "wo": "o_proj",
        "w1": "gate_proj",
        "w2": "down_proj",
        "w3": "up_proj",
    }
)
LINEAR_CHOICES = (*HF_LINEARS, *HF_LINEARS.values(), "all")  # what a user may name
_HF_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HF_OUTSIDE = {
    EMBEDDINGS: "model.embed_tokens.weight",
    NORM: "model.norm.weight",
    OUTPUT: "lm_head.weight",
}
_PEFT_ARRAYS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def block_of(name: str) -> str:
    """The block of a model folder that a tensor is in.

    layers.3.ffn_norm.weight -> layers.3;  tok_embeddings.weight -> embeddings;  others -> head
    """
    if name.startswith("layers."):
        return ".".join(name.split(".")[:2])
    return "embeddings" if name == EMBEDDINGS else "head"


def hf_name(name: str) -> str:
    """Hugging Face's name of a tensor.

    layers.0.attention.wq.weight  ->  model.layers.0.self_attn.q_proj.weight
    """
    if name in _HF_OUTSIDE:
        return _HF_OUTSIDE[name]
    _, layer, part, *linear, _ = name.split(".")
    leaf = f"{_HF_PARTS[part]}.{HF_LINEARS[linear[0]]}" if linear else _HF_NORMS[part]
    return f"model.layers.{layer}.{leaf}.weight"


def peft_name(name: str) -> str:
    """PEFT's name of an adapter's array.

    layers.0.attention.wq.lora.a  ->  base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    """
    linear, _, array = name.partition(".lora.")
    theirs = hf_name(f"{linear}.weight").removesuffix("weight")
    return f"base_model.model.{theirs}{_PEFT_ARRAYS[array]}"


def linear_names(text: str) -> tuple[str, ...]:
    """The linears a user named, in Meta's names and order.

    "wq,wv" -> ("wq", "wv");  "q_proj,v_proj" -> ("wq", "wv");  "all" -> all seven

    Raises:
        InputError: if a name is unknown or none is given.
    """
    asked = {name.strip() for name in text.split(",") if name.strip()}
    meta = {hf: meta for meta, hf in HF_LINEARS.items()}
    named = set(HF_LINEARS) if "all" in asked else set()
    named |= {meta.get(name, name) for name in asked - {"all"}}
    unknown = sorted(named - set(HF_LINEARS))
    if unknown or not named:
        shown = ", ".join(unknown)[:80] or "(none given)"
        raise InputError(
            f"unknown linear {shown}; choose from {', '.join(HF_LINEARS)} (or q_proj, ..., or all)"
        )
    return tuple(name for name in HF_LINEARS if name in named)
