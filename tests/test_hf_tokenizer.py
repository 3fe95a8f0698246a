"""Tokenizers to a Hugging Face folder and back, held against `transformers`' own reading."""

import base64
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

import jllama
from convert.hf.llama3 import difference
from convert.hf.tokenizer import read_hf_tokenizer, write_hf_tokenizer
from jllama.errors import InputError
from jllama.text.tokenizer import load_tokenizer, tokenizer_of
from jllama.text.tokenizer_file import LLAMA3_SPECIALS

SAMPLE = (jllama.SAMPLE / "tokenizer.model").read_bytes()
# Bytes out of order, as in Meta's file; "xyz" and "日" follow from no two other tokens.
TOKENS = [
    *(bytes([255 - i]) for i in range(256)),
    *(b"in", b" a", b"th", b"the", b" the", b"12", b"123", b"  ", b"\xc3\xa9"),
    *(b"xyz", "日".encode(), b"ing"),
]
N = len(TOKENS)

# convert_hf_to_gguf.py of llama.cpp knows a tokenizer by the hash of the ids of this text.
LLAMA_CPP = "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5"
LLAMA_CPP_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)


def rank_lines(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))


RANKS = rank_lines(TOKENS)


def write(content: bytes, folder: Path) -> Path:
    folder.mkdir()
    write_hf_tokenizer(content, folder, 4096)
    return folder


def metas(folder: Path) -> bytes:
    """Meta's tokenizer.model, as a model folder would have it."""
    return read_hf_tokenizer(folder)["tokenizer.model"]


