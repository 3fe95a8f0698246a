"""Models whose linears are in codes: folders, adapters, answers, and what a layer loses."""

import json
import shutil

import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from flax import nnx
from random_models import GROUPED, model_folder

from convert.from_meta import main as from_meta
from convert.quantize import main as quantize
from convert.to_hf import main as to_hf
from convert.to_meta import main as to_meta
from convert.verify import main as verify
from eval.score import main as score
from jllama.config import Base, LoraConfig, asked_base, stored_shapes, weight_bytes
from jllama.decode.generate import generate_with_logprobs
from jllama.decode.sampling import Sampling
from jllama.errors import InputError
from jllama.folders.adapter import save_adapter
from jllama.folders.load import abstract_model, load_model
from jllama.folders.manifest import manifest_sha256, read_manifest
from jllama.folders.model import read_base, read_config
from jllama.layers import Weight
from jllama.lora import adapted_linears, attach, merge
from jllama.quantize.weights import quantised

pytestmark = pytest.mark.as_stored  # their models are quantised by the tests themselves

WIDE = GROUPED | {"dim": 64, "multiple_of": 16}
CODED = [Base("int8"), Base("int4"), Base("nf4")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("plain"), WIDE)


@pytest.fixture(scope="module", params=CODED, ids=lambda base: base.words)
def stored(request, plain, tmp_path_factory):
    """A base, and the model folder of it that `jllama quantize` makes."""
    folder = tmp_path_factory.mktemp("stored") / "model"
    quantize([str(plain), str(folder), "--base", request.param.format])
    return request.param, folder


IDS = np.random.default_rng(0).integers(0, 256, (2, 12))


def logits(model):
    return np.asarray(model(jnp.asarray(IDS)))


def test_a_folder_in_codes_is_the_model_that_is_made_while_loading(stored, plain):
    base, folder = stored
    assert read_base(folder) == base
    found = logits(load_model(folder, "fp32"))
    np.testing.assert_array_equal(found, logits(load_model(plain, "fp32", base=base)))
    # And the model whose matrices are the numbers that the codes stand for.
    model = load_model(plain, "fp32")
    for name, linear in model.linears().items():
        weight = quantised(linear.weight.matrix(jnp.float32), base)
        assert base.holds(f"{name}.weight")
        linear.weight = Weight(weight.matrix(jnp.float32))
    np.testing.assert_allclose(found, logits(model), rtol=1e-5, atol=1e-5)
    assert np.abs(found - logits(load_model(plain, "fp32"))).max() > 1e-3


def test_a_folder_in_codes_is_certified_and_of_the_size_that_is_planned(stored, plain, capsys):
    base, folder = stored
    config = read_config(folder)
    tensors = read_manifest(folder)["tensors"]
    shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    assert shapes == {
        n: s for block in stored_shapes(config, base).values() for n, s in block.items()
    }
    verify([str(folder)])
    size = sum(block.stat().st_size for block in (folder / "blocks").iterdir())
    expected = weight_bytes(config, "fp32", base)
    assert expected < size < expected + 2048 * (config.n_layers + 2)  # headers
    weights = jax.eval_shape(lambda: nnx.state(abstract_model(config, "fp32", base=base)))
    bits = sum(jax.dtypes.itemsize_bits(x.dtype) * x.size for x in jax.tree.leaves(weights))
    assert bits == 8 * expected


def test_a_damaged_code_is_found(stored, tmp_path, capsys):
    _, folder = stored
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "blocks" / "layers.1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"layers\.1.* differ from manifest"):
        load_model(copy, "fp32")


def test_a_folder_in_codes_is_compared_with_what_it_was_made_from(plain, stored, tmp_path, capsys):
    to_meta([str(plain), str(tmp_path / "meta")])
    from_meta([str(tmp_path / "meta"), str(tmp_path / "again"), "--base", stored[0].format])
    assert manifest_sha256(tmp_path / "again") == manifest_sha256(stored[1])
    verify([str(stored[1]), "--against", str(tmp_path / "meta")])
    assert "byte for byte" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        verify([str(stored[1]), "--against", str(plain)])
    assert "as it came; give what both were made from" in capsys.readouterr().err


