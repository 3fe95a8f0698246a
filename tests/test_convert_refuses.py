"""Damaged, hostile and contradicting files: each is named in one message, and nothing is left."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import safetensors.torch
import torch
from meta_files import random_tensors, write_meta
from random_models import GROUPED, TOKENIZER

from convert.from_meta import FromMeta, convert
from convert.to_meta import ToMeta, export
from jllama.errors import InputError


def load(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)


class Program:
    """What a hostile .pth holds: unpickling it would make a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def edit(meta: Path, change, *shards: int) -> None:
    for shard in shards:
        file = meta / f"consolidated.{shard:02d}.pth"
        tensors = load(file)
        change(tensors)
        torch.save(tensors, file)


def set_params(meta: Path, **fields) -> None:
    (meta / "params.json").write_text(json.dumps(GROUPED | fields))


def put(name: str, value: float):
    def change(tensors):
        tensors[name].view(-1)[3] = value

    return change


def shard_of(params: dict, seed: int):
    """Another model's second shard in place of this one's."""

    def change(meta: Path):
        other = write_meta(meta / "other", random_tensors(params, seed=seed), params, shards=2)
        shutil.move(other / "consolidated.01.pth", meta / "consolidated.01.pth")
        shutil.rmtree(other)

    return change


def truncate(meta: Path) -> None:
    file = meta / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:50_000])


def hide_program(meta: Path) -> None:
    edit(meta, lambda tensors: tensors.update(rope=Program(meta.parent / "executed")), 1)


def both(*changes):
    def change(meta: Path):
        for each in changes:
            each(meta)

    return change


