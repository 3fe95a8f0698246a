"""Several real processes against one: the same run, and one end for all of them."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from random_models import BASE
from train_runs import as_flags, lines, read, settings, small_place

from jllama.config import MESH_AXES
from jllama.errors import InputError
from train.processes import watch
from train.processes.join import Processes, Rank, rank_here, seconds
from train.processes.launch import LaunchConfig, environments
from train.processes.watch import Watch

PARAMS = BASE | {"dim": 64, "n_heads": 8, "n_kv_heads": 4}
FAULTY = Path(__file__).with_name("process_runs.py")
ROWS = 8  # in a micro-batch, whatever the mesh


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return small_place(tmp_path_factory.mktemp("place"), PARAMS)


def start(*words, fault="", devices=1):
    """A child process; each process that it launches sees so many devices."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    return subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths, "FAULT": fault},
    )  # fmt: skip


def launched(count, *flags, fault="", more=(), **how):
    """`jllama launch -n COUNT -- train ...`"""
    program = (FAULTY,) if fault else ("-m", "train.processes.launch")
    return start(*program, "-n", count, *more, "--", "train", *flags, fault=fault, **how)


def ended(child, code=0, within=120):
    """What a child said; it has ended as it should, and nothing that it started is left."""
    said = child.communicate(timeout=within)[0]
    assert child.returncode == code, said
    return said


def left_of(run):
    """Processes whose command line names a run."""
    files = [file for file in Path("/proc").glob("[0-9]*/cmdline") if file.parent.is_dir()]
    found = []
    for file in files:
        try:
            found += [file.parent.name] if str(run).encode() in file.read_bytes() else []
        except OSError:
            continue
    return found


def wait_for(step, run, child):
    """Until a run has recorded so many steps."""
    while not ((run / "metrics.jsonl").exists() and any(x["step"] >= step for x in lines(run))):
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.01)


def of_mesh(mesh, **more):
    rows = np.prod([n for axis, n in MESH_AXES.read(mesh).items() if axis != "tensor"], dtype=int)
    return more | {"mesh": mesh, "micro_batch_size": ROWS // rows}


def same(run, expected, near=1e-6):
    (losses, weights), (wanted, arrays) = read(run), read(expected)
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-5)
    assert weights.keys() == arrays.keys()
    for name, array in weights.items():
        np.testing.assert_allclose(array, arrays[name], rtol=0, atol=near, err_msg=name)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("count", "devices", "mesh", "more"),
    [
        pytest.param(2, 2, "fsdp=2,tensor=2", {"dora": True, "packing": True}, id="dora"),
        pytest.param(4, 1, "data=2,fsdp=2", {"base": "int8"}, id="int8"),
        pytest.param(2, 1, "fsdp=2", {"tune": "full"}, id="full"),
    ],
)
def test_processes_make_the_run_that_one_makes(place, tmp_path, count, devices, mesh, more):
    flags = settings(place, max_steps=8, eval_steps=4, **more)
    one, all_ = tmp_path / "one", tmp_path / "all"
    alone = start("-m", "train.lora", *as_flags(of_mesh("data=1", **flags, output_dir=one)))
    ended(alone)
    words = as_flags(of_mesh(mesh, **flags, output_dir=all_))
    said = ended(launched(count, *words, devices=devices))
    assert "train 8/8 steps" in said
    assert said.count("wrote ") == 1
    same(all_, one, near=2e-5 if "tune" in more else 1e-6)
    assert [line["rows"] for line in lines(all_) if "rows" in line] == [
        line["rows"] for line in lines(one) if "rows" in line
    ]


KILLS = 50
MESHES = {1: ("data=1",), 2: ("data=2", "fsdp=2", "tensor=2"), 4: ("fsdp=4", "data=2,tensor=2")}


