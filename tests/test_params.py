"""Meta's params.json, read and written: every published family, and every hidden size."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import pytest

from convert.meta.params import config_from_meta, hidden_rule, hidden_size, meta_params
from jllama.config import PRESETS

_LLAMA_3 = {"n_kv_heads": 8, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0}
_LLAMA_32 = _LLAMA_3 | {"use_scaled_rope": True, "multiple_of": 256}

# Preset -> dim, layers, heads, norm_eps, the other fields of Meta's file, parameters
FAMILIES = {
    "llama-7b": (4096, 32, 32, 1e-6, {"multiple_of": 256}, 6_738_415_616),
    "llama-13b": (5120, 40, 40, 1e-6, {"multiple_of": 256}, 13_015_864_320),
    "llama-33b": (6656, 60, 52, 1e-6, {"multiple_of": 256}, 32_528_943_616),
    "llama-65b": (8192, 80, 64, 1e-5, {"multiple_of": 256}, 65_285_660_672),
    "llama-2-7b": (4096, 32, 32, 1e-5, {"multiple_of": 256}, 6_738_415_616),
    "llama-2-13b": (5120, 40, 40, 1e-5, {"multiple_of": 256}, 13_015_864_320),
    "llama-2-70b": (
        *(8192, 80, 64, 1e-5),
        {"n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
        68_976_648_192,
    ),
    "llama-3-8b": (4096, 32, 32, 1e-5, _LLAMA_3 | {"multiple_of": 1024}, 8_030_261_248),
    "llama-3-70b": (8192, 80, 64, 1e-5, _LLAMA_3 | {"multiple_of": 4096}, 70_553_706_496),
    "llama-3.1-8b": (
        *(4096, 32, 32, 1e-5),
        _LLAMA_3 | {"multiple_of": 1024, "use_scaled_rope": True},
        8_030_261_248,
    ),
    "llama-3.1-405b": (
        *(16384, 126, 128, 1e-5),
        _LLAMA_3 | {"multiple_of": 4096, "ffn_dim_multiplier": 1.2, "use_scaled_rope": True},
        405_853_388_800,
    ),
    "llama-3.2-1b": (
        *(2048, 16, 32, 1e-5),
        _LLAMA_32 | {"ffn_dim_multiplier": 1.5},
        1_235_814_400,
    ),
    "llama-3.2-3b": (
        *(3072, 28, 24, 1e-5),
        _LLAMA_32 | {"ffn_dim_multiplier": 1.0},
        3_212_749_824,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_published_params_give_the_preset_and_the_published_parameter_count(name):
    dim, n_layers, n_heads, norm_eps, others, parameters = FAMILIES[name]
    params = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "norm_eps": norm_eps} | others
    preset = PRESETS[name]
    config = config_from_meta(params, preset.vocab_size, tied=preset.tied)
    # Meta's files do not state the context, and LLaMA 1 65B looks like Llama 2 in all it states.
    assert dataclasses.replace(config, max_seq_len=preset.max_seq_len) == preset
    assert config.parameter_count == parameters


@pytest.mark.parametrize("name", PRESETS)
def test_params_written_for_a_preset_are_read_back_as_it(name):
    preset = PRESETS[name]
    params = json.loads(json.dumps(meta_params(preset)))
    assert config_from_meta(params, preset.vocab_size, tied=preset.tied) == preset


@hypothesis.given(dim=st.integers(2, 20_000), hidden=st.integers(1, 100_000))
def test_every_hidden_size_has_a_rule(dim, hidden):
    rule = hidden_rule(dim, hidden)
    assert hidden_size(dim, rule["multiple_of"], rule.get("ffn_dim_multiplier")) == hidden