def load(folder: Path):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def hf_ids(tokenizer, text: str) -> list[int]:
    """As jllama reads text: special tokens that are spelled out in it are text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def jllama_tokenizer(content: bytes, folder: Path):
    (folder / "meta.model").write_bytes(content)
    return load_tokenizer(folder / "meta.model")


SMALL = pytest.mark.parametrize("content", [RANKS, SAMPLE], ids=["llama3", "sample"])


class Both:
    """The same small tokenizer in `transformers` and in jllama.

    Not a tuple: hypothesis prints arguments, and a tokenizer of `transformers` is 30 kB of text.
    """

    def __init__(self, content: bytes, root: Path):
        self.hf = load(write(content, root / "hf"))
        self.ours = jllama_tokenizer(content, root)


@pytest.fixture(scope="module", params=[RANKS, SAMPLE], ids=["llama3", "sample"])
def both(request, tmp_path_factory):
    return Both(request.param, tmp_path_factory.mktemp("both"))


TEXTS = st.lists(
    st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "▁", "the", "xyz", "é", "日", "1234", "'RE"])
    | st.characters(codec="utf-8")
    | st.sampled_from(["dog", "opposite", "<s>", "</s>", "<0x0A>", "<|eot_id|>"])
).map("".join)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(TEXTS)
def test_any_text_has_the_ids_of_jllama_and_is_decoded_alike(both, text):
    hf, ours = both.hf, both.ours
    ids = hf_ids(hf, text)
    assert ids == ours.encode(text)
    assert hf.decode(ids) == ours.decode(ids)


def test_the_begin_token_comes_first_and_the_end_token_is_known(both):
    hf, ours = both.hf, both.ours
    assert hf("the")["input_ids"] == [ours.bos_id, *ours.encode("the")]
    assert hf("the", "in")["input_ids"] == [
        *(ours.bos_id, *ours.encode("the")),
        *(ours.bos_id, *ours.encode("in")),
    ]
    assert (hf.bos_token_id, hf.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert len(hf) == ours.vocab_size
    assert hf.model_max_length == 4096


def test_other_programs_are_told_the_tokens_and_the_length(tmp_path):
    config = json.loads((write(SAMPLE, tmp_path / "hf") / "tokenizer_config.json").read_text())
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }


def test_special_tokens_have_llama_3s_ids(tmp_path):
    hf = load(write(RANKS, tmp_path / "hf"))
    assert hf.convert_tokens_to_ids(list(LLAMA3_SPECIALS)) == list(range(N, N + 256))
    ids = hf("the<|eot_id|>", add_special_tokens=False)["input_ids"]
    assert ids == [TOKENS.index(b"the"), N + 9]
    assert hf.decode(ids, skip_special_tokens=True) == "the"


@SMALL
def test_a_config_json_of_llama_beside_it_changes_nothing(content, tmp_path):
    folder = write(content, tmp_path / "hf")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    ours = jllama_tokenizer(content, tmp_path)
    for text in ("  the  dog ", "xyz'RE\n 12345"):
        assert hf_ids(load(folder), text) == ours.encode(text)


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_tokenizer_model_lies_beside_tokenizer_json_for_sentencepiece_alone(tmp_path):
    common = {"tokenizer.json", "tokenizer_config.json"}
    assert files_in(write(SAMPLE, tmp_path / "a")) == common | {"tokenizer.model"}
    assert files_in(write(RANKS, tmp_path / "b")) == common | {"original/tokenizer.model"}


@SMALL
def test_the_way_back_gives_every_byte(content, tmp_path):
    assert metas(write(content, tmp_path / "hf")) == content


def test_tokenizer_json_alone_gives_metas_bytes(tmp_path):
    assert metas(without_original(write(RANKS, tmp_path / "hf"))) == RANKS


def without_original(folder: Path) -> Path:
    shutil.rmtree(folder / "original")
    return folder


def test_tokenizer_model_may_lie_in_the_folder_itself(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(RANKS)
    (tmp_path / "tokenizer.json").write_text("kept, not read")
    assert metas(tmp_path) == RANKS


def test_what_transformers_made_of_metas_file_gives_metas_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copy outside this folder
    (tmp_path / "meta.model").write_bytes(RANKS)
    theirs = TikTokenConverter(str(tmp_path / "meta.model"), extra_special_tokens=LLAMA3_SPECIALS)
    theirs.converted().save(str(tmp_path / "tokenizer.json"))
    assert metas(tmp_path) == RANKS


def test_what_transformers_saved_again_gives_metas_bytes(tmp_path):
    load(write(RANKS, tmp_path / "hf")).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "original").exists()
    assert metas(tmp_path / "again") == RANKS


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rename(**names: str) -> Callable[[dict], object]:
    """Special tokens with other names: rename(_9="<|im_end|>") changes <|eot_id|>."""

    def change(content):
        for index, name in names.items():
            content["added_tokens"][int(index[1:])]["content"] = name

    return change


# Llama 3.0's, and Hugging Face's 3.1.
@pytest.mark.parametrize(
    "names",
    [
        {"_4": 2, "_5": 3, "_8": 4, "_10": 5, **{f"_{i}": i - 5 for i in range(11, 256)}},
        {"_5": 2, **{f"_{i}": i - 8 for i in range(11, 256)}},
    ],
    ids=["3.0", "3.1"],
)
def test_reserved_tokens_may_be_counted_as_in_any_release(names, tmp_path):
    folder = without_original(write(RANKS, tmp_path / "hf"))
    edit(folder, rename(**{i: f"<|reserved_special_token_{n}|>" for i, n in names.items()}))
    assert metas(folder) == RANKS


def model(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda content: content["model"].update(fields))


def top(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda content: content.update(fields))


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def vocab(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda content: change(content["model"]["vocab"]))


def added(change: Callable[[list], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda content: change(content["added_tokens"]))


def specials(**names: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, rename(**names))


def llama2(folder: Path) -> None:
    """As if tokenizer.model had been left behind."""
    write_hf_tokenizer(SAMPLE, folder, 4096)
    (folder / "tokenizer.model").unlink()


# What is damaged -> how to make it so, and what the message must say.
DAMAGED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "none": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        ["no tokenizer", "original/tokenizer.model", "copy Meta's tokenizer.model into it"],
    ),
    "pointer": (
        text("tokenizer.model", "version https://git-lfs.github.com/spec/v1\n"),
        ["tokenizer.model: neither a SentencePiece model nor tiktoken ranks", "again (43 bytes"],
    ),
    "broken": (text("tokenizer.json", '{"model": '), ["line 1: invalid JSON"]),
    "list": (text("tokenizer.json", "[]"), ["expected a JSON object"]),
    "nested": (text("tokenizer.json", "[" * 100_000), ["not readable as JSON"]),
    "digits": (text("tokenizer.json", "1" * 5000), ["not readable as JSON", "4300"]),
}

# What makes it another tokenizer than Llama 3's, and in which words.
ANOTHERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no model": (top(model=["BPE"]), ["the model's type is None, expected BPE"]),
    "other model": (model(type="WordPiece"), ["type is 'WordPiece', expected BPE"]),
    "llama 2": (llama2, ["LLaMA 1's or 2's SentencePiece"]),
    "gpt-2": (
        top(pre_tokenizer={"type": "ByteLevel", "use_regex": True}),
        ["pre_tokenizer is {'type': 'ByteLevel'", r"\\p{N}{1,3}"],
    ),
    "no splitting": (top(pre_tokenizer=None), ['pre_tokenizer is None, expected {"type"']),
    "normalizer": (
        top(normalizer={"type": "NFC"}),
        ["normalizer is {'type': 'NFC'}, expected null"],
    ),
    "vocab a list": (model(vocab=["a"]), ["vocab is not an object of tokens and whole numbers"]),
    "vocab of floats": (vocab(lambda v: v.update(the=1.0)), ["tokens and whole numbers"]),
    "vocab of truth": (vocab(lambda v: v.update(the=True)), ["tokens and whole numbers"]),
    "gap": (vocab(lambda v: v.pop("in")), ["(a gap or a duplicate), the first 256"]),
    "duplicate": (vocab(lambda v: v.update(the=258)), ["duplicate), the first 259"]),
    "negative": (vocab(lambda v: v.update(the=-1)), ["duplicate), the first 0"]),
    "a space": (
        vocab(lambda v: v.update({"a b": N})),
        ["1 tokens not written in GPT-2's letters", "first 'a b'"],
    ),
    "empty": (vocab(lambda v: v.update({"": N})), ["1 tokens not written", "the first ''"]),
    "surrogate": (vocab(lambda v: v.update({"\ud800": N})), ["1 tokens not written", r"'\ud800'"]),
    "no byte": (
        vocab(lambda v: v.update({"ab": v.pop("A")})),
        ["1 of the 256 bytes without a token, the first 65"],
    ),
    "added a number": (top(added_tokens=7), ["added_tokens is not a list of {id, content, ...}"]),
    "added of text": (top(added_tokens=["<|eot_id|>"]), ["added_tokens is not a list"]),
    "added a list as id": (
        added(lambda a: a[0].update(id=[])),
        ["added_tokens is not a list of {id, content, ...}"],
    ),
    "added without id": (added(lambda a: a[0].pop("id")), ["added_tokens is not a list"]),
    "one more": (
        added(lambda a: a.append({"id": N + 256, "content": "<|pad|>"})),
        [f"257 added tokens, expected 256 with the ids {N} to {N + 255}"],
    ),
    "said twice": (added(lambda a: a.append(a[9])), ["257 added tokens, expected 256"]),
    "twice": (added(lambda a: a[1].update(id=N)), ["256 added tokens, expected"]),
    "elsewhere": (added(lambda a: a[1].update(id=0)), ["256 added tokens, expected"]),
    "renamed end": (
        specials(_9="<|im_end|>"),
        [f"special token {N + 9} is '<|im_end|>', expected <|eot_id|>"],
    ),
    "renamed reserved": (
        specials(_200="<|im_start|>"),
        [f"special token {N + 200} is '<|im_start|>', expected <|reserved_special_token_191|>"],
    ),
    "no header": (
        specials(_6="<|reserved_special_token_250|>"),
        [f"special token {N + 6} is", "expected <|start_header_id|>"],
    ),
    "name no text": (added(lambda a: a[9].update(content=[9])), [f"special token {N + 9} is [9]"]),
}


@pytest.fixture(scope="module")
def llama3_folder(tmp_path_factory):
    return without_original(write(RANKS, tmp_path_factory.mktemp("good") / "hf"))


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_named_and_refused(what, llama3_folder, tmp_path):
    folder = Path(shutil.copytree(llama3_folder, tmp_path / "hf"))
    change, fragments = DAMAGED[what]
    change(folder)
    with pytest.raises(InputError) as refused:
        tokenizer_of(read_hf_tokenizer(folder), folder)
    assert str(refused.value).startswith(str(folder))
    for fragment in fragments:
        assert fragment in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("what", ANOTHERS)
def test_another_tokenizer_is_not_taken_for_llama_3s(what, llama3_folder, tmp_path):
    """It is kept as it is; `tokenizers` reads it or, with its reason, not."""
    folder = Path(shutil.copytree(llama3_folder, tmp_path / "hf"))
    change, fragments = ANOTHERS[what]
    change(folder)
    found = difference(json.loads((folder / "tokenizer.json").read_text()))
    for fragment in fragments:
        assert fragment in found
    files = read_hf_tokenizer(folder)
    assert "tokenizer.model" not in files
    assert files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    problem = ""
    try:
        tokenizer_of(files, folder)
    except InputError as refused:
        problem = str(refused)
    assert not problem or (problem.startswith(str(folder)) and len(problem) < 1000)


def trained(**options: object) -> bytes:
    """A SentencePiece model of a few words, by default built as LLaMA's are."""
    model = io.BytesIO()
    built = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_by_unicode_script": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the dog and the cat", "a<s a<s > a dog"] * 10),
        model_writer=model,
        vocab_size=280,
        hard_vocab_limit=False,
        minloglevel=2,
        **(built | options),
    )
    return model.getvalue()


