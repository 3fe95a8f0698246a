"""Folders that `transformers` writes with bitsandbytes' nf4, read by jllama."""

import json
import shutil

import pytest

# ruff: noqa: E402
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
from meta_files import random_tensors, write_hf
from random_models import TOKENIZER

from convert.from_hf import main as from_hf
from convert.to_hf import main as to_hf
from convert.verify import main as verify
from jllama.config import Base
from jllama.folders.load import load_model
from jllama.folders.model import read_base

# Rows are whole blocks of 64: on CPUs with AVX512-BF16 bitsandbytes computes wrongly with others.
PARAMS = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 64,
          "norm_eps": 1e-5}  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 256, (2, 12))


@pytest.fixture(scope="module", params=[False, True], ids=["single", "double"])
def quantised(request, tmp_path_factory):
    """A folder in nf4, and the logits of the model that `transformers` opens there."""
    place = tmp_path_factory.mktemp("hf")
    write_hf(place / "plain", random_tensors(PARAMS), PARAMS)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=request.param,
    )  # fmt: skip
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        place / "plain", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    opened.save_pretrained(place / "nf4")
    (place / "nf4" / "tokenizer.model").write_bytes(TOKENIZER)
    for module in opened.modules():  # its kernel for AVX512-BF16 would compute in bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        logits = opened(torch.tensor(IDS)).logits.float().numpy()
    return place / "nf4", logits


@pytest.mark.integration
def test_a_folder_in_nf4_becomes_a_model_folder_with_the_same_logits(quantised, tmp_path, capsys):
    source, expected = quantised
    from_hf([str(source), str(tmp_path / "model")])
    assert read_base(tmp_path / "model") == Base("nf4", double=False)
    model = load_model(tmp_path / "model", "fp32")
    np.testing.assert_allclose(model(jnp.asarray(IDS)), expected, rtol=0, atol=1e-3)
    verify([str(tmp_path / "model"), "--against", str(source)])
    assert "byte for byte" in capsys.readouterr().out
    # And out again, as numbers.
    to_hf([str(tmp_path / "model"), str(tmp_path / "hf"), "--dtype", "fp32"])
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        found = again(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


STATE = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"


def without(name):
    return lambda tensors, config: tensors.pop(name)


def with_state(**fields):
    def change(tensors, config):
        state = json.loads(tensors[STATE].numpy().tobytes()) | fields
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def with_settings(**fields):
    return lambda tensors, config: config["quantization_config"].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_settings(bnb_4bit_quant_type="fp4"), "quantised in another way"),
        (with_settings(quant_method="gptq"), "quantised in another way"),
        (without(STATE), "up_proj is quantised in 1 of 2 layers"),
        (without(STATE.replace("quant_state.bitsandbytes__nf4", "absmax")), "absmax is missing"),
        (with_state(blocksize=128), "blocksize is 128, expected 64"),
        (with_state(shape=[1, 2]), "shape is"),
        (lambda tensors, _: tensors.update({STATE: torch.zeros(5, dtype=torch.uint8)}), "no JSON"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(quantised, tmp_path, capsys, change, message):
    folder = shutil.copytree(quantised[0], tmp_path / "hf")
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        from_hf([str(folder), str(tmp_path / "model")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_it_stays_in_nf4(quantised, tmp_path, capsys):
    with pytest.raises(SystemExit):
        from_hf([str(quantised[0]), str(tmp_path / "model"), "--base", "int4"])
    assert "its linears are in nf4" in capsys.readouterr().err
