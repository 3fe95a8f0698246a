"""Several devices against one: the same losses, adapters, answers and scores, and a share each."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from random_models import BASE
from train_runs import as_flags, read, settings, small_place

from jllama.config import PRESETS, LlamaConfig, LoraConfig, linear_shapes
from jllama.errors import InputError
from jllama.folders.model import read_config
from jllama.folders.run import RunFolder
from jllama.sharding import MeshShape, make_mesh, mesh_shape
from train import config as train_config
from train.config import TrainConfig
from train.plan import ladder
from train.plan.arithmetic import Step
from train.plan.cards import find_gpu
from train.plan.ladder import choose_mesh
from train.plan.planner import estimate

MESHES = ("data=8", "fsdp=8", "tensor=4,data=2", "fsdp=2,tensor=2,data=2")
PARAMS = BASE | {"dim": 64, "n_heads": 8, "n_kv_heads": 4}
HALF_BYTES = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="before 0.11, JAX cannot cut 4-bit arrays on a CPU"
)


def on_devices(count, *words, code=0, **more):
    """A child process that sees so many devices; what it printed."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={count}"
    paths = os.pathsep.join(map(os.path.abspath, sys.path))  # the tests' own modules, too
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, **more,
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return small_place(tmp_path_factory.mktemp("place"), PARAMS)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("more", "meshes"),
    [
        pytest.param({"packing": True, "max_seq_len": 64}, MESHES, id="packed"),
        pytest.param({"dora": True, "lora_targets": "all", "remat": "none"}, MESHES, id="dora"),
        pytest.param({"base": "int8"}, MESHES, id="int8"),
        pytest.param({"base": "int4"}, MESHES, id="int4", marks=HALF_BYTES),
        pytest.param({"base": "nf4"}, MESHES[1:3], id="nf4", marks=HALF_BYTES),
        pytest.param({"tune": "full"}, MESHES[3:], id="full"),
    ],
)
def test_every_mesh_trains_as_one_device(place, tmp_path, more, meshes):
    """20 steps in fp32, with accumulation, dropout and evaluations."""
    text = json.dumps(settings(place, **more))
    on_devices(8, Path(__file__).with_name("mesh_runs.py"), tmp_path, "", *meshes, input=text)
    losses, weights = read(tmp_path / "one")
    assert losses.shape == (23,)
    # Adam makes much of little where a gradient is nearly zero, as some of a whole model are.
    near = 2e-5 if "tune" in more else 1e-6
    for mesh in meshes:
        found = read(tmp_path / mesh)
        np.testing.assert_allclose(found[0], losses, rtol=0, atol=1e-5, err_msg=mesh)
        assert found[1].keys() == weights.keys()
        for name, array in found[1].items():
            np.testing.assert_allclose(array, weights[name], rtol=0, atol=near, err_msg=name)
        check_shares(tmp_path / f"{mesh}.json", mesh_shape(mesh))


def check_shares(file, mesh):
    """No device holds more of a matrix than its share."""
    held = json.loads(file.read_text())
    matrices = [name for name in held if "norm" not in name and name.endswith(("weight", "codes"))]
    assert len(matrices) == 2 + 7 * PARAMS["n_layers"]
    for name in matrices:
        share = math.prod(held[name]["shape"]) / (mesh.fsdp * mesh.tensor)
        assert [math.prod(part) for part in held[name]["parts"]] == [share] * mesh.size, name


COMPILED = """
import sys, jax
from jllama.config import LlamaConfig, LoraConfig
from jllama.folders.model import read_config
from jllama.folders.run import RunFolder
from jllama.sharding import make_mesh, mesh_shape
from train.plan.arithmetic import Step
from train.plan.compiled import lower_training
mesh = mesh_shape(sys.argv[1])
sizes = LlamaConfig(*map(int, sys.argv[2].split(",")))
documents = ((2, 64),) if sys.argv[3:] else ()
step = Step(sizes, LoraConfig(), "fp32", "block", 2, 128, 2, mesh=mesh, documents=documents)
print(lower_training(step, make_mesh(jax.devices(), mesh)).compile().as_text())
"""


