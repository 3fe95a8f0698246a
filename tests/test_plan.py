"""Plans: against closed formulas, against what the step may need, and as a user asks for them.

The 7B tests compile for an H200 that is not there; they need the packages of the `plan` extra.
"""

import json
import math
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
from random_models import BASE, model_folder

from jllama.cli.card import CONTEXT_MIB
from jllama.cli.children import Done
from jllama.config import PRESETS, Base, LlamaConfig, LoraConfig, linear_shapes
from jllama.errors import InputError
from jllama.folders import load
from jllama.folders.model import read_config
from jllama.folders.run import RunFolder
from jllama.sharding import MeshShape, make_mesh
from train.lora import main as train
from train.plan import arithmetic, auto, ladder, planner
from train.plan.arithmetic import Step
from train.plan.cards import GPUS, cpu, find_gpu, target_config
from train.plan.command import PlanConfig, main
from train.plan.compiled import Request, answer, lower_training
from train.plan.planner import can_compile, make_plans
from train.step import planned_bytes

MIB = 2**20
SEVEN = PRESETS["llama-2-7b"]
H200 = GPUS["h200"]
needs_extra = pytest.mark.skipif(
    not can_compile(), reason="the packages of jllama[plan] are not installed"
)


def seven(**more):
    settings = {"precision": "bf16", "remat": "block", "micro_batch_size": 1, "max_seq_len": 512}
    return Step(SEVEN, LoraConfig(), **settings | more)


def asked(capsys, *words):
    main([str(word) for word in words])
    return capsys.readouterr().out


def of_layers(**mib):
    """7B with few layers compiles soon; whole, it is for `make nightly`."""
    return pytest.mark.parametrize(
        ("layers", "mib"),
        [(4, mib["four"]), pytest.param(32, mib["whole"], marks=pytest.mark.slow)],
    )


@pytest.mark.integration
@needs_extra
@of_layers(four=2_182, whole=13_215)
def test_7b_plans_what_the_weights_take_and_little_more(tmp_path, layers, mib):
    text = tmp_path / "step.txt"
    model = replace(SEVEN, n_layers=layers)
    (plan,) = make_plans([Request(replace(seven(), model=model), H200, text=str(text))], H200)
    assert plan.compiled
    assert not plan.summed
    assert plan.peaks["triton"] / MIB == pytest.approx(mib, rel=0.002)
    adapters = 8_388_608 * 4 * layers // 32
    assert plan.classes["base_weights"] == model.parameter_count * 2
    assert plan.classes["adapters"] == adapters
    assert plan.classes["accumulator"] == adapters
    moments = plan.classes["optimizer_state"]
    assert 2 * adapters <= moments <= 2 * adapters + 64  # and a few counters
    saved = layers * 512 * 4096 * 2
    # cuBLASLt's program also keeps what adapters' gradients are made of.
    assert saved * 0.99 <= plan.classes["saved_activations"] <= 3.5 * saved
    for program in (text, tmp_path / "step.cublaslt.txt"):
        holds_no_copy_of_a_frozen_weight(program.read_text(), layers)


def holds_no_copy_of_a_frozen_weight(text, layers=32):
    """No gradient, accumulator, cast, slice or copy: such a shape is only ever passed on."""
    shapes = ("4096,4096", "11008,4096", "4096,11008", "32000,4096", "4096,32000")
    found = operations(text, shapes)
    passed_on = ("parameter", "get-tuple-element", "bitcast")
    assert not [line for operation, line in found if operation not in passed_on]
    assert len(found) >= layers * 7 + 2  # the net is not empty


def operations(text, shapes):
    """(operation, line) of every line outside fused computations that makes one of the shapes."""
    inside = set(re.findall(r"kind=\w+, calls=%?([\w.-]+)", text))
    found, fused = [], False
    for line in text.splitlines():
        if line and not line.startswith(" "):
            fused = line.split()[0].lstrip("%") in inside
        made = re.match(r"\s*(?:ROOT )?%?\S+ = \w+\[([\d,]*)\]\S* ([\w-]+)\(", line)
        if made and made[1] in shapes and not fused:
            found.append((made[2], line.strip()[:200]))
    return found


