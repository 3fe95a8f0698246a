"""The tiny random models in Meta's and Hugging Face's formats, and in `transformers`.

Nothing here uses the converter's tables: what it knows of Meta's and Hugging Face's layouts is
written a second time, so that a mistake in either shows. Without torch, what imports it is skipped.
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

import safetensors.torch
import torch
import transformers
from random_models import TOKENIZER, VOCABULARY, random_arrays

_CUT_BY_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
_CUT_BY_COLUMNS = ("wo", "w2")
_HF_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

Tensors = dict[str, torch.Tensor]


def random_tensors(
    params: dict, *, seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False
) -> Tensors:
    """`random_arrays` in any dtype."""
    arrays = random_arrays(params, seed=seed, tied=tied)
    return {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}


def write_meta(
    folder: Path, tensors: Tensors, params: dict, *, shards: int = 1, embeddings_by: int = 1
) -> Path:
    """Meta's files; tok_embeddings is cut by columns (1; LLaMA 1 and 2) or by rows (0; Llama 3)."""
    folder.mkdir(parents=True)
    head_dim = params["dim"] // params["n_heads"]
    for index in range(shards):
        part = {"rope.freqs": torch.ones(head_dim // 2)}
        for name, tensor in tensors.items():
            leaf = name.split(".")[-2]
            if leaf == "tok_embeddings":
                tensor = tensor.chunk(shards, embeddings_by)[index]
            elif leaf in _CUT_BY_ROWS + _CUT_BY_COLUMNS:
                tensor = tensor.chunk(shards, 1 if leaf in _CUT_BY_COLUMNS else 0)[index]
            part[name] = tensor.clone()
        torch.save(part, folder / f"consolidated.{index:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(TOKENIZER)
    return folder


def reference(params: dict, tensors: Tensors, rope_factor: float = 8.0):
    """`transformers.LlamaForCausalLM` in fp32 with the same weights."""
    tied = "output.weight" not in tensors
    scaling = {"rope_type": "default"}
    if params.get("use_scaled_rope"):
        scaling = {
            "rope_type": "llama3",
            "factor": rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    heads = params["n_heads"]
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=params["dim"],
            num_hidden_layers=params["n_layers"],
            num_attention_heads=heads,
            num_key_value_heads=params.get("n_kv_heads", heads),
            intermediate_size=tensors["layers.0.feed_forward.w1.weight"].shape[0],
            vocab_size=VOCABULARY,
            rms_norm_eps=params["norm_eps"],
            rope_parameters={"rope_theta": params.get("rope_theta", 10000.0)} | scaling,
            max_position_embeddings=131072,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )
    weights = {_hf_name(name): _hf_rows(name, tensor, params) for name, tensor in tensors.items()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights)
    return model.eval()


def write_hf(folder: Path, tensors: Tensors, params: dict, *, files: int = 1) -> Path:
    """The same model in Hugging Face's files, config.json by `transformers`, in the same dtype."""
    reference(params, tensors).config.save_pretrained(folder)
    weights = {
        _hf_name(name): _hf_rows(name, tensor, params).to(tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }
    names = [f"model-{index + 1:05d}-of-{files:05d}.safetensors" for index in range(files)]
    if files == 1:
        names = ["model.safetensors"]
    placed = {name: names[index % files] for index, name in enumerate(sorted(weights))}
    for file in names:
        part = {name: weights[name] for name in weights if placed[name] == file}
        safetensors.torch.save_file(part, folder / file, {"format": "pt"})
    if files > 1:
        index = {"metadata": {}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer.model").write_bytes(TOKENIZER)
    return folder


def _hf_name(name: str) -> str:
    whole = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in whole:
        return whole[name]
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    return f"model.layers.{layer}.{_HF_NAMES[part]}.weight"


def _hf_rows(name: str, tensor: torch.Tensor, params: dict) -> torch.Tensor:
    """Rows of q and k in Hugging Face's order: in each head the even ones first, then the odd."""
    tensor = tensor.float()
    if not name.endswith(("wq.weight", "wk.weight")):
        return tensor
    size = params["dim"] // params["n_heads"]
    order = [
        head * size + row
        for head in range(len(tensor) // size)
        for row in (*range(0, size, 2), *range(1, size, 2))
    ]
    return tensor[order]
