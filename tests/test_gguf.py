"""GGUF files: read back by the `gguf` package, and loaded and run by llama.cpp itself."""

import base64
import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("torch")

import gguf
import hf_models
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import random_models
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Type
from hf_models import saved
from llama_cpp import LlamaCpp
from meta_files import random_tensors, reference, write_meta
from random_models import GROUPED, LORA, VOCABULARY, adapted, model_folder
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from convert import from_hf, to_meta
from convert.from_hf import FromHf
from convert.from_meta import FromMeta, convert
from convert.gguf import tensors as gguf_tensors
from convert.gguf.vocabulary import read_vocabulary
from convert.quantize import main as quantize
from convert.to_gguf import ToGguf, export, main
from convert.to_meta import ToMeta
from jllama.bundled import ROWS, SAMPLE
from jllama.decode.generate import generate
from jllama.decode.sampling import Sampling
from jllama.errors import InputError
from jllama.folders import files
from jllama.folders.load import load_model
from jllama.folders.manifest import manifest_sha256
from jllama.text.messages import Message
from jllama.text.prompt import conversation
from jllama.text.rows import make_examples
from jllama.text.style_template import style_template
from jllama.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from jllama.text.tokenizer_file import LLAMA3_SPECIALS

pytestmark = pytest.mark.as_stored  # what is compared is every weight as it is

SCALED = GROUPED | {"rope_theta": 500000.0, "use_scaled_rope": True}
DTYPES = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
# Meta's name of a layer's part -> llama.cpp's.
PARTS = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
# Besides single bytes; some can be made in more than one way.
LONGER = (
    b"th", b"he", b"in", b"er", b"the", b" the", b"ing", b" t", b" a", b"an", b"and", b" and",
    b"\xc3\xa9", b"  ", b"    ", b"12", b"123", b"\n\n", b"'s", b" w", b"or", b" wor", b" world",
)  # fmt: skip
RANKS = b"".join(
    base64.b64encode(token) + b" %d\n" % rank
    for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *LONGER])
)
TEXTS = (
    "the other thing and  the    world's end", "Hello, world!", "A", " leading", "trailing ",
    "\n\n",
    "line\n  indented\n\n\tx = 1234567 + 12\n", "é ü 日本語 🙂 ﬁ", "don't DON'T it's",
    "<s> </s> <|eot_id|> [INST]", "What is the opposite of hot?", "0123 456,789.0",
)  # fmt: skip