@pytest.mark.integration
@needs_extra
@of_layers(four=3_351, whole=16_063)
def test_7b_at_8_by_1024_takes(layers, mib):
    step = seven(micro_batch_size=8, max_seq_len=1024)
    step = replace(step, model=replace(SEVEN, n_layers=layers))
    (plan,) = make_plans([Request(step, H200)], H200)
    assert plan.peaks["triton"] / MIB == pytest.approx(mib, rel=0.002)


@pytest.mark.integration
@needs_extra
@of_layers(four=4_311, whole=27_350)
def test_the_reports_own_setting_takes(layers, mib):
    step = seven(precision="fp32", remat="ffn", max_seq_len=256)
    step = replace(step, model=replace(SEVEN, n_layers=layers, ffn_bias=True))
    (plan,) = make_plans([Request(step, H200)], H200)
    assert plan.peaks["triton"] / MIB == pytest.approx(mib, rel=0.002)


@pytest.mark.integration
@needs_extra
def test_small_models_extended_are_the_whole():
    wide = LlamaConfig(1024, 9, 8, 8, 2816, 32000)
    step = replace(seven(remat="none", micro_batch_size=8), model=wide)
    requests = [Request(step, H200, whole=whole) for whole in (True, False)]
    whole, extended = make_plans(requests, H200)
    for who, peak in whole.peaks.items():
        assert extended.peaks[who] == pytest.approx(peak, rel=0.002), who
    assert extended.predicted == pytest.approx(whole.predicted, rel=0.01)
    assert whole.classes["temporaries"] > 0


@pytest.mark.integration
@needs_extra
@pytest.mark.parametrize(
    ("base", "gathers"), [(None, 2), (Base("int8"), 2.75)], ids=["bf16", "int8"]
)
def test_cards_exchange_what_fsdp_needs(base, gathers):
    """Each weight twice a micro-batch, the head once, and the adapters' gradients.

    What is in codes is gathered for the forward pass of a block, and most of it once more for each
    of the two passes that block remat makes backwards.
    """
    wide, n = LlamaConfig(1024, 9, 8, 8, 2816, 32000), 8
    step = replace(seven(micro_batch_size=1), model=wide, base=base, mesh=MeshShape(fsdp=n))
    requests = [Request(step, H200, whole=whole) for whole in (True, False)]
    whole, extended = make_plans(requests, H200)
    for who, peak in whole.peaks.items():
        assert extended.peaks[who] == pytest.approx(peak, rel=0.002), who
    assert extended.exchanged == pytest.approx(whole.exchanged, rel=0.001)
    shapes = [shape for shape in linear_shapes(wide).values() for _ in range(wide.n_layers)]
    linears = sum(base.bytes(shape) if base else 2 * math.prod(shape) for shape in shapes)
    gathered = step.accumulation * (gathers * linears + 2 * wide.vocab_size * wide.dim)
    sent = dict(whole.exchanged)
    assert sent.pop("all-gather") == pytest.approx(gathered * (n - 1) / n, rel=0.01)
    learned = step.accumulation * 2 * step.lora.parameter_count(wide)  # in bf16, as it is computed
    assert sent.pop("all-reduce") == pytest.approx(2 * learned * (n - 1) / n, rel=0.01)
    assert sum(sent.values()) <= 0.01 * gathered  # rows of the embeddings, which lie cut
    seconds = whole.time_us["exchange"] / 1e6
    assert seconds > sum(whole.exchanged.values()) / (0.8 * 450e9)
    assert whole.hidden > whole.predicted


@needs_extra
def test_what_waits_is_cut_over_tensor_whether_rows_are_dealt_or_not():
    """The stream between two blocks: a model's part is as large with 8 cards as with 2 x 8."""
    wide = LlamaConfig(1024, 9, 8, 8, 2816, 32000)
    step = replace(seven(micro_batch_size=8), model=wide)
    requests = [
        Request(replace(step, mesh=MeshShape(data=data, tensor=8)), H200) for data in (1, 2)
    ]
    one, two = make_plans(requests, H200)
    assert two.peak == pytest.approx(one.peak, rel=0.02)