def test_a_special_token_is_never_merged_out_of_text(tmp_path):
    content = trained()
    ours = jllama_tokenizer(content, tmp_path)
    ids = ours.encode("dog<s>")
    assert [ours.piece(token) for token in ids] == [" dog", "<s", ">"]
    assert hf_ids(load(write(content, tmp_path / "hf")), "dog<s>") == ids


# What is wrong with Meta's file -> its content, and what the message must say.
NOT_LLAMA: dict[str, tuple[Callable[[], bytes], str]] = {
    "junk": (lambda: b"junk", "neither a SentencePiece model nor tiktoken ranks"),
    "unigram": (lambda: trained(model_type="unigram"), "model type: 1, expected 2"),
    "nfkc": (lambda: trained(normalization_rule_name="nmt_nfkc"), "normalizer's table"),
    "own pieces": (lambda: trained(user_defined_symbols=["<PRE>"]), "pieces: ['<PRE>'], expected"),
    "no bytes": (lambda: trained(byte_fallback=False), "byte fallback: False, expected True"),
    "no space": (lambda: trained(add_dummy_prefix=False), "before the text: False, expected True"),
    "moved": (lambda: trained(unk_id=2, bos_id=0, eos_id=1), "expected ['<unk>', '<s>', '</s>']"),
    "gap": (lambda: RANKS + b"aGVsbG8= 999\n", f"{N + 1} ranks without {N}, expected 0, 1, 2"),
    "few bytes": (lambda: rank_lines([b"a", b"b"]), "254 of the 256 bytes without a token"),
}


