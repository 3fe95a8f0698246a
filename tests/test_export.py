"""Both doors: what goes in comes out byte for byte, and other programs read what comes out."""

import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
import transformers
from meta_files import random_tensors, write_hf, write_meta
from random_models import BASE, GROUPED, LORA, TOKENIZER, VOCABULARY, adapted

from convert import from_hf, from_meta, to_hf, to_meta, verify
from convert.change.probe import Probe
from convert.from_hf import FromHf
from convert.from_meta import FromMeta, convert
from convert.meta import archive
from convert.to_hf import ToHf
from convert.to_meta import ToMeta
from convert.verify import Verify
from jllama.decode.generate import generate
from jllama.decode.sampling import Sampling
from jllama.errors import InputError
from jllama.folders.adapter import save_adapter
from jllama.folders.load import load_model
from jllama.folders.manifest import read_manifest
from jllama.folders.model import read_config, transformers_name
from jllama.lora import attach

SCALED = GROUPED | {"rope_theta": 500000.0, "use_scaled_rope": True}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
Hashes = dict[str, str]


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def meta_hashes(folder: Path) -> Hashes:
    """Tensor -> hash of the whole, joined by hand."""
    files = sorted(folder.glob("*.pth"))
    shards = [torch.load(file, weights_only=True) for file in files]
    whole = {}
    for name, first in shards[0].items():
        parts = [shard[name] for shard in shards]
        if first.ndim == 1:
            whole[name] = first
        elif name.split(".")[-2] in ("wo", "w2"):
            whole[name] = torch.cat(parts, 1)
        elif name.startswith("tok_embeddings"):
            whole[name] = torch.cat(parts, 0 if first.shape[1] == BASE["dim"] else 1)
        else:
            whole[name] = torch.cat(parts, 0)
    return {name: sha256(tensor) for name, tensor in whole.items() if name != "rope.freqs"}


def hf_hashes(folder: Path) -> Hashes:
    found: Hashes = {}
    for file in folder.glob("*.safetensors"):
        found |= {name: sha256(x) for name, x in safetensors.torch.load_file(file).items()}
    return found


@pytest.fixture
def model(original, tmp_path):
    convert(FromMeta(original, tmp_path / "m"))
    return tmp_path / "m"