def theirs(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    return f"blk.{layer}.{PARTS[part]}.weight"


def tensors_of(file: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def fields_of(file: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "model"
    convert(FromMeta(SAMPLE, folder))
    return folder


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """A random model with a Llama 3 tokenizer that has something to merge, and its rotary."""
    vocabulary = 256 + len(LONGER) + len(LLAMA3_SPECIALS)
    with mock.patch.multiple(random_models, VOCABULARY=vocabulary, TOKENIZER=RANKS):
        return model_folder(tmp_path_factory.mktemp("llama3"), SCALED)


def written(src: Path, place: Path, **more) -> Path:
    file = place / "m.gguf"
    export(ToGguf(src, file, **more))
    return file


# ---------------------------------------------------------------- what is in the file


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_matrix_is_bit_for_bit_that_of_the_source_and_norms_are_f32(dtype, tied, tmp_path):
    source = random_tensors(GROUPED, dtype=dtype, tied=tied)
    convert(FromMeta(write_meta(tmp_path / "a", source, GROUPED), tmp_path / "m"))
    found = tensors_of(written(tmp_path / "m", tmp_path))
    assert found.keys() == {theirs(name) for name in source}  # tied: no output.weight
    for name, tensor in source.items():
        expected = tensor.float() if tensor.ndim == 1 else tensor
        other = found[theirs(name)]
        assert other.tensor_type == (Type.F32 if tensor.ndim == 1 else DTYPES[dtype])
        assert other.shape.tolist() == list(tensor.shape)[::-1]
        assert other.data.tobytes() == expected.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("asked", ["f16", "bf16", "f32"])
def test_a_dtype_that_is_asked_for_rounds_the_matrices_once_and_no_norm(asked, tmp_path):
    source = random_tensors(GROUPED)
    convert(FromMeta(write_meta(tmp_path / "a", source, GROUPED), tmp_path / "m"))
    found = tensors_of(written(tmp_path / "m", tmp_path, dtype=asked))
    kinds = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
    for name, tensor in source.items():
        expected = tensor if tensor.ndim == 1 else tensor.to(kinds[asked])
        stored = expected.contiguous().view(torch.uint8).numpy().tobytes()
        assert found[theirs(name)].data.tobytes() == stored


def test_a_merged_file_holds_what_the_other_exports_merge(sample, tmp_path):
    """In the dtype of the source, though its norms have another one here."""
    adapted(sample, tmp_path / "ad", size=0.03)
    found = tensors_of(written(sample, tmp_path, adapter=tmp_path / "ad"))
    to_meta.export(ToMeta(sample, tmp_path / "meta", adapter=tmp_path / "ad"))
    merged = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    changed = 0
    for name, tensor in torch.load(SAMPLE / "consolidated.00.pth", weights_only=True).items():
        if tensor.ndim == 2:
            other = found[theirs(name)]
            assert other.tensor_type == Type.BF16
            assert other.data.tobytes() == merged[name].view(torch.uint8).numpy().tobytes()
            changed += not torch.equal(tensor, merged[name])
    assert changed == 4 * 7


def test_q8_0_is_within_half_a_step_and_leaves_rows_of_no_whole_blocks_in_f16(tmp_path, capsys):
    source = random_tensors(GROUPED)
    convert(FromMeta(write_meta(tmp_path / "a", source, GROUPED), tmp_path / "m"))
    found = tensors_of(written(tmp_path / "m", tmp_path, dtype="q8_0"))
    assert "note: 2 matrices are F16" in capsys.readouterr().out
    for name, tensor in source.items():
        other, array = found[theirs(name)], tensor.numpy()
        if array.ndim == 1:
            assert other.tensor_type == Type.F32
        elif name.endswith("w2.weight"):  # rows of 88
            assert other.tensor_type == Type.F16
            np.testing.assert_array_equal(other.data, array.astype(np.float16))
        else:
            assert other.tensor_type == Type.Q8_0
            blocks = array.reshape(-1, 32)
            step = np.abs(blocks).max(1, keepdims=True) / 127
            back = gguf.dequantize(other.data, Type.Q8_0).reshape(-1, 32)
            # The step itself is rounded to F16: by 2**-11 of it, up to 127 times.
            assert (np.abs(back - blocks) <= (0.5 + 127 * 2**-11) * step).all()
            assert np.abs(back - blocks).max() > 0


def test_q8_0_is_bit_for_bit_that_of_the_gguf_package():
    draw = np.random.default_rng(0)
    weights = draw.standard_normal((64, 96), np.float32)
    weights[0] = 0
    weights[1] = -weights[1]
    weights[2:10] *= np.float32(10) ** np.arange(-40, 0, 5, dtype=np.float32)[:, None]
    halves = draw.integers(-254, 255, (64, 96)).astype(np.float32) / 2
    halves[:, ::32] = 127  # the scale is 1
    for rows in (weights, halves, halves.astype(np.float16), weights.astype(ml_dtypes.bfloat16)):
        found, finite = gguf_tensors.in_type(rows, Type.Q8_0)
        assert finite
        with np.errstate(all="ignore"):
            expected = gguf.quantize(rows.astype(np.float32), Type.Q8_0)
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)


def test_the_metadata_is_what_the_config_says(tmp_path):
    params = GROUPED | {"rope_theta": 20000.0, "norm_eps": 1e-6}
    convert(FromMeta(write_meta(tmp_path / "a", random_tensors(params), params), tmp_path / "mine"))
    found = fields_of(written(tmp_path / "mine", tmp_path, dtype="bf16"))
    expected = {
        "general.architecture": "llama", "general.name": "mine", "general.file_type": 32,
        "llama.context_length": 8192, "llama.embedding_length": 32, "llama.block_count": 2,
        "llama.feed_forward_length": 88, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 20000.0, "llama.vocab_size": VOCABULARY,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_the_header_names_what_the_file_was_made_from(sample, tmp_path):
    adapted(sample, tmp_path / "ad", size=0.03)
    alone = fields_of(written(sample, tmp_path))
    assert alone["jllama.manifest_sha256"] == manifest_sha256(sample)
    assert "jllama.adapter_sha256" not in alone
    (tmp_path / "merged").mkdir()
    merged = fields_of(written(sample, tmp_path / "merged", adapter=tmp_path / "ad"))
    weights = (tmp_path / "ad/adapter_model.safetensors").read_bytes()
    assert merged["jllama.manifest_sha256"] == manifest_sha256(sample)
    assert merged["jllama.adapter_sha256"] == hashlib.sha256(weights).hexdigest()


def test_llama_31s_rotary_is_a_tensor_of_factors(llama3, tmp_path):
    found = tensors_of(written(llama3, tmp_path))["rope_freqs.weight"]
    stretched, plain = (
        reference(params, random_tensors(params)).model.rotary_emb.inv_freq
        for params in (SCALED, SCALED | {"use_scaled_rope": False})
    )
    assert found.tensor_type == Type.F32
    np.testing.assert_allclose(found.data, (plain / stretched).numpy(), rtol=1e-5)
    assert found.data.max() == pytest.approx(8)
    assert found.data.min() == 1


# ---------------------------------------------------------------- the vocabulary


def test_the_vocabulary_of_the_sample_is_sentencepieces(sample, tmp_path):
    model = sentencepiece.SentencePieceProcessor(str(sample / "tokenizer.model"))
    found = fields_of(written(sample, tmp_path))
    ids = range(model.GetPieceSize())
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.tokens"] == [model.IdToPiece(i) for i in ids]
    assert found["tokenizer.ggml.scores"] == [model.GetScore(i) for i in ids]
    kind = gguf.TokenType
    assert found["tokenizer.ggml.token_type"] == [
        kind.UNKNOWN if model.IsUnknown(i) else kind.CONTROL if model.IsControl(i)
        else kind.BYTE if model.IsByte(i) else kind.NORMAL for i in ids
    ]  # fmt: skip
    expected = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True,
                "add_eos_token": False, "add_space_prefix": True}  # fmt: skip
    assert {name: found[f"tokenizer.ggml.{name}"] for name in expected} == expected
    assert "tokenizer.ggml.merges" not in found
    assert (tmp_path / "m.Modelfile").read_text() == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'


def test_the_vocabulary_of_llama_3_has_its_special_tokens_and_merges(llama3, tmp_path):
    found = fields_of(written(llama3, tmp_path))
    tokens, first = found["tokenizer.ggml.tokens"], 256 + len(LONGER)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert tokens[ord("A")] == "A"
    assert tokens[ord(" ")] == "Ġ"
    assert tokens[256 + LONGER.index(b" the")] == "Ġthe"
    assert tuple(tokens[first:]) == LLAMA3_SPECIALS
    assert found["tokenizer.ggml.token_type"] == [1] * first + [3] * len(LLAMA3_SPECIALS)
    expected = {"bos_token_id": first, "eos_token_id": first + 1, "eot_token_id": first + 9,
                "add_bos_token": True, "add_eos_token": False}  # fmt: skip
    assert {name: found[f"tokenizer.ggml.{name}"] for name in expected} == expected
    assert "tokenizer.ggml.scores" not in found
    merges = found["tokenizer.ggml.merges"]
    assert merges[:5] == ["t h", "h e", "i n", "e r", "t he"]
    assert {"th e", "Ġt he", "Ġ the"} < set(merges)
    stops = 'PARAMETER stop "<|end_of_text|>"\nPARAMETER stop "<|eot_id|>"\n'
    assert (tmp_path / "m.Modelfile").read_text() == f"FROM ./m.gguf\n{stops}"


@pytest.fixture(scope="module")
def with_more_rows(tmp_path_factory):
    """The sample with three rows for which its tokenizer has no token."""
    place = tmp_path_factory.mktemp("rows")
    shutil.copytree(SAMPLE, place / "meta")
    file = place / "meta" / "consolidated.00.pth"
    weights = torch.load(file, weights_only=True)
    for name in ("tok_embeddings.weight", "output.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name][:3])])
    torch.save(weights, file)
    params = json.loads((place / "meta" / "params.json").read_text()) | {"vocab_size": 2051}
    (place / "meta" / "params.json").write_text(json.dumps(params))
    convert(FromMeta(place / "meta", place / "model"))
    return place / "model"


def test_rows_without_a_token_get_one_that_is_not_used(with_more_rows, tmp_path):
    found = fields_of(written(with_more_rows, tmp_path))
    assert found["tokenizer.ggml.tokens"][2047:] == [
        read_vocabulary(with_more_rows).tokens[2047], "[PAD2048]", "[PAD2049]", "[PAD2050]",
    ]  # fmt: skip
    assert found["tokenizer.ggml.token_type"][2048:] == [gguf.TokenType.UNUSED] * 3
    assert len(found["tokenizer.ggml.scores"]) == 2051


def test_a_tokenizer_to_which_llama_cpp_would_give_other_ids_is_refused(tmp_path):
    proto = ModelProto.FromString((SAMPLE / "tokenizer.model").read_bytes())
    proto.normalizer_spec.remove_extra_whitespaces = True
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"one space of many.*convert\.to_hf"):
        read_vocabulary(tmp_path)
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"so llama\.cpp's ids would differ"):
        read_vocabulary(tmp_path)


# ---------------------------------------------------------------- llama.cpp


@pytest.mark.parametrize("who", ["sample", "llama3"])
def test_llama_cpp_gives_our_ids_for_any_text(who, request, tmp_path):
    folder = request.getfixturevalue(who)
    peer, tokenizer = LlamaCpp(written(folder, tmp_path)), load_tokenizer(folder)
    for text in TEXTS:
        assert peer.tokens(text) == [tokenizer.bos_id, *tokenizer.encode(text)], text


PROMPTS = ("The opposite of hot", "The capital of France is", "the world", "123 and the")
KINDS = {
    "base": None,
    "LoRA": LORA,
    "rsLoRA": dataclasses.replace(LORA, rslora=True),
    "DoRA": dataclasses.replace(LORA, dora=True),
}


def hold_answers_together(model, folder: Path, file: Path, atol: float) -> None:
    """Every token of a greedy answer of llama.cpp is the likeliest here, up to `atol`.

    So is the log-probability that it states.
    """
    peer, tokenizer = LlamaCpp(file), load_tokenizer(folder)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in PROMPTS]
    answers = [peer.answer(prompt, 48) for prompt in prompts]
    rows = np.zeros((len(prompts), 96), np.int32)  # one shape for all: less to compile
    for row, prompt, (ids, _) in zip(rows, prompts, answers, strict=True):
        row[: len(prompt) + len(ids)] = prompt + ids
    found = np.asarray(jax.nn.log_softmax(model(jnp.asarray(rows))))
    for logprobs, prompt, (ids, stated) in zip(found, prompts, answers, strict=True):
        here = logprobs[len(prompt) - 1 :][: len(ids)]
        chosen = here[np.arange(len(ids)), ids]
        np.testing.assert_allclose(chosen, here.max(-1), rtol=0, atol=atol)
        np.testing.assert_allclose(stated, chosen[: len(stated)], rtol=0, atol=atol)
    assert sum(len(ids) for ids, _ in answers) > 40