@needs_extra
@pytest.mark.slow
def test_the_sum_is_the_whole_of_405b_over_two_axes():
    """Its first three layers take 700 MiB less each than what comes after the fifth."""
    step = replace(
        seven(micro_batch_size=4), mesh=MeshShape(data=8, fsdp=8),
        model=replace(PRESETS["llama-3.1-405b"], n_layers=10),
    )  # fmt: skip
    summed, whole = make_plans([Request(step, H200, whole=whole) for whole in (False, True)], H200)
    assert summed.peak == pytest.approx(whole.peak, rel=0.002)


@pytest.mark.integration
@needs_extra
@pytest.mark.slow
def test_every_known_card_compiles():
    tiny = replace(seven(max_seq_len=64), model=LlamaConfig(256, 5, 2, 2, 512, 512))
    for gpu in GPUS.values():
        step = tiny if gpu.capability >= (8, 0) else replace(tiny, precision="fp32")
        (plan,) = make_plans([Request(step, gpu, whole=False)], gpu)
        assert plan.classes["temporaries"] > 0, gpu.name


@pytest.mark.integration
@needs_extra
def test_weights_lie_cut_over_several_gpus():
    model = LlamaConfig(512, 5, 8, 8, 1536, 1024)
    one = replace(seven(), model=model)
    plans = make_plans(
        [Request(step, H200) for step in (one, replace(one, mesh=MeshShape(fsdp=4)))], H200
    )
    sizes = [plan.classes["base_weights"] for plan in plans]
    assert sizes[0] == model.parameter_count * 2
    norms = (2 * 5 + 1) * 512 * 2  # whole on each
    assert sizes[1] == (sizes[0] - norms) / 4 + norms
    assert plans[0].classes["adapters"] == plans[1].classes["adapters"]


@pytest.mark.promotes
@pytest.mark.parametrize("head_dim", [16, 32])
def test_the_split_adds_up_to_what_xla_says(head_dim):
    """On this machine's own processor, in this process."""
    model = LlamaConfig(64, 5, 4, 2, 160, 128, head_dim=head_dim)
    step = replace(seven(precision="fp32", max_seq_len=32), model=model)
    found = answer(Request(step, None))
    compiled = lower_training(step, make_mesh(jax.devices()[:1])).compile()
    stated = planned_bytes(compiled.memory_analysis())
    assert sum(found["classes"].values()) == pytest.approx(stated, rel=0.01)
    for name, size in arithmetic.memory_classes(step).items():
        assert found["classes"][name] == pytest.approx(size, abs=64), name  # counters


def test_operations_are_those_of_the_arithmetic():
    """gpu.md's terms for 7B at 4096 tokens, r 16 on all linears, counted by hand."""
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    adapters = 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    attended = 4096 * 4096 * 32
    step = replace(seven(remat="none", max_seq_len=4096), lora=LoraConfig(targets=("all",)))
    assert arithmetic.flops_per_token(step) == 4 * weights + 7 * attended + 6 * adapters
    again = 2 * (weights - 32000 * 4096 - 32 * 4096 * 11008) + 2 * attended  # w2 is left out
    block = replace(step, remat="block")
    assert arithmetic.flops_per_token(block) == arithmetic.flops_per_token(step) + again
    full = replace(step, lora=None)
    assert arithmetic.flops_per_token(full) == 6 * weights + 7 * attended
    more = 32 * 4 * 4096**2, 4096 * 4096 * 32  # heads twice as wide: in wq wk wv wo, and attended
    wide = replace(full, model=replace(SEVEN, head_dim=256))
    assert arithmetic.flops_per_token(wide) == 6 * (weights + more[0]) + 7 * (attended + more[1])


