"""The adapter folder, against `peft` on `transformers` with the same weights."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
import zipfile

import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import numpy as np
import peft
import safetensors.torch
import torch
from flax import nnx
from meta_files import random_tensors, reference, write_hf, write_meta
from random_models import BASE, VOCABULARY

from convert import from_hf
from convert.from_hf import FromHf
from convert.from_meta import FromMeta, convert
from jllama.config import PRESETS, LoraConfig
from jllama.errors import InputError
from jllama.folders.adapter import (
    check_base,
    load_adapter,
    read_lora_config,
    read_passport,
    save_adapter,
)
from jllama.folders.load import load_model
from jllama.folders.manifest import manifest_sha256, write_sealed
from jllama.folders.model import transformers_name
from jllama.folders.pickled import map_pickled
from jllama.lora import adapted_linears, attach, merge, scaled, split

# peft asks transformers for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PARAMS = BASE | {"n_kv_heads": 2}
ALL = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
HF_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
LORA = LoraConfig(rank=4, alpha=12, dropout=0.1, targets=ALL)
METHODS = {
    "LoRA": LORA,
    "rsLoRA": dataclasses.replace(LORA, rslora=True),
    "DoRA": dataclasses.replace(LORA, dora=True),
    "DoRA and rsLoRA": dataclasses.replace(LORA, dora=True, rslora=True),
}
TOLERANCE = 2e-5
Q_B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 16), dtype=np.int32)


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(PARAMS)


@pytest.fixture(scope="module")
def base(tensors, tmp_path_factory):
    """The model folder of a tiny grouped-query model."""
    folder = tmp_path_factory.mktemp("base")
    convert(FromMeta(write_meta(folder / "meta", tensors, PARAMS), folder / "model"))
    return folder / "model"


def adapted(base, config=LORA, seed=0):
    """The model with random adapters: B is not zero, so every matrix counts."""
    model = load_model(base, "fp32")
    attach(model, config, jax.random.key(seed))
    for index, linear in enumerate(adapted_linears(model).values()):
        key = jax.random.key(1000 + index)
        linear.lora.b[...] = 0.1 * jax.random.normal(key, linear.lora.b.shape)
        if config.dora:
            linear.lora.magnitude[...] = 0.1 * jax.random.normal(key, linear.lora.magnitude.shape)
    return model


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """An adapter folder written here; tests damage copies of it."""
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(path, adapted(base), LORA, "models/tiny", {"prompt_style": "alpaca"})
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "adapter")


@pytest.fixture
def foreign(copy):
    """The same without a passport, as another tool would leave it."""
    (copy / "jllama.json").unlink()
    return copy


def logits(model) -> np.ndarray:
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))
    return np.asarray(run(state, jnp.asarray(IDS)))


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS).long()).logits.numpy()


def assert_agree(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


# ----------------------------------------------------------------------------- to and from peft


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", [ALL, ("wq", "wk"), ("wq", "wv")])
def test_an_adapter_saved_here_gives_the_same_logits_in_peft(
    targets, method, base, tensors, tmp_path
):  # lesson 12
    config = dataclasses.replace(METHODS[method], targets=targets)
    ours = adapted(base, config)
    save_adapter(tmp_path / "adapter", ours, config, "models/tiny", {})
    theirs = peft.PeftModel.from_pretrained(reference(PARAMS, tensors), tmp_path / "adapter").eval()
    stored = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    keys = peft.set_peft_model_state_dict(theirs, stored)
    assert not keys.unexpected_keys
    assert not [name for name in keys.missing_keys if "lora_" in name]
    expected = torch_logits(theirs)
    assert_agree(logits(ours), expected)
    without = logits(load_model(base, "fp32"))
    assert np.abs(expected - without).max() > 0.1  # the adapter does something


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_saved_by_peft_gives_the_same_logits_here(
    dtype, method, base, tensors, tmp_path
):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=HF_ALL, task_type="CAUSAL_LM", init_lora_weights=False,
        use_rslora=METHODS[method].rslora, use_dora=METHODS[method].dora,
    )  # fmt: skip
    theirs = peft.get_peft_model(reference(PARAMS, tensors), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(load_model(base, "fp32"), tmp_path / "adapter")
    assert_agree(logits(ours), torch_logits(theirs.float()))


# What PEFT matches against full module paths: an expression, the ends of paths, or all.
TARGETS = {
    "expression of a whole path": r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
    "expression of a path's end": r".*\.(q_proj|v_proj)",
    "expression that looks around": r".*(?<!k_)(?<!o_)proj(?<=(q|v)_proj)",
    "names": ["v_proj", "q_proj"],
    "ends of paths": ["self_attn.q_proj", "mlp.gate_proj"],
    "all of them": "all-linear",
}


@pytest.mark.parametrize("what", TARGETS)
def test_targets_are_those_that_peft_finds(what, base, tensors, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=TARGETS[what], init_lora_weights=False)
    theirs = peft.get_peft_model(reference(PARAMS, tensors), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    stored = json.loads(file.read_text()) | {"target_modules": TARGETS[what]}
    file.write_text(json.dumps(stored))  # peft writes out what "all-linear" stood for
    found = {HF_ALL[ALL.index(name)] for name in read_lora_config(tmp_path / "adapter").targets}
    names = theirs.base_model.targeted_module_names
    assert found == {name.rpartition(".")[2] for name in names}
    assert len(names) == len(found) * PARAMS["n_layers"]
    ours = load_adapter(load_model(base, "fp32"), tmp_path / "adapter")
    assert_agree(logits(ours), torch_logits(theirs))


def test_an_expression_that_would_take_for_ever_is_not_run(foreign):
    set_config(target_modules="(.*)*" * 20 + "x")(foreign)
    started = time.monotonic()
    assert read_lora_config(foreign).targets == ALL
    assert time.monotonic() - started < 5


def test_no_dropout_in_the_settings_is_a_dropout_of_0(foreign):
    set_config(lora_dropout=None, use_dora=None)(foreign)
    assert read_lora_config(foreign).dropout == 0


PEFT_02 = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha",
           "lora_dropout", "modules_to_save", "peft_type", "r", "target_modules",
           "task_type")  # fmt: skip
# What is adapted; how adapter_config.json then says so: the fields it keeps, and others.
CONFIGS = {
    "of PEFT 0.2": (["q_proj", "v_proj"], PEFT_02, {"enable_lora": None, "merge_weights": False}),
    "nothing but the kind": (["q_proj", "v_proj"], ("peft_type",), {}),
    "null wherever null is allowed": (
        ["q_proj", "v_proj"], None,
        {"target_modules": None, "modules_to_save": None, "layers_to_transform": None,
         "use_dora": None, "use_rslora": None, "lora_bias": None},
    ),
    "fields and linears that no LLaMA knows": (
        ["q_proj", "gate_proj"], None,
        {"target_modules": ["q_proj", "gate_proj", "query_key_value", "c_attn"], "invented": {}},
    ),
    "all layers, one by one": (
        ["o_proj"], None, {"layers_to_transform": [0, 1], "layers_pattern": "layers"}
    ),
    "but for some": (
        ["v_proj", "q_proj"], None,
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "exclude_modules": ["k_proj"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("what", CONFIGS)
def test_configs_of_any_age_are_read_as_peft_reads_them(what, pickled, base, tensors, tmp_path):
    targets, kept, more = CONFIGS[what]
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    made = peft.get_peft_model(reference(PARAMS, tensors), config)
    for name, parameter in made.named_parameters():
        parameter.data *= 0.3 if "lora_B" in name else 1
    made.save_pretrained(tmp_path / "adapter")
    if pickled:
        as_pickle(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    stored = json.loads(file.read_text())
    stored = {name: stored[name] for name in kept or stored} | more
    file.write_text(json.dumps(stored))
    ours = logits(load_adapter(load_model(base, "fp32"), tmp_path / "adapter"))
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}  # of others it warns
    file.write_text(json.dumps({name: stored[name] for name in stored.keys() & known}))
    theirs = peft.PeftModel.from_pretrained(reference(PARAMS, tensors), tmp_path / "adapter").eval()
    np.testing.assert_allclose(ours, torch_logits(theirs), rtol=0, atol=1e-5)
    assert np.abs(ours - logits(load_model(base, "fp32"))).max() > 0.1


def as_pickle(folder, change=lambda tensors: None) -> None:
    """The weights of an adapter folder as older versions of PEFT wrote them."""
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    torch.save(tensors, folder / "adapter_model.bin")
    file.unlink()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_pickled_adapter_is_read_bit_for_bit(dtype, foreign):
    expected = {}

    def change(tensors):
        for index, name in enumerate(tensors):
            tensor = tensors[name].to(dtype)
            if index % 3 == 0:
                tensor = tensor.t().contiguous().t()  # another order in memory
            if index % 3 == 1:
                tensor = torch.cat([tensor, tensor])[len(tensor) :]  # a part of a storage
            tensors[name] = torch.nn.Parameter(tensor) if index % 2 else tensor
            expected[name] = tensor.float().numpy()

    as_pickle(foreign, change)
    found = map_pickled(foreign / "adapter_model.bin", "an adapter", "")
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array.astype(np.float32), expected[name])


class Program:
    """What a hostile pickle holds: unpickling it would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