@pytest.fixture(scope="module", params=["sample", "llama3"])
def source(request):
    """A model folder, and the size of an adapter that changes its answers, but not to noise."""
    return request.getfixturevalue(request.param), {"sample": 0.03, "llama3": 0.3}[request.param]


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_answers_as_we_do(source, kind, tmp_path):
    folder, size = source
    if KINDS[kind] is None:
        model, more = load_model(folder, "fp32"), {}
    else:
        model = adapted(folder, tmp_path / "ad", KINDS[kind], size)
        more = {"adapter": tmp_path / "ad"}
    hold_answers_together(model, folder, written(folder, tmp_path, dtype="f32", **more), 2e-4)
    (tmp_path / "f16").mkdir()
    file = written(folder, tmp_path / "f16", dtype="f16", **more)
    hold_answers_together(model, folder, file, 3e-2)  # it rounds activations to F16, too


def hold_ids_together(model, folder: Path, file: Path, prompts: list[list[int]], length: int):
    """Both sides' greedy ids, as `jllama.generate` gives them: the same, token for token."""
    peer, stops = LlamaCpp(file), load_tokenizer(folder).stop_ids
    answers = generate(model, prompts, length, Sampling(temperature=0), stop_ids=stops)
    for prompt, ours in zip(prompts, answers, strict=True):
        ids, _ = peer.answer(prompt, length)
        kept = [[token for token in answer if token not in stops] for answer in (ids, ours)]
        assert kept[0] == kept[1]
    return answers


