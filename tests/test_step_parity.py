"""The training step against torch, `transformers` and `peft`."""

import pytest

pytest.importorskip("torch")

import numpy as np
import peft
import safetensors.numpy
import torch
from flax import nnx
from meta_files import random_tensors, reference, write_meta
from peft.optimizers import create_loraplus_optimizer
from random_models import model_folder
from step_runs import LENGTH, LORA, PARAMS, build, build_full, run, windows

from convert.from_meta import FromMeta, convert
from jllama.folders.adapter import save_adapter

pytestmark = pytest.mark.promotes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("place"), PARAMS)


def peft_model(model, folder):
    """The same base and adapters in `transformers` and `peft`."""
    save_adapter(folder, model, LORA, "base", {})
    return peft.PeftModel.from_pretrained(
        reference(PARAMS, random_tensors(PARAMS)), folder, is_trainable=True
    )


def peer_step(peer, rule, window):
    """One step of torch on all rows of a window at once; the loss before it."""
    tokens, targets, mask = (torch.from_numpy(x.reshape(-1, LENGTH)) for x in window[:3])
    each = torch.nn.functional.cross_entropy(
        peer(tokens.long()).logits.flatten(0, 1), targets.long().flatten(), reduction="none"
    )
    loss = each[mask.flatten()].sum() / mask.sum()
    rule.zero_grad()
    loss.backward()
    rule.step()
    return loss.item()


def test_twenty_steps_equal_transformers_and_peft(folder, tmp_path):
    model, graphdef, base, optimizer, state = build(folder)
    peer = peft_model(model, tmp_path / "initial")
    rows = list(windows(20, 1, 3))
    _, losses = run(graphdef, base, optimizer, state, rows)

    learned = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(learned, lr=1e-2, weight_decay=0.01, eps=1e-8)
    np.testing.assert_allclose(losses, [peer_step(peer, adamw, row) for row in rows], atol=1e-4)
    assert abs(losses[-1] - losses[0]) > 1e-2  # something was learned, so something was compared


def test_lora_plus_gives_the_adapters_of_pefts_own(folder, tmp_path):
    model, graphdef, base, optimizer, state = build(folder, rate=1e-3, b_ratio=16.0)
    peer = peft_model(model, tmp_path / "initial")
    rows = list(windows(5, 1, 3))
    state, losses = run(graphdef, base, optimizer, state, rows)
    nnx.update(model, state.learned)
    save_adapter(tmp_path / "tuned", model, LORA, "base", {})

    rule = create_loraplus_optimizer(
        peer, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.01,
        eps=1e-8,
    )  # fmt: skip
    np.testing.assert_allclose(losses, [peer_step(peer, rule, row) for row in rows], atol=1e-5)
    before = safetensors.numpy.load_file(tmp_path / "initial" / "adapter_model.safetensors")
    tuned = safetensors.numpy.load_file(tmp_path / "tuned" / "adapter_model.safetensors")
    theirs = peft.get_peft_model_state_dict(peer, save_embedding_layers=False)
    assert tuned.keys() == theirs.keys()
    for name, x in tuned.items():
        moved = np.abs(x - before[name]).max()
        assert moved > (2e-2 if "lora_B" in name else 1e-3), name
        np.testing.assert_allclose(x, theirs[name].numpy(), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_full_tuning_equals_torch(tmp_path, tied):
    tensors = random_tensors(PARAMS, tied=tied)
    convert(FromMeta(write_meta(tmp_path / "meta", tensors, PARAMS), tmp_path / "model"))
    rows = list(windows(10, 2, 3))
    _, losses = run(*build_full(tmp_path / "model", k=2), rows)

    peer = reference(PARAMS, tensors)
    adamw = torch.optim.AdamW(peer.parameters(), lr=1e-3, weight_decay=0.01, eps=1e-8)
    np.testing.assert_allclose(losses, [peer_step(peer, adamw, row) for row in rows], atol=1e-4)
    assert abs(losses[-1] - losses[0]) > 1e-2
