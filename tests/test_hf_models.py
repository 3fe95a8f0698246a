"""Every kind of LLaMA that `transformers` saves: in, out again, and the same logits all the way."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from flax import nnx
from hf_models import KINDS, LLAMA, SIZES, saved
from random_models import VOCABULARY
from step_runs import build, run, windows
from test_step_parity import peer_step

import jllama
from convert import to_hf, to_meta
from convert.from_hf import FromHf, convert
from convert.to_hf import ToHf
from convert.to_meta import ToMeta
from jllama.config import LlamaConfig, LoraConfig, RopeScaling, rope_scaling_of
from jllama.decode.sampling import Sampling
from jllama.errors import InputError
from jllama.folders.adapter import save_adapter
from jllama.folders.model import read_config
from jllama.names import HF_LINEARS

IDS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 48), dtype=np.int32)


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS).long()).logits.numpy()


def logits(folder: Path) -> np.ndarray:
    graph, state = nnx.split(jllama.load_model(folder, "fp32"))
    return np.asarray(jax.jit(lambda s: nnx.merge(graph, s)(jnp.asarray(IDS)))(state))


def assert_agree(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_on_the_way_in_and_out(kind, tmp_path):
    config, edits, expected = KINDS[kind]
    theirs = torch_logits(saved(tmp_path / "hf", config, edits))
    assert theirs.std() > 0.3  # there is something to compare
    convert(FromHf(tmp_path / "hf", tmp_path / "model"))
    ours = read_config(tmp_path / "model")
    assert {name: getattr(ours, name) for name in expected} == expected
    assert_agree(logits(tmp_path / "model"), theirs)

    to_hf.export(ToHf(tmp_path / "model", tmp_path / "back"))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="float32")
    assert isinstance(back, transformers.LlamaForCausalLM)
    assert_agree(torch_logits(back.eval()), theirs)
    convert(FromHf(tmp_path / "back", tmp_path / "again"))
    assert read_config(tmp_path / "again") == ours
    certified = [json.loads((tmp_path / name / "manifest.json").read_text())["tensors"]
                 for name in ("model", "again")]  # fmt: skip
    assert certified[0] == certified[1]


@pytest.mark.parametrize("kind", ["heads wider than dim / heads", "linear rope"])
def test_greedy_ids_are_those_of_transformers(kind, tmp_path):
    peer = saved(tmp_path / "hf", KINDS[kind][0])
    convert(FromHf(tmp_path / "hf", tmp_path / "model"))
    model = jllama.load_model(tmp_path / "model", "fp32")
    prompts = [[1, 5, 9], [7] * 20]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = peer.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    assert jllama.generate(model, prompts, 40, Sampling(temperature=0)) == expected


@pytest.mark.promotes
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_training_with_heads_of_their_own_size_equals_peft(tmp_path):
    peer = saved(tmp_path / "hf", KINDS["heads wider than dim / heads"][0])
    convert(FromHf(tmp_path / "hf", tmp_path / "model"))
    lora = LoraConfig(rank=4, alpha=8, dropout=0.0, targets=tuple(HF_LINEARS))
    model, graphdef, base, optimizer, state = build(tmp_path / "model", lora=lora)
    save_adapter(tmp_path / "adapter", model, lora, "base", {})
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter", is_trainable=True)
    rows = list(windows(5, 1, 3))
    _, losses = run(graphdef, base, optimizer, state, rows)

    learned = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(learned, lr=1e-2, weight_decay=0.01, eps=1e-8)
    np.testing.assert_allclose(losses, [peer_step(peer, adamw, row) for row in rows], atol=1e-4)
    assert abs(losses[-1] - losses[0]) > 1e-2


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("heads wider than dim / heads", "head size 16, and dim 32 / 4 heads is 8"),
        ("linear rope", "positions divided by 4"),
    ],
)
def test_what_metas_format_cannot_say_is_refused(kind, words, tmp_path, refusal):
    saved(tmp_path / "hf", KINDS[kind][0])
    convert(FromHf(tmp_path / "hf", tmp_path / "model"))
    said = refusal(to_meta.export, ToMeta(tmp_path / "model", tmp_path / "meta"))
    assert words in said
    assert "use to-hf or to-gguf" in said
    assert "\n" not in said


def test_a_config_of_an_older_model_folder_is_read_as_ever(tmp_path):
    config = LlamaConfig(32, 2, 4, 2, 88, 512, rope_scaling=RopeScaling(32.0))
    saved(tmp_path / "hf", LLAMA(**SIZES))
    convert(FromHf(tmp_path / "hf", tmp_path / "model"))
    (tmp_path / "model" / "manifest.json").unlink()  # it certifies config.json, too
    old = {
        "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 88,
        "vocab_size": 512, "norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": {"factor": 32.0, "low_frequency_factor": 1.0,
                         "high_frequency_factor": 4.0, "original_context": 8192},
        "tied": False, "ffn_bias": False, "max_seq_len": 4096,
    }  # fmt: skip
    (tmp_path / "model" / "config.json").write_text(json.dumps(old))
    assert read_config(tmp_path / "model") == config
    assert config.head_dim == 8


@pytest.mark.parametrize("entry", [{"kind": "yarn", "factor": 2.0}, {"kind": "linear"}, {"x": 1}])
def test_a_scaling_that_is_none_is_refused(entry):
    with pytest.raises(InputError):
        rope_scaling_of(entry)