# MiB compiled for an H200 and an A100, jax 0.10.2: docs/results/plans.json
COMPILED = [
    (seven(), 13_228),
    (seven(micro_batch_size=8, max_seq_len=1024), 16_407),
    (seven(remat="ffn", micro_batch_size=8, max_seq_len=1024), 28_248),
    (seven(remat="none", micro_batch_size=8, max_seq_len=1024), 38_914),
    (seven(precision="fp32", remat="ffn", max_seq_len=256), 27_350),
]


@pytest.mark.parametrize(("step", "mib"), COMPILED, ids=lambda x: getattr(x, "remat", x))
def test_the_estimate_is_near_the_compiled_step(step, mib):
    assert planner.estimate(step, H200).peak / MIB == pytest.approx(mib, rel=0.1)


def test_without_the_extra_an_estimate_says_so(monkeypatch, capsys):
    monkeypatch.setattr(planner, "can_compile", lambda: False)
    said = asked(capsys, "--model", "llama-2-7b", "--gpu", "rtx-4090")
    assert "pip install 'jllama[plan]'" in said
    assert "(estimated)" in said
    found = json.loads(asked(capsys, "--json"))
    assert found["compiled"] is False
    assert found["peak_mib"] == pytest.approx(sum(found["classes_mib"].values()))


@pytest.fixture
def estimated(monkeypatch):
    for module in (planner, ladder):
        monkeypatch.setattr(module, "can_compile", lambda: False)


def test_fit_names_a_bf16_setting_of_7b_for_24_gigabytes(estimated, capsys):
    said = asked(capsys, "--fit", "--gpu", "rtx-4090")
    assert "next: jllama train --model DIR --data FILE --precision bf16" in said
    found = json.loads(asked(capsys, "--fit", "--gpu", "rtx-4090", "--json"))
    best = found["best"]
    assert best["free_mib"] >= 0
    assert best["max_seq_len"] == 512
    fitting = [x for x in found["plans"] if x["free_mib"] >= 0 and x["max_seq_len"] == 512]
    fastest = max(x["bound_tokens_per_second"] for x in fitting)
    assert best["bound_tokens_per_second"] == pytest.approx(fastest, rel=0.01)


def test_fit_says_what_misses_where_nothing_fits(estimated, capsys):
    said = asked(capsys, "--fit", "--gpu", "rtx-3060", "--model", "llama-2-13b")
    assert re.search(r"nothing fits: .* misses [\d,]+ MiB", said)