def test_a_sentencepiece_that_joins_spaces_gives_its_ids(tmp_path):
    """As the tokenizer of the tiny stories' models does."""
    content = trained(remove_extra_whitespaces=True)
    theirs = load(write(content, tmp_path / "hf"))
    (tmp_path / "tokenizer.model").write_bytes(content)
    ours = load_tokenizer(tmp_path / "tokenizer.model")

    @hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=300)
    @hypothesis.given(st.text(alphabet=" \n\tadogthe<é日", max_size=20))
    @hypothesis.example("  the  dog \n  and ")
    @hypothesis.example("   ")
    def same(text):
        assert hf_ids(theirs, text) == ours.encode(text)

    same()


@pytest.mark.parametrize("what", NOT_LLAMA)
def test_what_is_not_llamas_is_not_written(what, tmp_path):
    make, message = NOT_LLAMA[what]
    with pytest.raises(InputError) as refused:
        write(make(), tmp_path / "hf")
    assert message in str(refused.value)


FAMILIES = ("llama2", "llama3")
MERGES = {"llama2": 61_249, "llama3": 280_147}  # of the published tokenizer.json


@pytest.fixture(scope="module", params=FAMILIES)
def real(request, assets, tmp_path_factory):
    """Meta's own file, and the folder made of it."""
    content = (assets / "tokenizers" / f"{request.param}_tokenizer.model").read_bytes()
    folder = write(content, tmp_path_factory.mktemp(request.param) / "hf")
    return request.param, content, folder


@pytest.mark.real
def test_transformers_gives_the_published_ids(real, assets):
    family, _, folder = real
    hf = load(folder)
    for row in json.loads((assets / "tokenizers" / "expected.json").read_text()):
        assert hf_ids(hf, row["text"]) == row[family]
        assert hf.decode(row[family]) == row["text"]
    if family == "llama3":
        assert hashlib.sha256(str(hf.encode(LLAMA_CPP_TEXT)).encode()).hexdigest() == LLAMA_CPP


@pytest.mark.real
def test_metas_files_come_back_byte_for_byte_and_give_the_published_ids(real, assets, tmp_path):
    family, content, folder = real
    alone = Path(shutil.copytree(folder, tmp_path / "hf"))
    if family == "llama3":
        without_original(alone)
    back = metas(alone)
    assert back == content == metas(folder)
    ours = jllama_tokenizer(back, tmp_path)
    for row in json.loads((assets / "tokenizers" / "expected.json").read_text()):
        assert ours.encode(row["text"]) == row[family]


@pytest.mark.real
def test_there_are_as_many_merges_as_in_the_published_tokenizer_json(real):
    family, _, folder = real
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert len(model["merges"]) == MERGES[family]
