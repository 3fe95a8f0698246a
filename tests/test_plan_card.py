"""Plans for the card that is present, and children that compile: by a driver that is not there."""

import json
import os
import pickle
import re
from dataclasses import replace

import jax
import pytest
from random_models import BASE, model_folder

from jllama.attention import choose_implementation
from jllama.cli import card
from jllama.cli.children import Done
from jllama.config import PRESETS, LlamaConfig, LoraConfig
from jllama.errors import InputError
from jllama.sharding import MeshShape
from train.lora import main as train
from train.plan import auto, planner
from train.plan.arithmetic import Step
from train.plan.cards import GPUS, cpu, present_gpu
from train.plan.command import main
from train.plan.compiled import Request, needs_whole
from train.plan.planner import can_compile, make_plans

MIB = 2**20
H200 = GPUS["h200"]
SEVEN = Step(PRESETS["llama-2-7b"], LoraConfig(), "bf16", "block", 1, 512)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Has `nvidia-smi` tell of a card; a function of its name and capability."""
    program = tmp_path / "nvidia-smi"

    def tell(name="NVIDIA H200", capability="9.0", memory=143771):
        program.write_text(f"#!/bin/sh\necho '{name}, {memory} MiB, {capability}'\n")
        program.chmod(0o755)

    tell()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", card.FRACTION, card.OLD_FRACTION):
        monkeypatch.delenv(name, raising=False)
    return tell


class Compiler:
    """In place of `Children`: writes down what is to be compiled, and answers at once."""

    def __init__(self):
        self.asked = []

    def run(self, module, arguments, *, given, environment, heard):
        for request in pickle.loads(given):
            self.asked.append((request, environment))
            own = {"triton": 5 * MIB, "cublaslt": 7 * MIB}
            found = {"classes": {"x": 7 * MIB}, "host": 0, "time_us": {}, "kernels": 0,
                     "layer_kernels": 0, "compile_seconds": 1, "peaks": own,
                     "exchanges": {}, "exchanged": {},
                     "summed": True}  # fmt: skip
            heard(json.dumps(found) + "\n")
        return Done(0, "", "")

    def stop(self):
        raise AssertionError


@pytest.fixture
def compiler(monkeypatch):
    made = Compiler()
    monkeypatch.setattr(planner, "Children", lambda: made)
    monkeypatch.setattr(planner, "can_compile", lambda: True)
    monkeypatch.setattr(planner, "refuse_other_plugin", lambda: None)
    monkeypatch.setattr(planner, "_remembered", lambda request: None)
    monkeypatch.setattr(planner, "_remember", lambda request, found: None)
    return made


def test_a_known_card_is_compiled_for_by_its_description_where_it_is_present(driver, compiler):
    make_plans([Request(SEVEN)], present_gpu(), present=True)
    ((request, environment),) = compiler.asked
    assert request.gpu.name == "NVIDIA H200"
    assert environment["JAX_PLATFORMS"] == "cpu"  # no context on the card


def test_a_card_that_is_not_known_compiles_itself(driver, compiler):
    driver("NVIDIA X9000", "12.1")
    make_plans([Request(SEVEN)], present_gpu(), present=True)
    ((request, environment),) = compiler.asked
    assert request.gpu is None
    assert "JAX_PLATFORMS" not in environment
    assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_a_plan_goes_by_what_jax_may_take_of_the_card(driver, monkeypatch):
    assert present_gpu().room == H200.room == card.usable_bytes(H200.memory_mib)
    monkeypatch.setenv(card.OLD_FRACTION, "0.5")
    half = round(143771 / 2)
    assert present_gpu().room == half * MIB
    plan = planner.estimate(SEVEN, present_gpu())
    assert plan.free == half * MIB - plan.peak
    monkeypatch.setenv(card.OLD_FRACTION, "0.999")  # the margin stays
    assert present_gpu().room == H200.room


def test_training_goes_by_what_jax_has_taken(driver, monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 100_000 * MIB}

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert auto.this_device().room == 100_000 * MIB


def test_a_plan_says_who_computes_the_matmuls_at_the_peak_and_what_jax_takes(compiler, capsys):
    main(["--gpu", "h200"])
    said = " ".join(capsys.readouterr().out.split())
    assert "The peak is the larger of 5 with Triton's matmuls and 7 with cuBLASLt's." in said
    assert "JAX takes 0.965 of it (XLA_CLIENT_MEM_FRACTION)" in said
    main(["--gpu", "h200", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["matmuls"] == "cublaslt"
    assert found["peak_mib_by_matmuls"] == {"triton": 5, "cublaslt": 7}
    assert found["peak_mib"] == 7
    assert found["memory_fraction"] == pytest.approx(0.965, abs=5e-4)
    assert found["summed"] is True


@pytest.mark.parametrize(
    ("whole", "peak", "more"),
    [
        (False, 89, {}),
        (True, 91, {}),
        (True, 120, {}),
        (False, 130, {}),  # no recomputation brings it below
        (True, 10, {"lora": None}),
        (False, 10, {"mesh": MeshShape(fsdp=2)}),
        (True, 10, {"mesh": MeshShape(fsdp=2), "model": LlamaConfig(64, 5, 4, 2, 160, 128)}),
        (True, 10, {"model": LlamaConfig(64, 3, 4, 2, 160, 128)}),
    ],
)
def test_a_model_is_compiled_whole_where_a_sum_cannot_stand_for_it(whole, peak, more):
    request = Request(replace(SEVEN, **more), H200, room=100)
    assert needs_whole(request, peak) is whole
    for asked in (True, False):
        assert needs_whole(replace(request, whole=asked), peak) is asked
    assert needs_whole(replace(request, text="file"), peak)
    assert needs_whole(replace(request, room=0), peak)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="the packages of jllama[plan] are not installed")
def test_the_matmuls_of_the_larger_peak_are_named_and_timed_by_the_other():
    """Each alone, by XLA's own flag, gives its peak."""
    wide = replace(SEVEN, model=LlamaConfig(1024, 5, 8, 8, 2816, 32000), micro_batch_size=4)
    (plan,) = make_plans([Request(wide)], H200)
    assert plan.summed
    assert set(plan.peaks) == {"triton", "cublaslt"}
    assert plan.peak == max(plan.peaks.values()) == plan.peaks[plan.matmuls]
    assert plan.peaks["triton"] != plan.peaks["cublaslt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
        patch.setattr(planner, "_remembered", lambda request: None)
        patch.setattr(planner, "_remember", lambda request, found: None)
        (alone,) = make_plans([Request(wide)], H200)
    assert alone.peaks["triton"] == alone.peaks["cublaslt"] == plan.peaks["cublaslt"]


@pytest.mark.integration
def test_a_childs_own_error_is_shown(monkeypatch):
    """Not JAX's footnote on tracebacks, nor the traceback."""
    step = replace(SEVEN, precision="fp32", model=LlamaConfig(64, 2, 2, 2, 64, 64), optimizer="no")
    with pytest.raises(InputError) as raised:
        make_plans([Request(step)], cpu(), present=True)
    assert re.match(r"the step could not be compiled: \w+Error: ", str(raised.value))


def test_the_reason_of_an_end_is_the_error_and_not_what_follows_it():
    trace = "Traceback (most recent call last):\n  File 'x', line 1\n    f()\n"
    words = f"{trace}KeyError: 1\n\nDuring handling:\n\n{trace}ValueError: two\nlines\nfootnote"
    assert Done(1, "", words).reason == "ValueError: two"
    assert Done(1, "", "one\nlast\n").reason == "last"
    assert Done(1, "", "").reason == "no message"


def test_advice_that_fails_leaves_the_lack_of_memory_on_the_screen(monkeypatch):
    def fails(_):
        raise KeyError("who knows\nwhat")

    monkeypatch.setattr(auto, "alternatives", fails)
    with (
        pytest.raises(InputError, match=r"^out of memory: RESOURCE_EXHAUSTED: 9 bytes\n.*who"),
        auto.out_of_memory_explained(SEVEN),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes\nmore")


def test_training_refuses_bf16_on_a_card_without_it(driver, tmp_path, monkeypatch, capsys):
    driver("Tesla T4", "7.5", 15360)
    model_folder(tmp_path, BASE | {"n_layers": 1})
    rows = [{"prompt": "Say.", "completion": "a"}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(auto.jax, "default_backend", lambda: "gpu")
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.json")]
    with pytest.raises(SystemExit) as ended:
        train([*words, "--output-dir", str(tmp_path / "run"), "--precision", "bf16"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Tesla T4 (compute capability 7.5) has no bf16 arithmetic" in said
    assert "use --precision fp32" in said


def test_large_heads_take_xla_on_every_card():
    """cuDNN takes more than 128 from Hopper on; a card that is only described cannot be asked."""
    assert choose_implementation("gpu", "bfloat16", 128) == "cudnn"
    assert choose_implementation("gpu", "bfloat16", 136) == "xla"
    assert choose_implementation("gpu", "bfloat16", 256) == "xla"


@pytest.mark.integration
@pytest.mark.skipif(not can_compile(), reason="the packages of jllama[plan] are not installed")
def test_a_step_with_large_heads_is_planned():
    model = LlamaConfig(512, 2, 2, 2, 512, 512)  # heads of 256
    request = Request(replace(SEVEN, model=model), whole=False)
    (plan,) = make_plans([request], GPUS["a100-40gb"])  # whose cuDNN refuses them
    assert plan.classes["temporaries"] > 0