# What is in an adapter_model.bin in place of its tensors, and what is said of it.
PICKLES = {
    "a program": ({Q_B: Program("made")}, "refused, it asks for posix.mkdir"),
    "a list": ([torch.ones(2)], "holds something else than tensors by name"),
    "a number": ({Q_B: 3}, "holds something else than tensors by name"),
    "whole numbers": ({Q_B: torch.ones(2).int()}, "holds a IntStorage, which is not fp16"),
    "a sparse tensor": ({Q_B: torch.ones(2, 2).to_sparse()}, "refused, it asks for torch._utils."),
}


@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_of_anything_else_is_refused_and_not_run(what, base, foreign, monkeypatch):
    monkeypatch.chdir(foreign)
    content, words = PICKLES[what]
    (foreign / "adapter_model.safetensors").unlink()
    torch.save(content, foreign / "adapter_model.bin")
    with pytest.raises(InputError) as refused:
        load_adapter(load_model(base, "fp32"), foreign)
    assert words in str(refused.value)
    assert "adapter_model.bin" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (foreign / "made").exists()


def test_a_pickle_whose_tensors_leave_their_storage_is_refused(foreign):
    tensor = torch.ones(4, 4)
    (foreign / "adapter_model.safetensors").unlink()
    file = foreign / "adapter_model.bin"
    torch.save({Q_B: tensor}, file)
    shape, larger = b"K\x04K\x04\x86", b"K\x05K\x04\x86"  # (4, 4) -> (5, 4)
    content = file.read_bytes()
    assert content.count(shape) == 1
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, part in entries.items():
            archive.writestr(name, part.replace(shape, larger))
    with pytest.raises(InputError, match=r"shape \(5, 4\), of a storage of 16 elements"):
        map_pickled(file, "an adapter", "copy it again")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_pickle_is_refused(share, base, foreign):
    as_pickle(foreign)
    file = foreign / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(InputError, match=r"adapter_model.bin: damaged, or not torch.save's"):
        load_adapter(load_model(base, "fp32"), foreign)


