"""Dtypes through conversions: kept tensor by tensor unless --dtype asks; and all is finite."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
import transformers
from flax import nnx
from meta_files import random_tensors, write_hf, write_meta
from random_models import GROUPED

from convert import from_hf, from_meta, to_hf, to_meta, verify
from convert.from_hf import FromHf
from convert.from_meta import FromMeta
from convert.to_hf import ToHf
from convert.to_meta import ToMeta
from jllama.config import LoraConfig
from jllama.errors import InputError
from jllama.folders.adapter import save_adapter
from jllama.folders.load import load_model, save_model
from jllama.folders.manifest import read_manifest
from jllama.folders.tensors import DTYPES, is_finite
from jllama.lora import adapted_linears, attach, merge
from jllama.model import named_arrays

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
WQ = "layers.1.attention.wq.weight"
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0, targets=("wq", "w2"))


def mixed() -> dict[str, torch.Tensor]:
    """Norms in fp32 beside bf16 weights, as many tools leave them."""
    return {
        name: tensor if tensor.ndim == 1 else tensor.bfloat16()
        for name, tensor in random_tensors(GROUPED).items()
    }


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    return found


def meta_tensors(folder: Path, index: int = 0) -> dict[str, torch.Tensor]:
    found = torch.load(folder / f"consolidated.{index:02d}.pth", weights_only=True)
    return {name: tensor for name, tensor in found.items() if name != "rope.freqs"}


@pytest.mark.parametrize("shards", [1, 2])
def test_mixed_dtypes_come_in_are_certified_and_leave_again(shards, tmp_path, capsys):
    tensors = mixed()
    meta = write_meta(tmp_path / "meta", tensors, GROUPED, shards=shards)
    hf = write_hf(tmp_path / "hf", tensors, GROUPED, files=shards)
    from_meta.convert(FromMeta(meta, tmp_path / "m"))
    assert "bfloat16, 5 tensors float32, " in capsys.readouterr().out
    from_hf.convert(FromHf(hf, tmp_path / "h"))
    certified = read_manifest(tmp_path / "m")["tensors"]
    assert certified == read_manifest(tmp_path / "h")["tensors"]
    assert {name: NAMES_OF[tensor.dtype] for name, tensor in tensors.items()} == {
        name: entry["dtype"] for name, entry in certified.items()
    }
    to_hf.export(ToHf(tmp_path / "m", tmp_path / "hf2"))
    assert equal(hf_tensors(tmp_path / "hf2"), hf_tensors(hf))
    assert json.loads((tmp_path / "hf2" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    to_meta.export(ToMeta(tmp_path / "h", tmp_path / "meta2", shards=shards))
    for index in range(shards):
        assert equal(meta_tensors(tmp_path / "meta2", index), meta_tensors(meta, index))
    for source in (meta, hf):
        verify.main([str(tmp_path / "m"), "--against", str(source)])
        assert f"byte for byte that of {source}" in capsys.readouterr().out
    ids = np.arange(8, dtype=np.int32)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf2", dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(ids).long()).logits.numpy()
    found = np.asarray(load_model(tmp_path / "m", "fp32")(jnp.asarray(ids)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


NAMES_OF = {TORCH[name]: words for name, words in NAMES.items()}


@pytest.mark.parametrize("stored", ["bf16", "fp32", "mixed"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_dtype_that_is_asked_for_is_that_of_every_tensor_rounded_once(
    stored, dtype, tmp_path, capsys
):
    tensors = mixed() if stored == "mixed" else random_tensors(GROUPED, dtype=TORCH[stored])
    expected = {name: tensor.to(TORCH[dtype]) for name, tensor in tensors.items()}
    meta = write_meta(tmp_path / "meta", tensors, GROUPED, shards=2)
    hf = write_hf(tmp_path / "hf", tensors, GROUPED)
    from_meta.main([str(meta), str(tmp_path / "m"), "--dtype", dtype])
    from_hf.main([str(hf), str(tmp_path / "h"), "--dtype", dtype])
    certified = read_manifest(tmp_path / "m")["tensors"]
    assert certified == read_manifest(tmp_path / "h")["tensors"]
    assert {entry["dtype"] for entry in certified.values()} == {NAMES[dtype]}
    to_meta.export(ToMeta(tmp_path / "m", tmp_path / "out"))
    assert equal(meta_tensors(tmp_path / "out"), expected)
    from_meta.convert(FromMeta(meta, tmp_path / "as it is"))
    to_meta.main([str(tmp_path / "as it is"), str(tmp_path / "out2"), "--dtype", dtype])
    assert equal(meta_tensors(tmp_path / "out2"), expected)
    to_hf.main([str(tmp_path / "as it is"), str(tmp_path / "out3"), "--dtype", dtype])
    config = json.loads((tmp_path / "out3" / "config.json").read_text())
    assert config["torch_dtype"] == NAMES[dtype]
    assert {x.dtype for x in hf_tensors(tmp_path / "out3").values()} == {TORCH[dtype]}
    capsys.readouterr()
    verify.main([str(tmp_path / "m"), "--against", str(meta)])
    rounded = sum(tensor.dtype != TORCH[dtype] for tensor in tensors.values())
    words = f"{rounded} of them rounded to another dtype" if rounded else "byte for byte"
    assert words in capsys.readouterr().out


def test_a_wrong_dtype_is_refused_by_its_choices(original, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        from_meta.main([str(original), str(tmp_path / "m"), "--dtype", "fp8"])
    assert ended.value.code == 2
    assert "--dtype fp8, expected bf16, fp16 or fp32" in capsys.readouterr().err


def test_a_stopped_conversion_to_another_dtype_is_begun_anew(original, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("jllama.folders.model.ModelWriter.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            from_meta.convert(FromMeta(original, tmp_path / "m"))
    from_meta.convert(FromMeta(original, tmp_path / "m", dtype="bf16"))
    entries = read_manifest(tmp_path / "m")["tensors"].values()
    assert {entry["dtype"] for entry in entries} == {"bfloat16"}


# ------------------------------------------------------------------------------------ all is finite


@pytest.mark.parametrize("code", DTYPES)
def test_finiteness_is_told_by_the_bits_as_numpy_tells_it(code):
    dtype = DTYPES[code]
    every = np.arange(2**16, dtype=np.uint16)
    bits = every.astype(np.uint32) << 16 if dtype.itemsize == 4 else every
    numbers = bits.view(dtype)
    expected = np.isfinite(numbers.astype(np.float32) if code == "BF16" else numbers)
    assert [is_finite(numbers[i : i + 1]) for i in range(0, 2**16, 7)] == expected[::7].tolist()
    assert is_finite(numbers[expected])
    assert is_finite(numbers[:0])


@pytest.fixture
def large(tmp_path):
    """A model folder with a weight that fp16 cannot hold."""
    tensors = random_tensors(GROUPED)
    tensors[WQ][3, 3] = 70_000.0
    from_meta.convert(FromMeta(write_meta(tmp_path / "meta", tensors, GROUPED), tmp_path / "m"))
    return tmp_path / "m"


def refused(function, *arguments) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments)
    return str(error.value)


def test_what_overflows_in_fp16_is_named_and_nothing_is_written(large, tmp_path):
    theirs = "model.layers.1.self_attn.q_proj.weight"
    out = tmp_path / "out"
    before = sorted(os.listdir(tmp_path))
    for name, function, settings in [
        (WQ, from_meta.convert, FromMeta(tmp_path / "meta", out, dtype="fp16")),
        (theirs, to_hf.export, ToHf(large, out, dtype="fp16")),
        (WQ, to_meta.export, ToMeta(large, out, dtype="fp16")),
    ]:
        message = refused(function, settings)
        assert f"{name} would hold NaN or infinity" in message
        assert "choose bf16 or fp32" in message
        assert sorted(os.listdir(tmp_path)) == before


def adapter(base: Path, folder: Path, size: float):
    model = load_model(base, "fp32")
    attach(model, LORA, jax.random.key(0))
    for index, linear in enumerate(adapted_linears(model).values()):
        linear.lora.b[...] = size * jax.random.normal(jax.random.key(index), linear.lora.b.shape)
    save_adapter(folder, model, LORA, str(base), {})
    return model


@pytest.mark.parametrize("command", [to_hf, to_meta])
def test_a_merge_that_overflows_is_named_and_nothing_is_written(command, tmp_path, capsys):
    tensors = random_tensors(GROUPED, dtype=torch.float16)
    from_meta.convert(FromMeta(write_meta(tmp_path / "meta", tensors, GROUPED), tmp_path / "m"))
    adapter(tmp_path / "m", tmp_path / "ad", 1e6)
    flags = [str(tmp_path / "m"), str(tmp_path / "out"), "--adapter", str(tmp_path / "ad")]
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(SystemExit) as ended:
        command.main(flags)
    assert ended.value.code == 2
    assert "would hold NaN or infinity" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before
    command.main([*flags, "--dtype", "fp32"])  # what the message advises


def test_a_tuned_model_that_is_not_finite_is_not_written(large, tmp_path):
    model = load_model(large, "fp32")
    before = sorted(os.listdir(tmp_path))
    message = refused(save_model, tmp_path / "tuned", model, np.float16, {}, "x")
    assert f"{WQ} would hold NaN or infinity" in message
    assert sorted(os.listdir(tmp_path)) == before


def test_a_merge_to_fp32_loses_nothing_of_a_small_adapter(tmp_path, capsys):
    """What the warning about rounding advises, here where bf16 would lose all of it."""
    tensors = mixed()
    from_meta.convert(FromMeta(write_meta(tmp_path / "meta", tensors, GROUPED), tmp_path / "m"))
    model = adapter(tmp_path / "m", tmp_path / "ad", 1e-5)
    flags = [str(tmp_path / "m"), "--adapter", str(tmp_path / "ad")]
    to_meta.main([*flags, str(tmp_path / "bf16")])
    assert "Export with --dtype fp32" in capsys.readouterr().out
    kept = {name: tensor.dtype for name, tensor in meta_tensors(tmp_path / "bf16").items()}
    assert kept == {name: tensor.dtype for name, tensor in tensors.items()}
    to_meta.main([*flags, str(tmp_path / "fp32"), "--dtype", "fp32"])
    assert "warning" not in capsys.readouterr().out
    merge(model)
    found, expected = meta_tensors(tmp_path / "fp32"), named_arrays(nnx.state(model))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name].numpy(), np.asarray(array), rtol=0, atol=1e-7)
    report = json.loads((tmp_path / "fp32" / "merge.json").read_text())
    assert report["mean_logit_difference"] < report["mean_logit_effect_of_adapter"] / 10