def enlarge_vocabulary(meta: Path, more: int) -> None:
    """As if the tokenizer had lost its last lines."""
    edit(meta, lambda tensors: tensors.update({
        "tok_embeddings.weight": torch.ones(512 + more, 16),
        "output.weight": torch.ones((512 + more) // 2, 32),
    }), 0, 1)  # fmt: skip


WQ, WO = "layers.1.attention.wq.weight", "layers.1.attention.wo.weight"
NORM = "layers.0.ffn_norm.weight"

# What is wrong -> how to make it so, and what the message must say
DAMAGE = {
    "gap": (
        lambda meta: (meta / "consolidated.01.pth").rename(meta / "consolidated.02.pth"),
        ["found consolidated.00.pth, consolidated.02.pth", "expected", "copy the missing"],
    ),
    "last shard missing": (
        lambda meta: (meta / "consolidated.01.pth").unlink(),
        ["consolidated.00.pth: one of 2 shards, found 1"],
    ),
    "extra shard": (
        lambda meta: shutil.copy(meta / "consolidated.01.pth", meta / "consolidated.02.pth"),
        ["one of 2 shards, found 3"],
    ),
    "no shards": (
        lambda meta: [file.unlink() for file in meta.glob("*.pth")],
        ["no weights", "expected Meta's consolidated.00.pth"],
    ),
    "shard of another size": (
        shard_of(GROUPED | {"multiple_of": 32, "n_layers": 1}, seed=0),
        [
            "consolidated.01.pth: layers.0.feed_forward.w1.weight is [48, 32], expected [44, 32]",
            f"consolidated.01.pth: {WQ} is missing, expected [16, 32]",
        ],
    ),
    "shard of another model": (
        shard_of(GROUPED, seed=1),
        [f"consolidated.01.pth: {NORM} differs from consolidated.00.pth, expected equal copies"],
    ),
    "program": (hide_program, ["consolidated.01.pth: refused", "mkdir", "holds no program"]),
    "truncated": (truncate, ["consolidated.01.pth: truncated or damaged (50,000 bytes found)"]),
    "web page": (
        lambda meta: (meta / "consolidated.00.pth").write_text("<html>404</html>"),
        ["consolidated.00.pth: not a PyTorch archive (16 bytes found)", "download"],
    ),
    "list": (
        lambda meta: torch.save([torch.ones(2)], meta / "consolidated.00.pth"),
        ["consolidated.00.pth: holds a list, expected tensors by name"],
    ),
    "integers": (
        lambda meta: edit(meta, lambda tensors: tensors.update({WQ: torch.ones(2, 2).int()}), 0),
        [f"consolidated.00.pth: {WQ} (1 in all)", "plain fp16, bf16 or fp32"],
    ),
    "unknown tensor": (
        lambda meta: edit(meta, lambda tensors: tensors.update({"wq.bias": torch.ones(2)}), 0),
        ["consolidated.00.pth: wq.bias [2] is unknown"],
    ),
    "missing tensor": (
        lambda meta: edit(meta, lambda tensors: tensors.pop(WO), 1),
        [f"consolidated.01.pth: {WO} is missing, expected [32, 16]"],
    ),
    "no embedding": (
        lambda meta: edit(meta, lambda tensors: tensors.pop("tok_embeddings.weight"), 0, 1),
        ["no tok_embeddings.weight matrix"],
    ),
    "misshapen tensor": (
        lambda meta: edit(meta, lambda tensors: tensors.update({WO: torch.ones(16, 32)}), 0),
        [f"consolidated.00.pth: {WO} is [16, 32], expected [32, 16]"],
    ),
    "a dtype in one shard only": (
        lambda meta: edit(meta, lambda tensors: tensors.update({NORM: tensors[NORM].half()}), 1),
        [f"consolidated.01.pth: {NORM} is float16, expected float32 as in consolidated.00.pth"],
    ),
    "not a number": (
        lambda meta: edit(meta, put(WO, float("nan")), 1),
        [f"consolidated.01.pth: {WO} holds NaN or infinity", "nothing was written"],
    ),
    "infinite norm": (
        lambda meta: edit(meta, put(NORM, float("-inf")), 0, 1),
        [f"consolidated.00.pth: {NORM} holds NaN or infinity"],
    ),
    "two values, shown together": (
        both(
            lambda meta: edit(meta, put("output.weight", float("inf")), 0),
            lambda meta: edit(meta, put(WQ, float("nan")), 1),
        ),
        [f"01.pth: {WQ} holds NaN", "00.pth: output.weight holds NaN or infinity"],
    ),
    "two shapes, shown together": (
        both(
            lambda meta: edit(meta, lambda tensors: tensors.pop(WO), 0),
            lambda meta: edit(meta, lambda tensors: tensors.update(extra=torch.ones(3)), 1),
        ),
        [f"consolidated.00.pth: {WO} is missing", "consolidated.01.pth: extra [3] is unknown"],
    ),
    "other dim": (
        lambda meta: set_params(meta, dim=64),
        ["dim 64", f"{WQ} is [16, 32], expected [32, 64]"],
    ),
    "other layers": (
        lambda meta: set_params(meta, n_layers=1),
        ["1 layers", f"{WQ} [16, 32] is unknown"],
    ),
    "other heads": (
        lambda meta: set_params(meta, n_heads=8, n_kv_heads=4),
        ["8 heads", "rope.freqs is for heads of 8, expected 4 (dim 32 / 8 heads)"],
    ),
    "other kv heads": (
        lambda meta: set_params(meta, n_kv_heads=4),
        ["4 kv heads", "layers.0.attention.wk.weight is [8, 32], expected [16, 32]"],
    ),
    "other hidden size": (
        lambda meta: set_params(meta, multiple_of=32),
        ["hidden 96", "feed_forward.w2.weight is [32, 44], expected [32, 48]"],
    ),
    "other vocabulary": (
        lambda meta: set_params(meta, vocab_size=32000),
        ["tok_embeddings.weight has 512 rows, expected vocab_size 32000"],
    ),
    "odd heads": (
        lambda meta: set_params(meta, n_heads=5),
        ["params.json: dim 32 is not a multiple of n_heads 5"],
    ),
    "wrong fields": (
        lambda meta: set_params(meta, dim=None, n_layers=0, norm_eps="1e-5", use_scaled_rope=1),
        [
            "dim is None, expected a positive integer",
            "n_layers is 0, expected a positive integer",
            "norm_eps is '1e-5', expected a positive number",
            "use_scaled_rope is 1, expected true or false",
        ],
    ),
    "params.json missing": (
        lambda meta: (meta / "params.json").unlink(),
        ["params.json: no such file"],
    ),
    "params.json broken": (
        lambda meta: (meta / "params.json").write_text('{"dim": 32'),
        ["params.json: line 1: invalid JSON"],
    ),
    "tokenizer missing": (
        lambda meta: (meta / "tokenizer.model").unlink(),
        ["no tokenizer", "copy Meta's tokenizer.model into", "--tokenizer FILE"],
    ),
    "tokenizer too large": (
        lambda meta: (meta / "tokenizer.model").write_bytes(TOKENIZER + b"AAA= 256\n"),
        ["tokenizer.model: 513 tokens, but the weights have 512 rows", "copy"],
    ),
    "tokenizer cut at a line's end": (
        lambda meta: enlarge_vocabulary(meta, 4),
        ["512 tokens with the special ones, but the weights have 516 rows: lines are missing"],
    ),
    "tokenizer of no kind": (
        lambda meta: (meta / "tokenizer.model").write_text("hello"),
        ["tokenizer.model: neither a SentencePiece model nor tiktoken ranks"],
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_leaves_nothing(what, meta, tmp_path, refusal):
    change, fragments = DAMAGE[what]
    change(meta)
    message = refusal(convert, FromMeta(meta, tmp_path / "model"))
    for fragment in fragments:
        assert fragment in message
    assert "weights_only" not in message  # torch's advice to load it unsafely


def test_a_long_list_of_problems_is_cut(meta, tmp_path):
    set_params(meta, dim=64)
    with pytest.raises(InputError) as refused:
        convert(FromMeta(meta, tmp_path / "model"))
    assert len(str(refused.value).splitlines()) < 30
    assert "... and " in str(refused.value)


def test_a_folder_that_exists_is_not_overwritten(original, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(InputError, match="model exists; remove it"):
        convert(FromMeta(original, tmp_path / "model"))
    assert os.listdir(tmp_path / "model") == ["mine"]


def test_rope_scaling_factor_needs_a_scaled_rope(original, tmp_path):
    with pytest.raises(InputError, match="nothing to scale; drop --rope-scaling-factor"):
        convert(FromMeta(original, tmp_path / "model", rope_scaling_factor=8.0))


@pytest.mark.integration
@pytest.mark.parametrize("what", ["program", "gap"])
def test_the_command_exits_with_2_and_one_message(what, meta, tmp_path):
    DAMAGE[what][0](meta)
    done = subprocess.run(
        [sys.executable, "-m", "convert.from_meta", str(meta), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"jllama from-meta: {meta}: ")
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["meta"]


def test_export_refuses_a_model_that_is_not_what_its_manifest_says(original, tmp_path):
    convert(FromMeta(original, tmp_path / "model"))
    file = tmp_path / "model" / "blocks" / "layers.1.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[WQ][0, 0] += 1
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(InputError, match=f"{WQ} differ from manifest"):
        export(ToMeta(tmp_path / "model", tmp_path / "back"))
    assert os.listdir(tmp_path) == ["model"]