@pytest.mark.parametrize("kind", ["base", "LoRA", "rsLoRA"])
def test_llama_cpp_generates_just_our_ids(source, kind, tmp_path):
    folder, size = source
    if kind == "base":
        model, more = load_model(folder, "fp32"), {}
    else:
        model = adapted(folder, tmp_path / "ad", KINDS[kind], size)
        more = {"adapter": tmp_path / "ad"}
    tokenizer = load_tokenizer(folder)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in PROMPTS]
    hold_ids_together(model, folder, written(folder, tmp_path, dtype="f32", **more), prompts, 48)


TALK = ["Name a colour.", "red", " 2 + 2?", "Four: 4", "and\nnow?"]


@pytest.mark.parametrize("style", ["report", "plain", "alpaca", "llama2-chat", "llama3-chat"])
def test_llama_cpp_makes_the_ids_of_the_adapters_prompt_style(source, style, tmp_path):
    folder, size = source
    tokenizer = load_tokenizer(folder)
    if style == "llama3-chat" and isinstance(tokenizer, SentencePieceTokenizer):
        pytest.skip("LLaMA 2's tokenizer has no such tokens")
    adapted(folder, tmp_path / "ad", size=size)
    (tmp_path / "ad/chat_template.jinja").write_text(style_template(style, tokenizer))
    peer = LlamaCpp(written(folder, tmp_path, adapter=tmp_path / "ad"))
    messages = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(TALK)]
    for count in (1, 3, 5):
        ids, _ = conversation(style, messages[:count], tokenizer)
        assert peer.chat(*TALK[:count]) == ids