def test_another_format_than_the_stored_one_is_refused(stored):
    base, folder = stored
    other = next(some for some in CODED if some != base)
    with pytest.raises(InputError, match=f"is stored as {base.words}, and {other.words} was asked"):
        load_model(folder, "fp32", base=other)
    with pytest.raises(InputError, match="needs base int8, int4 or nf4"):
        asked_base("stored", "w2")


def test_linears_that_are_skipped_stay_as_they_are(plain):
    model = load_model(plain, "bf16", base=Base("int4", ("w2", "wo")))
    kinds = {n.rpartition(".")[2]: type(x.weight).__name__ for n, x in model.linears().items()}
    assert kinds == dict.fromkeys(("wq", "wk", "wv", "w1", "w3"), "Int4") | dict.fromkeys(
        ("w2", "wo"), "Weight"
    )


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_merged_into_the_numbers_of_the_codes(stored, dora):
    model = load_model(stored[1], "fp32")
    attach(model, LoraConfig(4, targets=("wq", "w2"), dora=dora), jax.random.key(0))
    for linear in adapted_linears(model).values():
        linear.lora.b[...] = 0.05 * jax.random.normal(jax.random.key(1), linear.lora.b.shape)
    expected = logits(model)
    merge(model)
    np.testing.assert_allclose(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize("dora", [False, True])
def test_peft_has_the_same_logits_with_the_adapter_on_the_numbers(stored, dora, tmp_path, capsys):
    lora = LoraConfig(4, targets=("wq", "w2"), dora=dora)
    model = load_model(stored[1], "fp32")
    attach(model, lora, jax.random.key(0))
    for linear in adapted_linears(model).values():
        linear.lora.b[...] = 0.3 * jax.random.normal(jax.random.key(1), linear.lora.b.shape)
    to_hf([str(stored[1]), str(tmp_path / "hf"), "--dtype", "fp32"])
    save_adapter(tmp_path / "adapter", model, lora, str(tmp_path / "hf"), {})
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits(model), found, rtol=0, atol=1e-4)
    assert np.abs(found - logits(load_model(stored[1], "fp32"))).max() > 0.1


def test_a_model_in_codes_answers_as_its_logits_say(stored):
    model = load_model(stored[1], "fp32")
    (answer,) = generate_with_logprobs(model, [[1, 5, 9]], 8, Sampling(temperature=0))
    ids = [1, 5, 9, *answer.ids]
    likely = jax.nn.log_softmax(model(jnp.asarray([ids]))[0, 2:-1])
    assert answer.ids == likely.argmax(axis=-1).tolist()
    np.testing.assert_allclose(answer.logprobs, likely.max(axis=-1), atol=1e-4)


def test_quantize_reports_each_layer(plain, tmp_path, capsys):
    quantize([str(plain), str(tmp_path / "m"), "--base", "int8", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in report["layers"]] == ["layers.0", "layers.1"]
    for row in report["layers"]:
        assert 0.001 < row["weights"] < 0.01
        assert 0.0005 < row["outputs"] < 0.02
    with pytest.raises(SystemExit):
        quantize([str(tmp_path / "m"), str(tmp_path / "again")])
    assert "is stored as int8 already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def nll(assets, tmp_path_factory):
    """Of the answers of 200 rows, nats a token, by the base of a small model that was trained."""
    place = tmp_path_factory.mktemp("stories")
    from_meta([str(assets / "stories260K-meta"), str(place / "model")])

    def of(base):
        score([
            "--model", str(place / "model"), "--base", base, "--precision", "fp32",
            "--data", str(assets / "alpaca" / "alpaca_data_200.json"), "--skip-bad-rows", "200",
            "--exact-tokens", "0", "--json", "--output", str(place / f"{base}.json"),
        ])  # fmt: skip
        return json.loads((place / f"{base}.json").read_text())["nll_per_token"]

    return of


@pytest.mark.real
@pytest.mark.slow
def test_real_weights_lose_little(nll):
    stored = nll("stored")
    for base, most in (("int8", 0.005), ("int4", 0.03), ("nf4", 0.04)):
        assert nll(base) < (1 + most) * stored