@pytest.mark.parametrize("hub", [False, True])
def test_peft_opens_base_and_adapter_by_the_adapter_alone_where_the_base_is_known(
    hub, tensors, tmp_path, monkeypatch
):
    name = "models--meta-llama--Llama-tiny/snapshots/0123" if hub else "hf"
    hf = write_hf(tmp_path / name, tensors, PARAMS)
    from_hf.convert(FromHf(hf, tmp_path / "model"))
    base_name = transformers_name(tmp_path / "model")
    assert base_name == ("meta-llama/Llama-tiny" if hub else str(hf))
    if hub:
        return
    ours = adapted(tmp_path / "model")
    save_adapter(tmp_path / "adapter", ours, LORA, base_name, {})
    monkeypatch.chdir(tmp_path.parent)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_agree(logits(ours), torch_logits(theirs))
    shutil.rmtree(hf)
    assert transformers_name(tmp_path / "model") == str(tmp_path / "model")


def test_save_and_load_give_back_every_bit_and_the_passport(base, folder):
    saved, loaded = adapted(base), load_adapter(load_model(base, "fp32"), folder)
    for name, linear in adapted_linears(saved).items():
        again = adapted_linears(loaded)[name].lora
        assert (np.asarray(linear.lora.a[...]) == np.asarray(again.a[...])).all()
        assert (np.asarray(linear.lora.b[...]) == np.asarray(again.b[...])).all()
        assert (again.scale, again.dropout) == (3.0, 0.1)
    passport = read_passport(folder)
    assert passport["prompt_style"] == "alpaca"
    assert passport["lora"]["scale"] == 3.0


