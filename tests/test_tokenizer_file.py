"""Meta's tokenizer.model: damage is named before a model is made of it; ids beyond it are harmless.

A damaged tokenizer often still loads, and gives other ids than the model was trained with.
"""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from random_models import TOKENIZER
from sentencepiece.sentencepiece_model_pb2 import ModelProto

import jllama
from eval.prompts import main as answer
from jllama.config import LlamaConfig, tensor_shapes
from jllama.errors import InputError
from jllama.folders.files import whole_folder
from jllama.folders.model import ModelWriter
from jllama.text.tokenizer import load_tokenizer, make_tokenizer

SAMPLE = (jllama.SAMPLE / "tokenizer.model").read_bytes()
FILE = Path("models/x/tokenizer.model")
LINES = TOKENIZER.splitlines(keepends=True)
AA = base64.b64encode(b"aa")


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


def edited(change) -> bytes:
    proto = ModelProto.FromString(SAMPLE)
    change(proto)
    return proto.SerializeToString()


def cut_between_pieces() -> bytes:
    """As a file that ends right before a piece, where every piece that is left is whole."""
    proto = ModelProto()
    proto.pieces.extend(ModelProto.FromString(SAMPLE).pieces[:1000])
    content = proto.SerializeToString()
    assert SAMPLE.startswith(content)
    return content


# What is wrong -> the file's content, and what the message must say.
DAMAGE = {
    "a line in the middle is missing": (
        b"".join(LINES[:7] + LINES[8:]),
        ["255 ranks without 7, expected 0, 1, 2, ...", "1 of the 256 bytes without a token, the"],
    ),
    "cut at a line's end": (
        b"".join(LINES[:200]),
        ["56 of the 256 bytes without a token, the first 200"],
    ),
    "cut in a line": (TOKENIZER[:-4], ["line 256 is no `base64 rank`"]),
    "cut in a rank": (TOKENIZER[:-2], ["256 ranks without 255"]),
    "a token twice": (
        TOKENIZER + LINES[65].replace(b"65", b"256"),
        ["1 tokens stand twice, the first is b'A'"],
    ),
    "a rank twice": (TOKENIZER + AA + b" 65\n", ["257 ranks without 256"]),
    "a negative rank": (TOKENIZER + AA + b" -1\n", ["lowest found: -1, highest: 255"]),
    "a huge rank": (TOKENIZER + AA + b" 999999999999\n", ["highest: 999,999,999,999"]),
    "a rank of 5,000 digits": (
        TOKENIZER + AA + b" " + b"9" * 5000 + b"\n",
        ["line 257 is no `base64 rank`"],
    ),
    "a rank that is none": (TOKENIZER + AA + b" 1_0\n", ["line 257 is no `base64 rank`"]),
    "no base64": (TOKENIZER + b"a 256\n", ["line 257 is no `base64 rank`"]),
    "empty": (b"", ["the end is missing", "(0 bytes found)"]),
    "no tokenizer": (b"<html>404</html>", ["neither a SentencePiece model nor tiktoken ranks"]),
    "SentencePiece cut between two pieces": (
        cut_between_pieces(),
        ["the end is missing (trainer_spec, normalizer_spec)"],
    ),
    "SentencePiece without the begin token": (
        edited(lambda proto: setattr(proto.pieces[1], "piece", "<other>")),
        ["'<s>' should be id 1 of 2048 pieces, there is none"],
    ),
    "SentencePiece without the end token": (
        edited(lambda proto: setattr(proto.trainer_spec, "eos_id", -1)),
        ["'</s>' should be id -1 of 2048 pieces, it is piece 2"],
    ),
    "SentencePiece with an id out of range": (
        edited(lambda proto: setattr(proto.trainer_spec, "bos_id", 70_000)),
        ["'<s>' should be id 70000 of 2048 pieces, it is piece 1"],
    ),
    "SentencePiece whose end token is no special one": (
        edited(lambda proto: setattr(proto.pieces[2], "type", 1)),
        ["'</s>' should be id 2 of 2048 pieces, there is none"],
    ),
    "SentencePiece with a piece that is no text": (
        SAMPLE.replace("▁the".encode(), b"\xff\xfe\xfdthe", 1),
        ["is not UTF-8"],
    ),
    "SentencePiece without a byte": (
        edited(lambda proto: setattr(proto.pieces[40], "piece", "zzzzzz")),
        ["no SentencePiece model that can be used", "byte"],
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_tokenizer_is_refused_with_the_reason(what):
    content, fragments = DAMAGE[what]
    with pytest.raises(InputError) as refused:
        make_tokenizer(content, FILE)
    assert str(refused.value).startswith(f"{FILE}: ")
    assert "again" in str(refused.value)
    for fragment in fragments:
        assert fragment in str(refused.value)


def test_whole_tokenizers_are_read_whatever_ends_their_lines():
    assert make_tokenizer(TOKENIZER.replace(b"\n", b"\r\n"), FILE).vocab_size == 512
    assert make_tokenizer(b"".join(reversed(LINES)), FILE).encode("A") == [65]
    assert make_tokenizer(SAMPLE, FILE).vocab_size == 2048


@pytest.mark.parametrize("content", [TOKENIZER, SAMPLE], ids=["tiktoken", "SentencePiece"])
@pytest.mark.parametrize("kind", [int, np.int32])
def test_an_id_outside_the_tokenizer_is_decoded_to_nothing_and_ends_nothing(content, kind):
    """Models have more rows than tokens: padding to 64, or a fine-tune's added tokens."""
    tokenizer = make_tokenizer(content, FILE)
    ids = tokenizer.encode("Hello.")
    for outside in (tokenizer.vocab_size, 32_003, 2**31 - 1, -1, -(2**31)):
        strange = [kind(outside), *map(kind, ids), kind(outside)]
        assert tokenizer.decode(strange) == tokenizer.decode(ids) == "Hello."
        assert tokenizer.piece(kind(outside)) == f"<id {outside}>"
        assert outside not in tokenizer.stop_ids
    last = tokenizer.vocab_size - 1
    assert "<id" not in tokenizer.piece(kind(last))


@pytest.mark.integration
def test_answers_that_hold_such_ids_are_shown_and_streamed(tmp_path):
    """A model whose logits are all equal answers with any of its rows."""
    rows = 4 * make_tokenizer(SAMPLE, FILE).vocab_size
    config = LlamaConfig(8, 1, 2, 2, 8, rows)
    with whole_folder(tmp_path / "model") as folder:
        writer = ModelWriter(folder, config, "zeros")
        for block, shapes in tensor_shapes(config).items():
            writer.write_block(block, {x: np.zeros(s, np.float32) for x, s in shapes.items()})
        writer.finish({"tokenizer.model": SAMPLE})
    prompts = tmp_path / "prompts.json"
    prompts.write_text('[{"prompt": "Say"}]')
    output = tmp_path / "answers.jsonl"
    flags = ["--temperature", "1", "--top-p", "1", "--max-new-tokens", "8", "--precision", "fp32"]
    answer(["--model", str(tmp_path / "model"), "--prompts", str(prompts), *flags,
            "--output", str(output)])  # fmt: skip
    found = json.loads(output.read_text())
    tokenizer = load_tokenizer(tmp_path / "model")
    assert max(found["base_ids"]) >= tokenizer.vocab_size
    assert len(found["base_ids"]) == 8
    model = jllama.load_model(tmp_path / "model", "fp32")
    sampling = jllama.Sampling(temperature=1.0, top_p=1.0)
    text = "".join(jllama.stream(model, tokenizer, [1, 2], 8, sampling, stop_strings=["#"]))
    assert isinstance(text, str)