@pytest.fixture(scope="module")
def uninterrupted(place, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    flags = settings(place, save_steps=2, eval_steps=5)
    ended(start("-m", "train.lora", *as_flags(of_mesh("data=1", **flags, output_dir=run))))
    return flags, run


def killed_some_time(child, run, draw):
    """Waits for a step, and a moment; then SIGKILLs one of the processes, or all of them."""
    wait_for(draw.randrange(1, 16), run, child)
    time.sleep(draw.random() / 5)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    for pid in draw.choice([children, [draw.choice(children)]]):
        os.kill(int(pid), signal.SIGKILL)
    return ended(child, code=128 + signal.SIGKILL)


@pytest.mark.integration
@pytest.mark.parametrize(
    "seed",
    [pytest.param(n, marks=() if n < 4 else pytest.mark.slow) for n in range(KILLS)],
)
def test_a_killed_run_goes_on_with_other_processes(seed, uninterrupted, tmp_path):
    """To the same end, whoever was killed at whatever moment, on another mesh."""
    flags, expected = uninterrupted
    draw, run = random.Random(seed), tmp_path / "run"
    counts = [draw.choice((2, 4)), draw.choice((1, 2, 4))]
    began, goes_on = (draw.choice(MESHES[count]) for count in counts)
    child = launched(counts[0], *as_flags(of_mesh(began, **flags, output_dir=run)))
    said = killed_some_time(child, run, draw)
    assert re.search(r"jllama launch: process \d: ended by SIGKILL", said)
    assert not left_of(run)
    again = ("--resume", run, "--mesh", goes_on)
    one = counts[1] == 1
    ended(start("-m", "train.lora", *again) if one else launched(counts[1], *again))
    same(run, expected)


WAIT = ("--hang-seconds", 5, "--join-seconds", 15)
SLOW = pytest.mark.slow


@pytest.mark.integration
@pytest.mark.parametrize(
    ("fault", "code", "message", "within"),
    [
        ("refuse:1:3", 2, r"train: process 1 of 2 \(.*\): a reason that only this process has", 5),
        pytest.param("refuse:0:3", 2, r"train: a reason that only this process has", 5, marks=SLOW),
        ("raise:1:3", 1, r"train: process 1 of 2 \(.*\): KeyError: 'a fault of the program'", 5),
        ("SIGTERM:1:3", 143, r"SIGTERM: stopped after step \d; continue with: jllama train", 10),
        pytest.param("SIGINT:0:3", 130, r"SIGINT: stopped after step \d; continue", 10, marks=SLOW),
        pytest.param("SIGHUP:1:3", 129, r"SIGHUP: stopped after step \d; continue", 10, marks=SLOW),
        ("SIGKILL:1:3", 137, r"launch: process 1: ended by SIGKILL", 3),
        pytest.param("SIGKILL:0:3", 137, r"launch: process 0: ended by SIGKILL", 3, marks=SLOW),
        pytest.param("SIGSTOP:1:3", 2, r"process 1 of 2 \(.*\) has not been heard of for 20 s",
                     35, marks=SLOW),
        ("hang:1:3", 2, r"train: process 1 of 2 \(.*\) hangs: \d+ s in step 3", 20),
        pytest.param("hang:0:3", 2, r"train: process 0 of 2 \(.*\) hangs: \d+ s in step 3", 20,
                     marks=SLOW),
        ("full:0:3", 2, r"a state could not be written .* File too large", 10),
    ],
)  # fmt: skip
def test_one_that_ends_ends_all(fault, code, message, within, place, tmp_path):
    """With its reason and its exit code; the last state is whole, and nothing is left running."""
    run = tmp_path / "run"
    flags = of_mesh("data=2", **settings(place, output_dir=run, save_steps=2, epochs=2))
    more = WAIT if "hang" in fault else ()
    child = launched(2, *as_flags(flags), fault=fault, more=more)
    wait_for(3, run, child)
    began = time.monotonic()
    said = ended(child, code)
    assert time.monotonic() - began < within
    assert len(re.findall(message, said)) == 1, said
    assert not left_of(run)
    saved = [path.name for path in (run / "state").iterdir() if path.name.isdigit()]
    assert saved
    assert {*saved} <= {"2", "3", "4", "5", "6"}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("fault", "more", "message"),
    [
        ("absent:1:0", {}, "process 0: not all of 2 processes came to 127.0.0.1:.* in 15 s"),
        ("flags:1:0", {}, "process 1 of 2.*: learning_rate 0.3, but 0.0002 for process 0"),
        (":9:", {"mesh": "fsdp=4"}, "--mesh fsdp=4 needs 4 devices, and there are 2"),
        (":9:", {"mesh": "tensor=1"}, "data=1 is of 1 devices, and the 2 processes have 2"),
        (":9:", {"learning_rate": 1e30}, "no finite gradient|training diverged"),
    ],
)
def test_what_cannot_begin_ends_in_one_message(fault, more, message, place, tmp_path):
    run = tmp_path / "run"
    flags = as_flags(settings(place, output_dir=run) | more)
    said = ended(launched(2, *flags, fault=fault, more=WAIT), code=2)
    assert len(re.findall(message, said)) == 1, said
    assert said.count("jllama") == 1 + said.count("jllama train --")
    assert not left_of(run)