def test_the_reports_situation_fits_40_gigabytes(estimated, capsys):
    words = ["--gpu", "a100-40gb", "--precision", "fp32", "--max-seq-len", "256"]
    found = json.loads(asked(capsys, "--fit", *words, "--json"))
    wanted = {"remat": "ffn", "micro_batch_size": 1, "max_seq_len": 256}
    (own,) = (x for x in found["plans"] if wanted.items() <= x.items())
    assert own["peak_mib"] == pytest.approx(27_350, rel=0.05)
    assert own["free_mib"] > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "llama-9"], "presets: sample, llama-7b, llama-13b"),
        (["--gpu", "rtx-9090"], "--gpu rtx-9090, expected rtx-3060, rtx-3090"),
        (["--gpu", "t4"], "t4 (compute capability 7.5) has no bf16 arithmetic"),
        (
            ["--micro-batch-size", "-1"],
            "--micro-batch-size -1, expected a whole number, at least 1",
        ),
        (["--gpu-memory", "-4"], "--gpu-memory -4, expected a number, above 0"),
        (["--gpu", "present"], "no GPU here"),
        (["--fit", "--mesh", "fsdp=2"], "--fit plans training on one GPU"),
        (["--tune", "full", "--dora"], "--tune full has no adapters"),
    ],
)
def test_wrong_questions_are_answered_with_the_choices(capsys, words, message, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no nvidia-smi, wherever this runs
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_card_of_other_memory_is_another_card():
    card = find_gpu("rtx-4090", 48)
    assert card.memory_mib == 48 * 1024
    assert f"device_memory_size: {48 * 2**30}" in target_config(card)


@pytest.mark.integration
def test_asking_twice_compiles_once(monkeypatch):
    request = Request(replace(seven(max_seq_len=32), model=LlamaConfig(32, 2, 2, 2, 64, 64)), None)
    gpu = replace(cpu(), memory_mib=1000)
    (first,) = make_plans([request], gpu, present=True)
    monkeypatch.setattr(subprocess, "run", None)
    (again,) = make_plans([request], gpu, present=True)
    assert again == first


def test_planning_says_what_it_does_and_tells_each_program(monkeypatch, capsys):
    class Compiler:
        def run(self, module, arguments, *, given, environment, heard):
            for request in pickle.loads(given):
                length = request.step.max_seq_len
                heard("a library's line\n")
                found = {"classes": {"x": length}, "host": 0, "time_us": {}, "kernels": 0,
                         "layer_kernels": 0, "compile_seconds": 1, "peaks": {},
                         "exchanges": {}, "exchanged": {},
                         "summed": False}  # fmt: skip
                heard(json.dumps(found) + "\n")
            return Done(0, "", "")

        def stop(self):
            raise AssertionError

    monkeypatch.setattr(planner, "Children", Compiler)
    monkeypatch.setattr(planner, "_remembered", lambda request: None)
    monkeypatch.setattr(planner, "_remember", lambda request, found: None)
    lengths = [32, 64, 96, 128, 160]
    requests = [Request(seven(max_seq_len=n)) for n in lengths]
    plans = make_plans(requests, H200, present=True)
    assert [plan.peak for plan in plans] == lengths
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "plan 0/5 programs  compiling steps to plan with"
    assert said[-1] == "plan 5/5 programs"
    make_plans(requests[:1], H200, present=True)
    assert "plan 0/1 programs  compiling block remat, 1 x 32" in capsys.readouterr().out


def test_a_step_that_cannot_be_compiled_stops_the_other(monkeypatch):
    stopped = []

    class Compiler:
        def run(self, *_, **__):
            return Done(1, "", "what went wrong")

        def stop(self):
            stopped.append(True)

    monkeypatch.setattr(planner, "Children", Compiler)
    monkeypatch.setattr(planner, "_remembered", lambda request: None)
    with pytest.raises(InputError, match="could not be compiled: what went wrong"):
        make_plans([Request(seven()), Request(seven(max_seq_len=64))], H200, present=True)
    assert stopped


# Weights, adapters, moments and accumulator of 7B, in MiB: bf16 12,852 + 128, fp32 twice the first.
@pytest.mark.parametrize(
    ("device", "limit", "more", "would"),
    [
        ("gpu", 12_900, {}, "a model of the size of llama-3.2-3b with --precision bf16 (6,"),
        ("gpu", 13_000, {}, ""),
        ("gpu", 24_000, {"precision": "fp32"}, "fit: --precision bf16 (12,9"),
        ("gpu", 24_000, {"precision": "fp32"}, "; a GPU such as rtx-5090"),
        ("gpu", 100_000, {"lora": None}, "fit: --tune lora (12,9"),
        # On a CPU this JAX makes fp32 copies of bf16 weights, which are more.
        ("cpu", 12_900, {}, "fit: a model of the size of llama-3.2-3b with --precision fp32 (12,"),
        ("cpu", 24_000, {"precision": "fp32"}, "fit: a model of the size of llama-3.2-3b with"),
        ("cpu", 26_000, {"precision": "fp32"}, ""),
        ("cpu", 0, {"lora": None}, ""),  # a system that does not tell
    ],
)
def test_only_what_certainly_cannot_fit_is_refused(monkeypatch, device, limit, more, would):
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(auto, "host_memory_mib", lambda: limit)
    monkeypatch.setattr(auto, "present_gpu", lambda: replace(H200, memory_mib=limit))
    step = replace(seven(), **more)
    if not would:
        auto.refuse_what_cannot_fit(step)
        return
    with pytest.raises(InputError) as refused:
        auto.refuse_what_cannot_fit(step)
    said = str(refused.value)
    held = sum(arithmetic.memory_classes(step).values()) / MIB
    assert f"holds {held:,.0f} MiB (" in said
    assert f"of {limit:,}, whatever --remat and --micro-batch-size are" in said
    assert would in said


# --- in train.lora ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    model_folder(root, BASE | {"n_layers": 1})
    rows = [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(16)]
    (root / "rows.json").write_text(json.dumps(rows))
    return root


def flags(place, output, *more):
    return [
        "--model", str(place / "model"), "--data", str(place / "rows.json"), "--output-dir",
        str(output), "--precision", "fp32", "--epochs", "1", "--max-seq-len", "32", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("remat", ["block", "auto"])
def test_a_run_that_cannot_fit_is_told_before_anything_is_loaded_or_compiled(
    place, tmp_path, capsys, monkeypatch, remat
):
    monkeypatch.setattr(auto, "host_memory_mib", lambda: 100)
    monkeypatch.setattr(auto, "memory_classes", lambda step: {"base_weights": 13_000 * MIB})
    for name in ("load_examples", "choose", "load_model", "fit"):
        monkeypatch.setattr(f"train.trainer.{name}", None)
    with pytest.raises(SystemExit) as ended:
        train(flags(place, tmp_path / "run", "--remat", remat))
    assert ended.value.code == 2
    assert "this run cannot fit this machine's memory: it holds 13,000" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_step_that_may_not_fit_a_cpu_is_warned_about(monkeypatch):
    here = replace(planner.replace(H200, name="here"), memory_mib=70_000)
    monkeypatch.setattr(auto, "cpu", lambda: here)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert auto.warning_if_short(seven()) == ""
    said = auto.warning_if_short(seven(remat="none", micro_batch_size=8, max_seq_len=1024))
    assert re.search(r"estimated at 8\d,\d+ MiB, and 70,000 are free.* is estimated at 6\d,", said)


@pytest.mark.promotes
def test_what_bf16_takes_on_a_cpu_is_estimated_and_training_says_so(monkeypatch):
    """Against what XLA plans for the same step in both, in this version of JAX."""
    step = replace(seven(), model=LlamaConfig(512, 4, 4, 4, 1376, 1000), micro_batch_size=1,
                   max_seq_len=32, accumulation=2)  # fmt: skip
    wide, narrow = (
        sum(answer(Request(replace(step, precision=p)))["classes"].values()) / MIB
        for p in ("fp32", "bf16")
    )
    assert auto._on_cpu(step) - auto._on_cpu(replace(step, precision="fp32")) == pytest.approx(
        narrow - wide, rel=0.05
    )
    assert auto.cost_of_bf16(step) == ""  # little
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    said = auto.cost_of_bf16(replace(step, model=PRESETS["llama-3.2-1b"]))
    assert re.search(r"at 10,\d{3} MiB, and at 4,\d{3} with --precision fp32", said)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))  # has products of bf16
    assert auto.cost_of_bf16(replace(step, model=PRESETS["llama-3.2-1b"])) == ""