@pytest.fixture(scope="module")
def stories(assets, tmp_path_factory):
    """stories260K, whose tokenizer makes one space of many; here it does not."""
    place = tmp_path_factory.mktemp("stories")
    shutil.copytree(assets / "stories260K-meta", place / "meta")
    file = place / "meta" / "tokenizer.model"
    proto = ModelProto.FromString(file.read_bytes())
    proto.normalizer_spec.remove_extra_whitespaces = False
    file.write_bytes(proto.SerializeToString())
    convert(FromMeta(place / "meta", place / "model"))
    return place / "model"


@pytest.mark.real
@pytest.mark.parametrize("dtype", [None, "f32", "f16"])
def test_llama_cpp_tells_the_stories_of_an_independent_program(dtype, stories, assets, tmp_path):
    expected = json.loads((assets / "stories260K-expected.json").read_text())
    prompts = [expected[f"p{n}_prompt"] for n in range(3)]
    file = written(stories, tmp_path, dtype=dtype)
    answers = hold_ids_together(load_model(stories, "fp32"), stories, file, prompts, 150)
    for n, answer in enumerate(answers):
        told = expected[f"p{n}_tokens"][len(prompts[n]) :]
        assert len(answer) == 150
        assert answer == told[:150]


@pytest.fixture(scope="module")
def texts_of_both(sample, stories):
    """Ids of text that each model knows: the sample's rows, and stories that stories260K tells."""
    rows, tokenizer = json.loads(ROWS.read_text()), load_tokenizer(sample)
    how = {"max_seq_len": 256, "train_on_prompt": False, "skip_bad_rows": 0, "source": "rows"}
    examples, _ = make_examples(rows[:100], tokenizer, "plain", **how)
    like = Sampling(temperature=0.8, top_p=1.0)
    told = generate(load_model(stories, "fp32"), [[1]] * 8, 250, like)
    return {
        "sample": (sample, [example.ids.tolist() for example in examples]),
        "stories": (stories, [[1, *ids] for ids in told]),
    }


@pytest.mark.real
@pytest.mark.parametrize("who", ["sample", "stories"])
def test_q8_0_chooses_as_the_weights_do_at_99_of_100_positions(who, texts_of_both, tmp_path):
    """Some 2,000 positions of each; over 6,000 it was 99.1 % (sample) and 99.2 % (stories)."""
    folder, texts = texts_of_both[who]
    peer, model = LlamaCpp(written(folder, tmp_path, dtype="q8_0")), load_model(folder, "fp32")
    stop, same, positions = load_tokenizer(folder).eos_id, 0, 0
    for ids in texts:
        rows = np.zeros((1, 256), np.int32)  # one shape for all
        rows[0, : len(ids)] = ids
        likeliest = np.asarray(model(jnp.asarray(rows))).argmax(-1)[0]
        for end in range(1, len(ids) + 1):
            chosen = peer.next(ids[:end])
            same += (stop if chosen is None else chosen) == likeliest[end - 1]
            positions += 1
    assert positions > 2000
    assert same / positions >= 0.99