# ------------------------------------------------------------------------------ what LoRA promises


@pytest.mark.parametrize("method", METHODS)
def test_merged_weights_give_the_logits_of_base_and_adapter(method, base):  # lesson 13
    model = adapted(base, METHODS[method])
    expected = logits(model)
    merge(model)
    assert adapted_linears(model) == {}
    # fp32 rounds the sum W + s B A, of which rsLoRA's s is the largest: 3.5e-5 was seen.
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=3 * TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_scaled_by_zero_is_the_base_bit_for_bit(method, base):
    graph, adapters, rest = split(adapted(base, METHODS[method]))
    off = nnx.merge(graph, scaled(adapters, 0.0), rest)
    on = nnx.merge(graph, scaled(adapters, 1.0), rest)
    expected = logits(load_model(base, "fp32"))
    assert (logits(off) == expected).all()
    assert (logits(on) == logits(adapted(base, METHODS[method]))).all()
    assert np.abs(logits(on) - expected).max() > 0.1


@pytest.mark.promotes
def test_a_fresh_adapter_changes_nothing_and_stays_fp32_on_a_bf16_base(base):
    model = load_model(base, "bf16")
    expected = logits(model)
    attach(model, LORA, jax.random.key(0))
    assert (logits(model) == expected).all()
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(split(model)[1])}
    assert dtypes == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("preset", "targets", "parameters"),
    [
        ("llama-2-7b", ("wq", "wv"), 8_388_608),
        ("llama-3-8b", ("wq", "wv"), 32 * 16 * (4096 + 4096 + 4096 + 1024)),
        ("llama-2-7b", ALL, 32 * 16 * (4 * 8192 + 3 * (4096 + 11008))),
    ],
)
def test_the_adapter_has_the_closed_formulas_parameter_count(preset, targets, parameters):
    assert LoraConfig(rank=16, targets=targets).parameter_count(PRESETS[preset]) == parameters


def test_the_adapter_on_a_model_has_the_counted_parameters(base):
    model = adapted(base)
    found = sum(leaf.size for leaf in jax.tree.leaves(split(model)[1]))
    assert found == LORA.parameter_count(model.config)


# ------------------------------------------------------------------------------- what is refused


def set_config(**fields):
    def change(path):
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def set_tensors(change_tensors):
    def change(path):
        file = path / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(file)
        change_tensors(tensors)
        safetensors.torch.save_file(tensors, file)

    return change


def flip_header(path):
    file = path / "adapter_model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


