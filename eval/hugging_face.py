"""A model folder in Hugging Face's form, so that `transformers` can run the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from jllama.adapter import rotary_heads, to_half_rotated
from jllama.checkpoint import read_block, read_config, tensor_shapes
from jllama.config import HF_LINEARS, HF_PARTS, LlamaConfig
from jllama.files import write_json

_HF_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_HF_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def write_hugging_face(source: Path, folder: Path) -> Path:
    """A model folder's weights, unrounded, as `transformers` reads them: a file a block."""
    config = read_config(source)
    weight_map: dict[str, str] = {}
    for block in tensor_shapes(config):
        tensors = {
            hugging_face_name(name): _hugging_face_rows(config, name, tensor)
            for name, tensor in read_block(source, block).items()
        }
        safetensors.numpy.save_file(tensors, folder / f"{block}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{block}.safetensors")
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", hugging_face_config(config))
    return folder


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a tensor.

    layers.0.attention.wq.weight  ->  model.layers.0.self_attn.q_proj.weight
    """
    if name in _HF_NAMES:
        return _HF_NAMES[name]
    _, layer, part, *linear, _ = name.split(".")
    leaf = f"{HF_PARTS[part]}.{HF_LINEARS[linear[0]]}" if linear else _HF_NORMS[part]
    return f"model.layers.{layer}.{leaf}.weight"


def _hugging_face_rows(config: LlamaConfig, name: str, tensor: np.ndarray) -> np.ndarray:
    heads = rotary_heads(config, name.removesuffix(".weight"))
    return to_half_rotated(tensor, heads) if heads else np.ascontiguousarray(tensor)


def hugging_face_config(config: LlamaConfig) -> dict[str, Any]:
    """What `transformers.LlamaConfig` calls the same sizes."""
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tied,
    }