@pytest.mark.parametrize("kind", ["heads wider than dim / heads", "linear rope"])
def test_llama_cpp_generates_just_our_ids_with_other_heads_and_positions(kind, tmp_path):
    config = copy.deepcopy(hf_models.KINDS[kind][0])
    config.vocab_size = 256 + len(LONGER) + len(LLAMA3_SPECIALS)
    saved(tmp_path / "hf", config)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(RANKS)
    from_hf.convert(FromHf(tmp_path / "hf", tmp_path / "model"))
    peer = LlamaCpp(written(tmp_path / "model", tmp_path))
    prompts = [[1, 5, 9], [7] * 20]
    ours = generate(load_model(tmp_path / "model", "fp32"), prompts, 40, Sampling(temperature=0))
    assert [peer.answer(prompt, 40)[0] for prompt in prompts] == ours
    assert len({*ours[0], *ours[1]}) > 10


@pytest.mark.parametrize(("dtype", "atol"), [(None, 3e-2), ("q8_0", 0.3)])
def test_llama_cpp_runs_a_model_with_more_rows_than_tokens(dtype, atol, with_more_rows, tmp_path):
    file = written(with_more_rows, tmp_path, dtype=dtype)
    hold_answers_together(load_model(with_more_rows, "fp32"), with_more_rows, file, atol)


# ---------------------------------------------------------------- refusals, and what is left


@pytest.mark.parametrize("there", ["m.gguf", "m.Modelfile"])
def test_a_file_that_exists_is_refused_and_kept(there, sample, tmp_path):
    (tmp_path / there).write_text("mine")
    with pytest.raises(InputError, match=f"{there} exists; remove it or choose another name"):
        written(sample, tmp_path)
    assert os.listdir(tmp_path) == [there]
    assert (tmp_path / there).read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "words"),
    [("out", r"ends in \.gguf: out\.gguf"), (".partial.gguf", "is in the way"),
     ("file/m.gguf", "no folder that may be written to")],
)  # fmt: skip
def test_a_name_that_cannot_be_taken_is_refused_first(name, words, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "..partial.gguf.partial").mkdir()
    with pytest.raises(InputError, match=words):
        export(ToGguf(tmp_path / "no model", tmp_path / name))


def test_a_damaged_block_is_named_and_nothing_is_left(sample, tmp_path, capsys):
    shutil.copytree(sample, tmp_path / "m")
    file = tmp_path / "m" / "blocks" / "layers.3.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "m"), str(tmp_path / "out.gguf")])
    assert ended.value.code == 2
    assert "layers.3.safetensors" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["m"]