def test_a_model_larger_than_this_machine_is_not_loaded(place, monkeypatch):
    monkeypatch.setattr(load, "host_memory_mib", lambda: 1)
    config = replace(read_config(place / "model"), dim=1024)
    monkeypatch.setattr(load, "read_config", lambda _: config)
    with pytest.raises(InputError, match=r"its weights take .* MiB, and this machine has 1; use"):
        load.load_model(place / "model")


AUTO = ("--remat", "auto", "--micro-batch-size", "auto", "--gradient-accumulation-steps", "8")


@pytest.mark.integration
def test_auto_takes_the_least_remat_and_keeps_the_effective_batch(place, tmp_path, capsys):
    train(flags(place, tmp_path / "run", *AUTO))
    said = capsys.readouterr().out
    assert "chosen for this machine's CPU: none remat, 8 sequences x 1 micro-batches" in said
    assert "effective batch: 8 sequences x 1 micro-batches = 8; 2 optimizer steps" in said
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "remat: none\n" in text
    assert "micro_batch_size: 8\n" in text
    (line, *_) = [
        line for line in RunFolder(tmp_path / "run").read_metrics().values if "rows" in line
    ]
    assert line["planned_memory_mib"] > 0


@pytest.mark.integration
def test_auto_recomputes_where_memory_is_short(place, tmp_path, capsys, monkeypatch):
    """On a card where only whole blocks, and of them only two sequences, fit."""
    needs = {"none": 3, "dots": 3, "ffn": 3, "block": 1}

    def planned(requests, gpu, present):
        step = requests[0].step
        size = needs[step.remat] * step.micro_batch_size * 100 * MIB
        return [planner.Plan(step, gpu, {"temporaries": size}, compiled=True)]

    margin = CONTEXT_MIB
    small = replace(H200, name="a small card", memory_mib=round((margin + 299) / 0.97))
    monkeypatch.setattr(auto, "make_plans", planned)
    monkeypatch.setattr(auto, "this_device", lambda: small)
    train(flags(place, tmp_path / "run", *AUTO))
    said = capsys.readouterr().out
    assert "chosen for a small card: block remat, 2 sequences x 4 micro-batches" in said
    assert "block remat at 4 sequences would miss 1" in said  # MiB, of 400


