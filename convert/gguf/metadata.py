"""The header of a GGUF file: sizes, rotary embedding, vocabulary.

The keys are those of llama.cpp's architecture `llama`, and of its tokenizers:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
from pathlib import Path

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
)

from convert.gguf.terms import Vocabulary
from jllama.config import LinearScaling, LlamaConfig, RopeScaling
from jllama.folders.adapter import WEIGHTS
from jllama.folders.manifest import file_sha256, manifest_sha256
from jllama.layers import rotary_frequencies

# The certificates of the source; llama.cpp passes over keys that it does not know.
MANIFEST_SHA256, ADAPTER_SHA256 = "jllama.manifest_sha256", "jllama.adapter_sha256"
_FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}


def add_sizes(writer: GGUFWriter, config: LlamaConfig) -> None:
    """What a LLaMA is, in numbers. Llama 3.1's stretching of the rotary embedding is a tensor."""
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if isinstance(config.rope_scaling, LinearScaling):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    writer.add_vocab_size(config.vocab_size)


def rotary_factors(config: LlamaConfig) -> np.ndarray | None:
    """By what llama.cpp is to divide each pair's frequency, fp32 `[H/2]`; None for nothing."""
    if not isinstance(config.rope_scaling, RopeScaling):
        return None
    plain = rotary_frequencies(dataclasses.replace(config, rope_scaling=None))
    return plain / rotary_frequencies(config)


def add_origin(
    writer: GGUFWriter, model: Path, adapter: Path | None, usual: GGMLQuantizationType
) -> None:
    """What the file holds: a name, the type of most weights, and what it was made from.

    Args:
        model: the model folder, whose every tensor is checked against its manifest on the way.
        adapter: what is merged into it.
    """
    writer.add_type("model")
    writer.add_name(model.resolve().name)
    writer.add_string(MANIFEST_SHA256, manifest_sha256(model))
    if adapter is not None:
        writer.add_string(ADAPTER_SHA256, file_sha256(adapter / WEIGHTS))
    writer.add_file_type(_FILE_TYPES[usual])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """The tokenizer. Text is not ended."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_scores(vocabulary.scores)  # an empty list is left out
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.stop_ids[0])
    more = (writer.add_eot_token_id, writer.add_eom_token_id)  # llama.cpp has a place for three
    for add, token in zip(more, vocabulary.stop_ids[1:], strict=False):
        add(token)
    if vocabulary.unknown_id is not None:
        writer.add_unk_token_id(vocabulary.unknown_id)
    writer.add_add_bos_token(vocabulary.begins)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.space_before)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
