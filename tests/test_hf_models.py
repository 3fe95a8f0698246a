"""Every kind of LLaMA that `transformers` saves: in, out again, and the same logits all the way."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import numpy as np
import peft
import safetensors.torch
import torch
import transformers
from flax import nnx
from hf_models import KINDS, LLAMA, SIZES, saved
from meta_files import random_tensors, write_hf
from random_models import GROUPED, VOCABULARY
from step_runs import build, run, windows
from test_step_parity import peer_step

import jllama
from convert import to_hf, to_meta, verify
from convert.from_hf import FromHf, convert
from convert.to_hf import ToHf
from convert.to_meta import ToMeta
from convert.verify import Verify
from jllama.config import LlamaConfig, LoraConfig, RopeScaling, rope_scaling_of
from jllama.decode.sampling import Sampling
from jllama.errors import InputError
from jllama.folders.adapter import save_adapter
from jllama.folders.manifest import read_manifest
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


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pickled_weights_give_the_certificate_of_safetensors(dtype, files, tmp_path):
    tensors = random_tensors(GROUPED, dtype=dtype)
    write_hf(tmp_path / "safe", tensors, GROUPED)
    convert(FromHf(tmp_path / "safe", tmp_path / "expected"))
    weights = safetensors.torch.load_file(tmp_path / "safe" / "model.safetensors")
    shutil.copytree(tmp_path / "safe", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    # A view of a larger tensor, another order in memory, and what old files have besides.
    weights["model.norm.weight"] = torch.cat([weights["model.norm.weight"], torch.ones(3)])[:32].to(
        dtype
    )
    q = "model.layers.0.self_attn.q_proj.weight"
    weights[q] = weights[q].t().contiguous().t()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = [f"pytorch_model-0000{part + 1}-of-00002.bin" for part in range(files)]
    names = names if files > 1 else ["pytorch_model.bin"]
    placed = {name: names[index % files] for index, name in enumerate(weights)}
    for file in names:
        part = {name: weights[name] for name in weights if placed[name] == file}
        torch.save(part, tmp_path / "hf" / file)
    if files > 1:
        index = {"metadata": {}, "weight_map": placed}
        (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert(FromHf(tmp_path / "hf", tmp_path / "model"))
    verify.verify(Verify(tmp_path / "model", against=tmp_path / "hf"))
    certified = [read_manifest(tmp_path / name)["tensors"] for name in ("model", "expected")]
    assert certified[0] == certified[1]


def test_a_tied_head_may_be_pickled_as_the_embedding_itself(tmp_path):
    model = saved(tmp_path / "hf", KINDS["narrower heads, tied"][0])
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    assert "lm_head.weight" in model.state_dict()
    convert(FromHf(tmp_path / "hf", tmp_path / "model"))
    assert_agree(logits(tmp_path / "model"), torch_logits(model))


def test_of_pickles_and_safetensors_the_latter_count(tmp_path, capsys):
    saved(tmp_path / "hf", LLAMA(**SIZES))
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"no pickle")
    convert(FromHf(tmp_path / "hf", tmp_path / "model"))
    assert "left out, for nothing here reads it: pytorch_model.bin" in capsys.readouterr().out


def test_of_pickled_weights_no_more_than_two_blocks_are_ever_held(tmp_path):
    """In a process of its own, in which a small model has loaded all modules before."""
    saved(tmp_path / "small", LLAMA(**SIZES))
    saved(tmp_path / "hf", LLAMA(**SIZES | {"hidden_size": 512, "intermediate_size": 1376,
                                           "num_hidden_layers": 24}))  # fmt: skip
    weights = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "hf" / "pytorch_model.bin")
    size = (tmp_path / "hf" / "pytorch_model.bin").stat().st_size
    script = (
        "import re, sys\n"
        "from convert.from_hf import main\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "main(sys.argv[3:])\n"
        "before = peak()\n"
        "main(sys.argv[1:3])\n"
        "print('peak', 1024 * (peak() - before))\n"
    )
    places = [str(tmp_path / name) for name in ("hf", "model", "small", "small model")]
    command = [sys.executable, "-c", script, *places]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak = int(said.rpartition("peak ")[2])
    block = size / 24
    assert peak < 2 * block  # of 24; 1.13 was seen


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