# ------------------------------------------------------------------------------ byte for byte


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 2, 8])
def test_meta_to_model_to_meta_is_byte_identical_per_tensor(shards, dtype, tmp_path):
    tensors = random_tensors(GROUPED, dtype=dtype)
    expected = {name: sha256(tensor) for name, tensor in tensors.items()}
    convert(FromMeta(write_meta(tmp_path / "a", tensors, GROUPED, shards=shards), tmp_path / "m"))
    to_meta.export(ToMeta(tmp_path / "m", tmp_path / "back", shards=shards))
    assert len(list((tmp_path / "back").glob("*.pth"))) == shards
    assert meta_hashes(tmp_path / "back") == expected
    assert meta_hashes(tmp_path / "a") == expected  # the test's own joining
    convert(FromMeta(tmp_path / "back", tmp_path / "m2"))
    assert read_manifest(tmp_path / "m2")["tensors"] == read_manifest(tmp_path / "m")["tensors"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("files", [1, 2, 8])
def test_hf_to_model_to_hf_is_byte_identical_per_tensor(files, dtype, tmp_path):
    tensors = random_tensors(GROUPED, dtype=dtype)
    hf = write_hf(tmp_path / "hf", tensors, GROUPED, files=files)
    assert len(list(hf.glob("*.safetensors"))) == files
    from_hf.convert(FromHf(hf, tmp_path / "m"))
    to_hf.export(ToHf(tmp_path / "m", tmp_path / "back"))
    assert hf_hashes(tmp_path / "back") == hf_hashes(hf)
    # and what came to Hugging Face from Meta is Meta's again
    found = {k: x["sha256"] for k, x in read_manifest(tmp_path / "m")["tensors"].items()}
    assert found == {name: sha256(tensor) for name, tensor in tensors.items()}


def test_splitting_differently_gives_the_same_model_folder(tmp_path):
    tensors = random_tensors(GROUPED, dtype=torch.bfloat16)
    folders: dict[str, dict] = {}
    for shards in (1, 2, 8):
        src = write_meta(tmp_path / f"{shards}" / "llama", tensors, GROUPED, shards=shards)
        convert(FromMeta(src, tmp_path / f"m{shards}"))
        folders[f"m{shards}"] = contents(tmp_path / f"m{shards}")
        hf = write_hf(tmp_path / f"hf{shards}" / "llama", tensors, GROUPED, files=shards)
        from_hf.convert(FromHf(hf, tmp_path / f"h{shards}"))
        assert transformers_name(tmp_path / f"h{shards}") == str(hf)  # all that differs
        certified = read_manifest(tmp_path / f"h{shards}")["tensors"]
        folders[f"h{shards}"] = contents(tmp_path / f"h{shards}") | {"manifest.json": certified}
    assert folders["m1"] == folders["m2"] == folders["m8"]
    assert folders["h1"] == folders["h2"] == folders["h8"]
    blocks = [name for name in folders["m1"] if name.startswith("blocks")]
    assert len(blocks) == 4
    assert all(folders["m1"][name] == folders["h1"][name] for name in blocks)


def test_written_files_can_be_read_by_whoever_may_read_any_file_of_the_user(model, tmp_path):
    to_hf.export(ToHf(model, tmp_path / "hf"))
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    written = [*model.rglob("*.safetensors"), *(tmp_path / "hf").rglob("*.safetensors")]
    assert {file.stat().st_mode for file in written} == {usual}


def test_hugging_faces_files_are_sent_to_the_other_command(model, tmp_path):
    to_hf.export(ToHf(model, tmp_path / "hf"))
    with pytest.raises(InputError, match=r"run: jllama from-hf"):
        load_model(tmp_path / "hf")


def test_a_written_pth_is_a_zip_with_true_checksums(tmp_path):
    tensors = random_tensors(BASE)
    convert(FromMeta(write_meta(tmp_path / "a", tensors, BASE), tmp_path / "m"))
    to_meta.export(ToMeta(tmp_path / "m", tmp_path / "back"))
    with zipfile.ZipFile(tmp_path / "back" / "consolidated.00.pth") as file:
        assert file.testzip() is None


@pytest.mark.parametrize("command", ["to_hf", "to_meta"])
def test_a_stopped_export_goes_on_and_gives_the_same_bytes(
    command, original, tmp_path, monkeypatch, capsys
):
    main = {"to_hf": to_hf.main, "to_meta": to_meta.main}[command]
    convert(FromMeta(original, tmp_path / "m"))
    written: list[str] = []

    def stop(*arguments, **more):
        written.append("?")
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return write(*arguments, **more)

    if command == "to_hf":
        write = to_hf.save_tensors
        monkeypatch.setattr(to_hf, "save_tensors", stop)
    else:
        write = archive.write_at
        monkeypatch.setattr(archive, "write_at", stop)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "m"), str(tmp_path / "out")])
    assert stopped.value.code == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    main([str(tmp_path / "m"), str(tmp_path / "out")])
    main([str(tmp_path / "m"), str(tmp_path / "at once")])
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")


