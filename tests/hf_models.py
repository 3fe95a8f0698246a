"""Tiny random models of `transformers`, of every kind that is a LLaMA, saved by itself."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
import transformers
from random_models import TOKENIZER, VOCABULARY

from jllama.config import LinearScaling

SIZES = {
    "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "initializer_range": 0.15,
}  # fmt: skip
WIDE = SIZES | {"head_dim": 16}
# 8 key-value heads are its default, and with them what config.json then need not say.
MISTRAL = SIZES | {"num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 64}
MISTRALS_OWN = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "head_dim",
                "rope_parameters", "tie_word_embeddings")  # fmt: skip


def linear(factor: float) -> dict:
    return {"rope_parameters": {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}}


# What is saved, what config.json then says in another way, and what it must become here.
LLAMA, MISTRAL_7B = transformers.LlamaConfig, transformers.MistralConfig
KINDS = {
    "heads wider than dim / heads": (LLAMA(**WIDE), {}, {"head_dim": 16}),
    "narrower heads, tied": (
        LLAMA(**SIZES | {"head_dim": 4, "tie_word_embeddings": True}), {}, {"head_dim": 4}
    ),
    "Mistral without a window": (
        MISTRAL_7B(**MISTRAL | {"sliding_window": None, "max_position_embeddings": 131072}),
        dict.fromkeys(MISTRALS_OWN, ...),
        {"n_kv_heads": 8, "norm_eps": 1e-6, "max_seq_len": 131072, "head_dim": 4},
    ),
    "Mistral with a window as long as its context": (
        MISTRAL_7B(**WIDE | {"sliding_window": 64}), {}, {"max_seq_len": 64, "head_dim": 16}
    ),
    "linear rope": (
        LLAMA(**SIZES, **linear(4.0)), {}, {"rope_scaling": LinearScaling(4.0)}
    ),
    "linear rope as it once was written": (
        LLAMA(**WIDE, **linear(2.5)),
        {"rope_parameters": ..., "rope_theta": 10000.0,
         "rope_scaling": {"type": "linear", "factor": 2.5}},
        {"rope_scaling": LinearScaling(2.5)},
    ),
    "linear rope that changes nothing": (
        LLAMA(**SIZES), {"rope_scaling": {"type": "linear", "factor": 1.0}}, {"rope_scaling": None}
    ),
    "no word of norms and context": (
        LLAMA(**SIZES | {"max_position_embeddings": 2048}),
        dict.fromkeys(("rms_norm_eps", "max_position_embeddings", "rope_parameters"), ...),
        {"norm_eps": 1e-6, "max_seq_len": 2048},
    ),
}  # fmt: skip


def saved(folder: Path, config: transformers.PreTrainedConfig, edits: dict | None = None):
    """A random model of `transformers` as a folder with a tokenizer; gives the model.

    Args:
        edits: of config.json; ... takes a field out.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    file = folder / "config.json"
    content = json.loads(file.read_text()) | (edits or {})
    file.write_text(json.dumps({name: x for name, x in content.items() if x is not ...}))
    (folder / "tokenizer.model").write_bytes(TOKENIZER)
    return model