@contextlib.contextmanager
def files_of_at_most(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1_000, 60_000, 1_000_000, 2_551_199])
def test_a_limit_on_the_size_of_a_file_is_one_message_that_names_it(size, sample, tmp_path, capsys):
    with files_of_at_most(size), pytest.raises(SystemExit) as ended:
        main([str(sample), str(tmp_path / "out.gguf")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "File too large" in said
    assert "/.out.gguf.partial" in said
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(2**24))
    with pytest.raises(InputError, match=r"out\.gguf: 2,\d+,\d+ bytes are missing on this disk"):
        export(ToGguf(sample, tmp_path / "out.gguf"))
    assert os.listdir(tmp_path) == []


def stopped(monkeypatch, pieces: int) -> None:
    """Ctrl-C while this many pieces have been written."""
    written, write = [], gguf_tensors.write_at

    def stop(*arguments):
        written.append("?")
        if len(written) == pieces:
            os.kill(os.getpid(), signal.SIGINT)
        write(*arguments)

    monkeypatch.setattr(gguf_tensors, "write_at", stop)


@pytest.mark.parametrize("pieces", [1, 5, 40])
def test_an_interrupted_export_goes_on_and_ends_the_same(
    pieces, sample, tmp_path, monkeypatch, capsys
):
    adapted(sample, tmp_path / "ad", size=0.03)
    (tmp_path / "whole").mkdir()
    whole = written(sample, tmp_path / "whole", adapter=tmp_path / "ad").read_bytes()
    arguments = [str(sample), str(tmp_path / "m.gguf"), "--adapter", str(tmp_path / "ad")]
    with monkeypatch.context() as patch:
        stopped(patch, pieces)
        with pytest.raises(SystemExit) as ended:
            main(arguments)
    assert ended.value.code == 130
    assert pieces == 1 or "the same command goes on" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == [".m.gguf.partial", "ad", "whole"]
    left = (tmp_path / ".m.gguf.partial").read_bytes()
    places, write = [], gguf_tensors.write_at
    monkeypatch.setattr(gguf_tensors, "write_at", lambda *x: (places.append(x[2]), write(*x)))
    main(arguments)
    assert (tmp_path / "m.gguf").read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["ad", "m.Modelfile", "m.gguf", "whole"]
    # Nothing is written that was there, but for a piece that another thread had not ended.
    assert all(place >= len(left) or left[place : place + 9] != whole[place : place + 9]
               for place in places)  # fmt: skip
    assert len(places) <= 90 - pieces


@pytest.mark.integration
def test_a_killed_export_goes_on_and_ends_the_same(sample, tmp_path):
    (tmp_path / "whole").mkdir()
    whole = written(sample, tmp_path / "whole", dtype="q8_0").read_bytes()
    program = (
        "import os, signal, sys; from convert.gguf import tensors;"
        "from convert.to_gguf import main;"
        "write, tensors.write_at = tensors.write_at, lambda *x: ("
        "write(*x), x[2] > 900_000 and os.kill(os.getpid(), signal.SIGKILL));"
        "main(sys.argv[1:])"
    )
    arguments = [str(sample), str(tmp_path / "m.gguf"), "--dtype", "q8_0"]
    ended = subprocess.run([sys.executable, "-c", program, *arguments], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / ".m.gguf.partial").stat().st_size > 900_000
    main(arguments)
    assert (tmp_path / "m.gguf").read_bytes() == whole


@pytest.mark.parametrize("size", [0, 700_000, 5_000_000])
def test_what_is_left_is_compared_and_not_trusted(size, sample, tmp_path):
    """Not even where it should be zero, between two tensors and behind the last one."""
    (tmp_path / ".m.gguf.partial").write_bytes(b"\xff" * size)
    written(sample, tmp_path)
    (tmp_path / "again").mkdir()
    again = written(sample, tmp_path / "again")
    assert again.read_bytes() == (tmp_path / "m.gguf").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again", "m.Modelfile", "m.gguf"]


def test_what_is_left_counts_as_room(sample, tmp_path, monkeypatch):
    """A disk on which there is room for the rest only."""
    free = 2**24 + 2_000_000
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(free))
    with pytest.raises(InputError, match="bytes are missing on this disk"):
        written(sample, tmp_path)
    (tmp_path / ".m.gguf.partial").write_bytes(bytes(1_000_000))
    written(sample, tmp_path)


def test_two_exports_to_one_name_do_not_mix(sample, tmp_path):
    with (tmp_path / ".m.gguf.partial").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="being written by another process"):
            written(sample, tmp_path)
    assert os.listdir(tmp_path) == [".m.gguf.partial"]


def test_weights_that_overflow_are_named_with_a_type_that_holds_them(tmp_path):
    source = random_tensors(GROUPED)
    source["layers.1.feed_forward.w1.weight"][0, 0] = 1e9
    convert(FromMeta(write_meta(tmp_path / "a", source, GROUPED), tmp_path / "m"))
    for dtype in ("f16", "q8_0"):  # whose scales are in F16
        with pytest.raises(InputError, match=r"blk\.1\.ffn_gate\.weight .* choose bf16 or f32"):
            written(tmp_path / "m", tmp_path, dtype=dtype)
    assert sorted(os.listdir(tmp_path)) == ["a", "m"]


def test_a_base_in_codes_needs_a_dtype_and_is_written_as_the_numbers_it_stands_for(
    sample, tmp_path
):
    quantize([str(sample), str(tmp_path / "codes"), "--base", "int8"])
    with pytest.raises(InputError, match="name the one to write: --dtype f16, bf16, f32, q8_0"):
        written(tmp_path / "codes", tmp_path)
    found = tensors_of(written(tmp_path / "codes", tmp_path, dtype="f32"))
    weight = load_model(tmp_path / "codes", "fp32").layers[0].attention.wq.weight
    matrix = np.asarray(weight.matrix(np.float32))
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"].data, matrix)