# -------------------------------------------------------------------------- what others read


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("params", "tied"), [(GROUPED, False), (SCALED, True)])
def test_a_merged_export_generates_in_transformers_what_base_and_adapter_generate_here(
    params, tied, dora, tmp_path
):
    tensors = random_tensors(params, tied=tied)
    src = write_meta(tmp_path / "a", tensors, params | {"max_seq_len": 512})
    convert(FromMeta(src, tmp_path / "m"))
    model = adapted(tmp_path / "m", tmp_path / "ad", dataclasses.replace(LORA, dora=dora))
    prompt = [VOCABULARY - 256, 72, 101, 108, 108, 111]
    (ours,) = generate(model, [prompt], 200, Sampling(temperature=0))
    to_hf.export(ToHf(tmp_path / "m", tmp_path / "hf", adapter=tmp_path / "ad"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.dtype == torch.float32
    ids = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=200, do_sample=False, eos_token_id=None,
        attention_mask=torch.ones(1, len(prompt)),
    )  # fmt: skip
    assert ids[0, len(prompt) :].tolist() == ours
    base = transformers.AutoModelForCausalLM.from_pretrained(
        to_hf_without_adapter(tmp_path)
    ).eval()  # the adapter does something
    with torch.no_grad():
        change = theirs(torch.tensor([prompt])).logits - base(torch.tensor([prompt])).logits
    assert change.abs().max() > 0.1


def to_hf_without_adapter(place: Path) -> Path:
    to_hf.export(ToHf(place / "m", place / "plain"))
    return place / "plain"


def test_a_merged_export_to_meta_is_the_merged_model(tmp_path):
    convert(FromMeta(write_meta(tmp_path / "a", random_tensors(GROUPED), GROUPED), tmp_path / "m"))
    model = adapted(tmp_path / "m", tmp_path / "ad")
    to_meta.export(ToMeta(tmp_path / "m", tmp_path / "out", adapter=tmp_path / "ad", shards=2))
    convert(FromMeta(tmp_path / "out", tmp_path / "merged"))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (2, 16), dtype=np.int32))
    np.testing.assert_allclose(
        load_model(tmp_path / "merged", "fp32")(ids), model(ids), rtol=0, atol=2e-5
    )
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert report["top1_agreement"] == 1.0
    assert report["max_logit_difference"] < 2e-5
    assert report["mean_logit_effect_of_adapter"] > 0.1
    assert report["share_of_weights_unchanged"] < 0.01


@pytest.mark.parametrize(("size", "eaten"), [(1e-5, True), (0.3, False)])
def test_the_merge_report_says_when_rounding_ate_the_adapter(size, eaten, tmp_path, capsys):
    tensors = random_tensors(GROUPED, dtype=torch.bfloat16)
    convert(FromMeta(write_meta(tmp_path / "a", tensors, GROUPED), tmp_path / "m"))
    model = adapted(tmp_path / "m", tmp_path / "ad", LORA, size)
    to_hf.export(ToHf(tmp_path / "m", tmp_path / "hf", adapter=tmp_path / "ad"))
    report = json.loads((tmp_path / "hf" / "merge.json").read_text())
    assert ("warning: rounding ate the adapter" in capsys.readouterr().out) == eaten
    # What the streams say, from whole models that never saw the merging code.
    before = hf_hashes_of_values(to_hf_without_adapter(tmp_path))
    after = hf_hashes_of_values(tmp_path / "hf")
    linears = [name for name in before if "_proj" in name]
    same = sum((before[name] == after[name]).sum().item() for name in linears)
    share = same / sum(before[name].numel() for name in linears)
    assert report["share_of_weights_unchanged"] == share
    assert (share > 0.99) == eaten
    tokens = jnp.asarray(Probe(tmp_path / "m").tokens)
    convert_back = tmp_path / "merged"
    from_hf.convert(FromHf(tmp_path / "hf", convert_back))
    lost = np.asarray(load_model(convert_back, "fp32")(tokens)) - np.asarray(model(tokens))
    assert report["max_logit_difference"] == pytest.approx(np.abs(lost).max(), abs=2e-5)
    assert report["mean_logit_difference"] == pytest.approx(np.abs(lost).mean(), abs=1e-6)