# What is wrong -> how to make it so, and what the message must say
DAMAGE = {
    "unknown tensor": (
        set_tensors(lambda tensors: tensors.update(extra=torch.ones(2))),
        ["extra: unknown tensor", "load it on its own base"],
    ),
    "missing tensor": (
        set_tensors(lambda tensors: tensors.pop(Q_B)),
        [f"{Q_B}: expected (32, 4), found nothing"],
    ),
    "other base": (
        set_tensors(lambda tensors: tensors.update({Q_B: torch.ones(64, 4)})),
        [f"{Q_B}: expected (32, 4), found (64, 4)"],
    ),
    "other rank": (set_config(r=8), [f"{Q_B}: expected (32, 8), found (32, 4)"]),
    "no rank": (set_config(r=None), ["adapter_config.json", "r None"]),
    "no LoRA": (set_config(peft_type="LOHA"), ["peft_type 'LOHA', expected 'LORA'"]),
    "DoRA without magnitudes": (
        set_config(use_dora=True),
        ["q_proj.lora_magnitude_vector: expected (32,), found nothing"],
    ),
    "PiSSA, which changes the base": (
        set_config(init_lora_weights="pissa"),
        ["init_lora_weights 'pissa'"],
    ),
    "aLoRA, active after some tokens only": (
        set_config(alora_invocation_tokens=[1, 2]),
        ["alora_invocation_tokens [1, 2]"],
    ),
    "layers repeated": (set_config(layer_replication=[[0, 2]]), ["layer_replication [[0, 2]]"]),
    "ranks by layer": (set_config(rank_pattern={"q_proj": 8}), ["rank_pattern {'q_proj': 8}"]),
    "trained biases": (set_config(bias="all"), ["bias 'all'"]),
    "other modules": (
        set_config(target_modules=["q_proj", "lm_head"]),
        ["unknown linear lm_head", "choose from wq"],
    ),
    "no targets": (set_config(target_modules=[]), ["target_modules is [], expected names"]),
    "no config": (
        lambda path: (path / "adapter_config.json").unlink(),
        ["adapter_config.json: no such file"],
    ),
    "no weights": (
        lambda path: (path / "adapter_model.safetensors").unlink(),
        ["no such file; expected the weights of a PEFT adapter"],
    ),
    "not a number": (
        set_tensors(lambda tensors: tensors.update({Q_B: tensors[Q_B] * float("nan")})),
        [f"{Q_B} (1 in all) hold NaN or infinity"],
    ),
    "whole numbers": (
        set_tensors(lambda tensors: tensors.update({Q_B: tensors[Q_B].int()})),
        ["adapter_model.safetensors", f"{Q_B} is I32, expected F16, BF16, F32"],
    ),
    "some layers only": (
        set_tensors(lambda tensors: [tensors.pop(x) for x in list(tensors) if ".1.self" in x]),
        ["q_proj: adapted in layers 0, of 2 in this model", "some layers only is not supported"],
    ),
    "a header that lies": (flip_header, ["adapter_model.safetensors: damaged"]),
    **{
        f"{field} {value!r:.40}": (set_config(**{field: value}), ["adapter_config.json: ", words])
        for field, value, words in [
            ("lora_alpha", math.nan, "lora_alpha nan, expected a number, above 0"),
            ("lora_alpha", math.inf, "lora_alpha inf, expected a number, above 0"),
            ("lora_alpha", 0, "lora_alpha 0, expected a number, above 0"),
            ("lora_alpha", -1, "lora_alpha -1, expected a number, above 0"),
            ("lora_alpha", True, "lora_alpha True, expected a number, above 0"),
            ("lora_alpha", "16", "lora_alpha '16', expected a number"),
            ("lora_alpha", None, "lora_alpha None, expected a number, above 0"),
            ("r", True, "r True, expected a whole number, at least 1"),
            ("r", 0, "r 0, expected a whole number, at least 1"),
            ("r", [8], "r [8], expected a whole number, at least 1"),
            ("lora_dropout", "x", "lora_dropout 'x', expected a number"),
            ("lora_dropout", 1.0, "lora_dropout 1.0, expected a number, at least 0 and below 1"),
            ("use_dora", "no", "use_dora 'no', expected"),
            ("use_rslora", 1, "use_rslora 1, expected true or false"),
            ("bias", {"a": "b" * 10**6}, "not supported here: bias {'a': 'bbb"),
            ("target_modules", 5, "target_modules is 5, expected names such as q_proj"),
            ("target_modules", [7], "target_modules is [7], expected names"),
            ("target_modules", "(q_proj", "target_modules '(q_proj' is no regular expression"),
            ("target_modules", "a{9999999999999}", "is no regular expression"),
            ("target_modules", ["q" * 10**4], f"unknown linear {'q' * 80}; choose from"),
            ("target_modules", "(" * 9000, "is no regular expression"),
            ("target_modules", "q" * 10**6, "or a regular expression of at most 10,000"),
            ("target_parameters", ["experts"], "not supported here: target_parameters"),
        ]
    },
}


