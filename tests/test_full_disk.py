"""Reliability 4 on a small disk of its own (a tmpfs), filled to the brim."""

import contextlib
import json
import re
import subprocess
from collections import namedtuple

import jax.numpy as jnp
import numpy as np
import pytest
from meta_files import random_tensors, write_meta
from random_models import BASE

from convert import from_meta
from jllama.errors import InputError
from jllama.folders import files
from jllama.folders.manifest import manifest_sha256
from jllama.folders.model import ModelWriter
from train import lora, trainer
from train.run.metrics import Metrics
from train.run.state import Checkpoints
from train.step import TrainState

MISSING = re.compile(r": [\d,]+ bytes are missing on this disk \([\d,]+ needed, [\d,]+ free\)")

# Orbax's own threads complain once more, after the error that a test is about.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


@pytest.fixture
def small(tmp_path):
    """A disk of 24 MiB, of which a save wants 16 free."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode:
        pytest.skip(f"a tmpfs may not be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder, leave=0):
    rest = files.shutil.disk_usage(folder).free - leave
    with (folder / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while rest > 0:
            rest -= file.write(bytes(min(rest, 2**20)))


def arguments(tmp_path, run):
    meta = write_meta(tmp_path / "meta", random_tensors(BASE), BASE)
    from_meta.main([str(meta), str(tmp_path / "model")])
    rows = [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return [
        "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.json"),
        "--output-dir", str(run), "--precision", "fp32", "--epochs", "4", "--lora-rank", "2",
        "--micro-batch-size", "2", "--gradient-accumulation-steps", "1", "--save-steps", "1",
    ]  # fmt: skip


def test_a_disk_full_before_a_save_keeps_the_state_before_it(small, tmp_path, monkeypatch, capsys):
    record = Metrics.step

    def fill_after_five(self, step, *args, **more):
        line = record(self, step, *args, **more)
        if step == 5:
            fill(small, leave=2**20)
        return line

    monkeypatch.setattr(Metrics, "step", fill_after_five)
    with pytest.raises(SystemExit) as ended:
        lora.main(arguments(tmp_path, small / "run"))
    assert ended.value.code == 2
    assert MISSING.search(capsys.readouterr().err)
    left = {path.name for path in (small / "run" / "state").iterdir()}
    assert left == {"3", "4"}
    monkeypatch.undo()
    (small / "ballast").unlink()
    lora.main(["--resume", str(small / "run")])
    assert "resumed after step 4\n" in capsys.readouterr().out
    assert (small / "run" / "adapter").is_dir()


def state(step):
    array = jnp.asarray(np.random.default_rng(step).random(1000, np.float32))
    return TrainState(jnp.asarray(step, jnp.int32), {"a": array}, ())  # type: ignore[arg-type]


def test_a_disk_that_fills_during_a_save_keeps_the_state_before_it(small, monkeypatch):
    checkpoints = Checkpoints(small / "state", keep=2)
    checkpoints.save(state(1))
    checkpoints.close()
    fill(small)
    plenty, real = [namedtuple("usage", "free")(10**12)], files.shutil.disk_usage
    monkeypatch.setattr(files.shutil, "disk_usage", lambda x: plenty.pop() if plenty else real(x))
    with (
        pytest.raises(InputError, match=MISSING),
        contextlib.closing(Checkpoints(small / "state", keep=2)) as checkpoints,
    ):
        checkpoints.save(state(2))  # there was room when it was asked
    assert not plenty
    assert not (small / "state" / "2").exists()
    (small / "ballast").unlink()
    checkpoints = Checkpoints(small / "state", keep=2)
    restored = checkpoints.restore(state(0))
    checkpoints.close()
    assert int(restored.step) == 1
    np.testing.assert_array_equal(restored.learned["a"], state(1).learned["a"])


def test_an_adapter_that_finds_no_room_is_written_by_resume(small, tmp_path, monkeypatch, capsys):
    def fill_and_save(*args):
        fill(small)
        save(*args)

    save = trainer.save_adapter
    monkeypatch.setattr(trainer, "save_adapter", fill_and_save)
    with pytest.raises(SystemExit) as ended:
        lora.main(arguments(tmp_path, small / "run"))
    assert ended.value.code == 2
    assert MISSING.search(capsys.readouterr().err)
    assert not (small / "run" / "adapter").exists()
    monkeypatch.undo()
    (small / "ballast").unlink()
    lora.main(["--resume", str(small / "run")])
    assert (small / "run" / "adapter").is_dir()


@pytest.mark.parametrize("when", ["before", "between two blocks"])
def test_a_full_disk_leaves_nothing_of_a_conversion(small, tmp_path, when, monkeypatch, capsys):
    original = write_meta(tmp_path / "meta", random_tensors(BASE), BASE)

    def write_and_fill(*args):
        write(*args)
        fill(small)

    write = ModelWriter.write_block
    if when == "before":
        fill(small, leave=2**20)
    else:
        monkeypatch.setattr(ModelWriter, "write_block", write_and_fill)
    with pytest.raises(SystemExit) as ended:
        from_meta.main([str(original), str(small / "model")])
    assert ended.value.code == 2
    assert MISSING.search(capsys.readouterr().err)
    assert [path.name for path in small.iterdir()] == ["ballast"]
    monkeypatch.undo()
    (small / "ballast").unlink()
    from_meta.main([str(original), str(small / "model")])
    assert len(manifest_sha256(small / "model")) == 64