def hf_hashes_of_values(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    return found


def test_an_adapter_of_another_base_is_not_merged_unless_forced(tmp_path):
    for seed in (0, 1):
        src = write_meta(tmp_path / f"a{seed}", random_tensors(GROUPED, seed=seed), GROUPED)
        convert(FromMeta(src, tmp_path / f"m{seed}"))
    model = load_model(tmp_path / "m0", "fp32")
    attach(model, LORA, jax.random.key(0))
    hashes = {"base_manifest_sha256": hash_of(tmp_path / "m0")}
    save_adapter(tmp_path / "ad", model, LORA, "models/zero", hashes)
    with pytest.raises(InputError, match=r"trained on models/zero.*or --force"):
        to_hf.export(ToHf(tmp_path / "m1", tmp_path / "hf", adapter=tmp_path / "ad"))
    assert not (tmp_path / "hf").exists()
    to_hf.export(ToHf(tmp_path / "m1", tmp_path / "hf", adapter=tmp_path / "ad", force=True))


def hash_of(folder: Path) -> str:
    tensors = read_manifest(folder)["tensors"]
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def test_weights_that_cannot_be_cut_evenly_are_refused(original, tmp_path):
    convert(FromMeta(original, tmp_path / "m"))
    with pytest.raises(InputError, match=r"--shards 3: .* cannot be cut evenly"):
        to_meta.export(ToMeta(tmp_path / "m", tmp_path / "out", shards=3))
    assert os.listdir(tmp_path) == ["m"]


# ------------------------------------------------------------------------------ the certificate


def test_verify_reads_everything_and_names_all_that_is_damaged(model, capsys):
    verify.main([str(model)])
    assert "21 tensors and 2 files are whole" in capsys.readouterr().out
    for name in ("layers.0", "head"):
        file = model / "blocks" / f"{name}.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (model / "tokenizer.model").write_bytes(TOKENIZER + b"\n")
    with pytest.raises(SystemExit) as ended:
        verify.main([str(model)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    for name in ("layers.0.safetensors", "head.safetensors", "tokenizer.model"):
        assert name in said
    assert "layers.1" not in said


def test_verify_against_the_source_proves_that_nothing_changed(model, original, tmp_path, capsys):
    hf = write_hf(tmp_path / "hf", random_tensors(GROUPED), GROUPED, files=2)
    shutil.copytree(model, tmp_path / "copy")
    for source in (original, hf, tmp_path / "copy"):
        verify.main([str(model), "--against", str(source)])
        said = capsys.readouterr().out
        assert f"every tensor is byte for byte that of {source}" in said
    assert "note: max_seq_len is 4096" not in said  # of a copy, nothing differs

    other = write_meta(tmp_path / "other", random_tensors(GROUPED, seed=1), GROUPED)
    with pytest.raises(InputError, match=r"layers\.0\.attention\.wq\.weight: .*the source has"):
        verify.verify(Verify(model, against=other))


@pytest.mark.parametrize("command", [from_meta, from_hf, to_meta, to_hf, verify])
def test_a_folder_that_is_none_is_one_line_and_exit_code_2(command, tmp_path, capsys):
    folders = [str(tmp_path / "none"), str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        command.main(folders[: 1 if command is verify else 2])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    name = command.__name__.rpartition(".")[2].replace("_", "-")
    assert said.startswith(f"jllama {name}: {tmp_path / 'none'}")
    assert os.listdir(tmp_path) == []


def test_the_config_survives_both_ways(tmp_path):
    for params, tied in ((GROUPED, False), (SCALED, True), (SCALED, False)):
        place = tmp_path / f"{len(params)}{tied}"
        src = write_meta(place / "a", random_tensors(params, tied=tied), params)
        convert(FromMeta(src, place / "m"))
        to_hf.export(ToHf(place / "m", place / "hf"))
        from_hf.convert(FromHf(place / "hf", place / "m2"))
        assert read_config(place / "m2") == read_config(place / "m")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9999])
def test_a_limit_on_the_size_of_a_file_is_one_message_that_names_it(tmp_path, share, capsys):
    """torch has another error for each place at which it may no longer write."""
    convert(FromMeta(write_meta(tmp_path / "meta", random_tensors(BASE), BASE), tmp_path / "model"))
    out = tmp_path / "out"
    to_meta.main([str(tmp_path / "model"), str(tmp_path / "whole")])
    size = (tmp_path / "whole/consolidated.00.pth").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), hard))
    try:
        with pytest.raises(SystemExit) as ended:
            to_meta.main([str(tmp_path / "model"), str(out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.value.code == 2
    assert "/.out.partial/" in capsys.readouterr().err
    assert not out.exists()
    to_meta.main([str(tmp_path / "model"), str(out)])
    assert contents(out) == contents(tmp_path / "whole")