@pytest.mark.parametrize("what", DAMAGE)
def test_an_adapter_that_does_not_fit_is_refused(what, base, foreign):
    change, fragments = DAMAGE[what]
    change(foreign)
    with pytest.raises(InputError) as refused:
        load_adapter(load_model(base, "fp32"), foreign)
    for fragment in fragments:
        assert fragment in str(refused.value)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "jllama.json"]
)
def test_a_damaged_file_of_an_adapter_is_named_and_refused(name, damage, base, copy):
    """Reliability 5. An adapter without its passport is one from another tool."""
    file = copy / name
    content = bytearray(file.read_bytes())
    content[-30] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    model = load_model(base, "fp32")
    if (name, damage) == ("jllama.json", "remove"):
        load_adapter(model, copy)
        return
    with pytest.raises(InputError, match=name):
        load_adapter(model, copy)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"files": ["adapter_config.json"]}, "files is ['adapter_config.json']"),
        ({"files": {"adapter_config.json": 7}}, "files, adapter_config.json is 7"),
        ({"base_manifest_sha256": None}, "base_manifest_sha256 is None"),
        ({"tokenizer_sha256": ["a"]}, "tokenizer_sha256 is ['a']"),
        ({"prompt_style": {}}, "prompt_style is {}"),
    ],
)
def test_a_passport_whose_fields_are_of_a_wrong_kind_is_refused(fields, problem, base, copy):
    write_sealed(copy / "jllama.json", fields)
    for read in (read_lora_config, read_passport, lambda path: check_base(path, base)):
        with pytest.raises(InputError) as refused:
            read(copy)
        assert str(refused.value).startswith(f"{copy / 'jllama.json'}: {problem}")


def test_an_adapter_that_is_not_finite_is_not_written(base, tmp_path):
    model = adapted(base)
    lora = adapted_linears(model)["layers.1.attention.wq"].lora
    lora.b[...] = lora.b[...].at[3, 1].set(jnp.nan)
    with pytest.raises(InputError, match=rf"{Q_B} would hold NaN or infinity"):
        save_adapter(tmp_path / "adapter", model, LORA, "models/tiny", {})
    assert list(tmp_path.iterdir()) == []


def test_another_base_or_tokenizer_is_refused_unless_forced(base, tmp_path):
    passport = {
        "base_manifest_sha256": manifest_sha256(base),
        "tokenizer_sha256": hashlib.sha256((base / "tokenizer.model").read_bytes()).hexdigest(),
    }
    for wrong, what in [({}, None), (dict.fromkeys(passport, "0" * 64), "manifest 000000000000"),
                        ({"tokenizer_sha256": "1" * 64}, "tokenizer 111111111111")]:  # fmt: skip
        folder = tmp_path / str(what)
        save_adapter(folder, adapted(base), LORA, "models/tiny", passport | wrong)
        check_base(folder, base, force=True)
        if what is None:
            check_base(folder, base)
            continue
        with pytest.raises(InputError, match=rf"trained on models/tiny \({what}\).*or --force"):
            check_base(folder, base)