@pytest.mark.integration
@pytest.mark.parametrize("packing", [[], ["packing"]])
def test_what_devices_exchange_is_what_fsdp_needs(packing):
    """In a micro-batch two gathers of each frozen weight, one sum of the adapters' gradients."""
    sizes = LlamaConfig(512, 4, 8, 8, 1536, 2048)
    text = on_devices(
        8, "-c", COMPILED, "fsdp=8", ",".join(map(str, dataclasses.astuple(sizes)[:6])), *packing
    )
    kinds = r"(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?"
    moved = {}  # the sizes of all arrays, by the kind of exchange
    for made, kind in re.findall(rf"= (.*?) {kinds}\(", text):
        shapes = re.findall(r"[fs]32\[([\d,]+)\]", made)
        moved.setdefault(kind, []).extend(math.prod(map(int, x.split(","))) for x in shapes)
    linears = [math.prod(shape) for shape in linear_shapes(sizes).values()] * sizes.n_layers
    head = sizes.vocab_size * sizes.dim
    tokens = 8 * 2 * 128  # a device looks its part of the embeddings up for all of them
    assert sorted(moved.pop("all-gather")) == sorted([*2 * linears, head, tokens])
    assert sum(moved.pop("all-reduce")) == LoraConfig().parameter_count(sizes)
    # ... and hands the others theirs.
    assert sum(map(sum, moved.values())) <= 2 * 128 * sizes.dim


@pytest.mark.integration
def test_a_run_goes_on_with_other_devices(place, tmp_path):
    """Of 8 that it began with, on 4, as after a node was lost; and then on one."""
    whole = settings(place, mesh="fsdp=4", micro_batch_size=2, max_steps=6, save_steps=2)
    train = ("-m", "train.lora")
    on_devices(4, *train, *as_flags(whole | {"output_dir": tmp_path / "whole"}))
    run = tmp_path / "run"
    first = as_flags(whole | {"output_dir": run, "mesh": "data=2,fsdp=4", "micro_batch_size": 1})
    stop = (
        "import os, signal, sys; from train_runs import after_step; import pytest;"
        "from train.lora import main;"
        "after_step(pytest.MonkeyPatch(), int(sys.argv.pop(1)),"
        " lambda: os.kill(os.getpid(), signal.SIGTERM)); main()"
    )
    on_devices(8, "-c", stop, 2, *first, code=143)
    on_devices(4, "-c", stop, 4, "--resume", run, "--mesh", "tensor=2,fsdp=2", code=143)
    on_devices(1, "-m", "train.lora", "--resume", run, "--mesh", "data=1")
    for found, expected in zip(read(run), read(tmp_path / "whole"), strict=True):
        for name in expected if isinstance(expected, dict) else (slice(None),):
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)


def test_a_run_that_goes_on_keeps_its_steps(place, tmp_path):
    begun = TrainConfig(**settings(place, mesh="data=4,tensor=2", micro_batch_size=3))
    assert (
        train_config._as_many_rows(
            dataclasses.replace(begun, mesh="fsdp=2"), begun
        ).micro_batch_size
        == 6
    )
    with pytest.raises(InputError, match=r"deals rows to 8 devices, and a micro-batch .* has 12"):
        train_config._as_many_rows(dataclasses.replace(begun, mesh="data=8"), begun)


@pytest.mark.integration
def test_answers_and_scores_are_those_of_one_device(place, tmp_path):
    run = tmp_path / "run"
    flags = as_flags(settings(place, max_steps=4, output_dir=run))
    on_devices(1, "-m", "train.lora", *flags)
    asked = [{"prompt": prompt} for prompt in ("Say four 3.", "Say", "Say fifty 4. No")]
    (tmp_path / "prompts.json").write_text(json.dumps(asked))
    found = []
    for mesh in ("data=1", "fsdp=4,tensor=2"):
        rows = ("--run", run, "--mesh", mesh)
        prompts = ("--prompts", tmp_path / "prompts.json", "--max-new-tokens", 8)
        on_devices(8, "-m", "eval.prompts", *rows, *prompts, "--temperature", 0)
        on_devices(8, "-m", "eval.score", *rows)
        answers = map(json.loads, (run / "generations.jsonl").read_text().splitlines())
        score = json.loads((run / "score.json").read_text())
        found.append(([(a["base_ids"], a["tuned_ids"]) for a in answers], score))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 3
    for name in ("base", "tuned"):
        one, cut = (score[name]["answers"]["nll_per_token"] for _, score in found)
        assert cut == pytest.approx(one, abs=1e-5)


@pytest.mark.integration
def test_an_automatic_mesh_is_over_all_devices(place, tmp_path):
    flags = settings(place, max_steps=1, output_dir=tmp_path / "run", mesh="auto")
    said = on_devices(8, "-m", "train.lora", *as_flags(flags))
    assert "--mesh auto: data=8; of 8 devices each is estimated to take" in said
    assert TrainConfig(**checked(tmp_path / "run")).mesh == "data=8"
    again = ("--resume", tmp_path / "run", "--epochs", 99, "--mesh", "auto")
    assert "--mesh auto is for a new run" in on_devices(8, "-m", "train.lora", *again, code=2)