@pytest.mark.integration
def test_a_signal_to_the_launcher_stops_the_run(place, tmp_path):
    run = tmp_path / "run"
    flags = settings(place, output_dir=run, save_steps=2, max_steps=0, epochs=500)
    child = launched(2, *as_flags(of_mesh("data=2", **flags)))
    wait_for(3, run, child)
    child.send_signal(signal.SIGTERM)
    said = ended(child, code=143)
    assert re.search(r"SIGTERM: stopped after step \d+; continue with: jllama train --resume", said)
    assert not left_of(run)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            Rank(3, 4, "a:1"),
        ),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # no `srun`
        (
            {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "8",
             "SLURM_PROCID": "5", "SLURM_LOCALID": "1"},
            Rank(5, 8, None),
        ),
        (
            {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1",
             "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            None,
        ),
    ],
)  # fmt: skip
def test_a_process_knows_which_it_is(environment, found):
    assert rank_here(environment) == found


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID missing"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            "JAX_COORDINATOR_ADDRESS=a, expected HOST:PORT",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "4"},
            "process 4 of 4: processes are numbered from 0",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "four", "JAX_PROCESS_ID": "4"},
            "JAX_NUM_PROCESSES=four, expected a whole number",
        ),
    ],
)
def test_an_environment_that_is_wrong_is_refused(environment, message):
    with pytest.raises(InputError, match=message):
        rank_here(environment)


def test_a_time_out_of_nothing_is_refused(monkeypatch):
    monkeypatch.setenv("JLLAMA_HANG_SECONDS", "0")
    with pytest.raises(InputError, match="JLLAMA_HANG_SECONDS=0, expected at least 1"):
        seconds("JLLAMA_HANG_SECONDS")


def test_several_machines_number_their_processes():
    config = LaunchConfig(processes=2, hosts=2, host=1, coordinator="first:1234")
    found = [rank_here(environment) for environment in environments(config, 2)]
    assert found == [Rank(2, 4, "first:1234"), Rank(3, 4, "first:1234")]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hosts": 2}, "hosts above 1, but no coordinator HOST:PORT"),
        ({"host": 1}, "host 1 of 1: machines are numbered from 0"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(more, message):
    with pytest.raises(InputError, match=message):
        LaunchConfig(**more)


def test_what_is_to_be_launched_is_said():
    said = ended(start("-m", "train.processes.launch", "-n", 2, "--", "report"), code=2)
    assert "expected a command of several processes after --: train" in said


class Coordinator:
    """Keeps texts by keys, as JAX's coordinator does."""

    def __init__(self):
        self.texts = {}

    def key_value_set(self, key, words, allow_overwrite):
        self.texts[key] = words

    def key_value_dir_get(self, room):
        return [(key, words) for key, words in self.texts.items() if key.startswith(room)]


def test_one_that_waited_long_is_not_behind_when_the_others_come(monkeypatch):
    """Its words are older than theirs, who have gone on since; only staying behind is a hang."""
    ended = []
    monkeypatch.setattr(watch, "_EVERY", 1000)  # looks below, never by itself
    monkeypatch.setattr(Watch, "_end", lambda self, code, reason: ended.append(reason))
    now = 0.0
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now))
    coordinator = Coordinator()
    both = [Watch(coordinator, number, 2, "here", hang=5) for number in range(2)]

    def look_every(seconds, until, *who):
        nonlocal now
        while now < until:
            now += seconds
            for number in who:
                both[number]._look()
        both[0]._judge()

    for one in both:
        one.mark("the start")
    look_every(1, 2, 0, 1)
    both[1].mark("step 1")
    look_every(1, 12, 0, 1)  # process 0 still compiles
    for step in range(1, 4):
        both[0].mark(f"step {step}", step=True)
        now += 0.1
    look_every(1, 13, 0)  # nothing new of process 1, though it has gone on as well
    assert ended == []
    look_every(1, 20, 1, 0)
    assert ended[0] == "process 1 of 2 (here) hangs: 5 s in step 1"
    for one in both:
        one.stop()


def test_one_process_agrees_with_itself(capsys):
    alone = Processes()
    alone.agree(lambda: {"seed": 1})
    assert alone.tell("x") == ["x"]
    assert alone.first_then_others(lambda: json.loads("7")) == 7
    assert alone.common(15, None) == 15
    alone.finish()