@pytest.mark.integration
def test_running_out_of_memory_is_answered_with_what_needs_less(
    place, tmp_path, capsys, monkeypatch
):  # reliability 11
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr("train.trainer.fit", full)
    with pytest.raises(SystemExit) as ended:
        train(flags(place, tmp_path / "run", "--remat", "none", "--micro-batch-size", "4"))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes" in said
    assert re.search(r"\d MiB  --remat block --micro-batch-size 1", said)


def test_other_errors_of_xla_are_not_taken_for_a_lack_of_memory():
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        auto.out_of_memory_explained(seven()),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_auto_in_a_recipe_is_read(tmp_path):
    from train.config import read_defaults

    (tmp_path / "a.yaml").write_text("remat: auto\nmicro_batch_size: auto\n")
    config, _ = read_defaults(["--config", str(tmp_path / "a.yaml")])
    assert config is not None
    assert (config.remat, config.micro_batch_size) == ("auto", "auto")
    (tmp_path / "b.yaml").write_text("epochs: auto\n")
    with pytest.raises(InputError, match="epochs auto, expected a whole number"):
        read_defaults(["--config", str(tmp_path / "b.yaml")])


@pytest.mark.integration
def test_a_plan_starts_without_allocating_anything():
    """The command's own process never starts JAX's backend."""
    script = (
        "import sys; from train.plan import command, planner; planner.can_compile = lambda: False;"
        "command.main(['--json']);"
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.integration
@pytest.mark.gpu
def test_planned_and_measured_peaks_agree_within_5_percent(tmp_path):
    """Each setting trains two steps in a process of its own, so that peaks do not mix."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    model_folder(
        tmp_path, {"dim": 2048, "n_layers": 8, "n_heads": 16, "multiple_of": 256, "norm_eps": 1e-5}
    )
    rows = [{"prompt": "x" * 500, "completion": "y" * 500}] * 64
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for remat, batch in (("none", 4), ("dots", 4), ("ffn", 8), ("block", 8), ("block", 32)):
        run = tmp_path / f"{remat}-{batch}"
        words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.json"),
                 "--max-seq-len", "1024", "--remat", remat, "--micro-batch-size", str(batch),
                 "--gradient-accumulation-steps", "1", "--max-steps", "2",
                 "--output-dir", str(run)]  # fmt: skip
        subprocess.run([sys.executable, "-m", "train.lora", *words], check=True)
        line = next(x for x in RunFolder(run).read_metrics().values if "planned_memory_mib" in x)
        assert line["peak_memory_mib"] == pytest.approx(line["planned_memory_mib"], rel=0.05), run


def test_the_config_describes_the_step():
    step = PlanConfig(model="llama-2-7b", lora_targets="all", packing=True).step
    assert step.learned == step.lora.parameter_count(SEVEN)
    assert (step.documents, step.remat) == (((2, 320),), "block")  # of 300 tokens in 512