def checked(run):
    return RunFolder(run).read_settings()


def test_an_automatic_mesh_cuts_no_more_than_it_must():
    step = Step(PRESETS["llama-2-70b"], LoraConfig(), "bf16", "block", 1, 512)
    unknown = dataclasses.replace(find_gpu("h200"), cores=0)
    for memory, mesh in ((400_000, "data=8"), (143_771, "data=8"), (81_000, "data=4,fsdp=2"),
                         (40_000, "data=2,fsdp=4"), (25_000, "fsdp=8")):  # fmt: skip
        gpu = dataclasses.replace(unknown, memory_mib=memory)
        found, reason = choose_mesh(step, gpu, 8)
        assert found.words == mesh, memory
        assert f"--mesh auto: {mesh}; of 8 devices each is estimated to take" in reason
    small = dataclasses.replace(unknown, memory_mib=16_000)
    with pytest.raises(InputError, match=r"--mesh auto: this run fits 8 devices in no way"):
        choose_mesh(step, small, 8)


def test_of_meshes_that_fit_the_fastest_is_taken(monkeypatch):
    step = Step(PRESETS["llama-2-70b"], LoraConfig(), "bf16", "block", 2, 512)
    gpu = find_gpu("a100-80gb")

    def planned(requests, gpu):
        """Sharing products is the fastest, and does not fit over two."""
        plans = [estimate(request.step, gpu) for request in requests]
        for plan in plans:
            many = plan.step.mesh.tensor
            assert plan.step.micro_batch_size == 2 * many
            size = {"all": gpu.room + (1 if many == 2 else -1)}
            time = {"matmuls": 1e6 / many}
            yield dataclasses.replace(plan, classes=size, compiled=True, time_us=time)

    monkeypatch.setattr(ladder, "can_compile", lambda: True)
    monkeypatch.setattr(ladder, "make_plans", lambda *some: list(planned(*some)))
    found, reason = choose_mesh(step, gpu, 8)
    assert found == MeshShape(tensor=8)
    assert "tokens/s predicted" in reason


PARTS = """
import sys, jax
import numpy as np
from flax import nnx
from jllama.config import Base
from jllama.folders import load
from jllama.sharding import make_mesh, mesh_shape
rows, quantised = [], load.quantised
def noted(matrix, base):
    rows.append(None if isinstance(matrix, jax.core.Tracer) else len(matrix))
    return quantised(matrix, base)
one = load.load_model(sys.argv[1], "fp32", base=Base(sys.argv[2]))
load.quantised = noted
mesh = make_mesh(jax.devices(), mesh_shape(sys.argv[3]))
cut = load.load_model(sys.argv[1], "fp32", base=Base(sys.argv[2]), mesh=mesh)
same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)),
                    nnx.state(one), nnx.state(cut))
assert all(jax.tree.leaves(same))
print("most rows", max(filter(None, rows)))
"""


@pytest.mark.integration
@pytest.mark.parametrize("base", ["int8", pytest.param("int4", marks=HALF_BYTES)])
def test_each_device_puts_its_own_rows_into_codes(base, place):
    """To the codes of the whole; wo and w2 are cut by columns, too."""
    words = ("-c", PARTS, place / "model", base)
    assert "most rows 64" in on_devices(8, *words, "tensor=4,data=2")
    largest = read_config(place / "model").hidden_dim
    assert f"most rows {largest // 8}" in on_devices(8, *words, "fsdp=8")


@pytest.mark.parametrize(
    "text", ["data", "data=0", "data=-2", "rows=2", "data=2,data=4", "fsdp=2 4", "8", "data=２"]
)
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(InputError, match="expected sizes of data, fsdp, tensor, each at most once"):
        TrainConfig(mesh=text)


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(InputError, match=r"--mesh fsdp=9 needs 9 devices, and there are 1"):
        make_mesh(jax.devices()[:1], MeshShape(fsdp=9))


def test_a_mesh_is_typed_as_it_is_read():
    assert mesh_shape(" tensor=2 , data=3") == MeshShape(data=3, tensor=2)
    assert TrainConfig(mesh=" tensor=2 , data=3").mesh == "tensor=2,data=3"
    assert mesh_shape("data=3,tensor=2").words == "data=3,tensor=2"
    assert mesh_shape("") == MeshShape()
