"""Tokenizers of their own in GGUF files: llama.cpp gives our ids, or they are refused."""

import json
import random
import shutil
from unittest import mock

import pytest

pytest.importorskip("torch")

import random_models
import tokenizers
from conftest import ASSETS
from gguf import TokenType
from llama_cpp import LlamaCpp
from random_models import GROUPED, model_folder
from small_tokenizers import files_of_letters
from test_tokenizer_folders import CHATML, SAMPLE, exported, saved
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from convert.from_hf import main as from_hf
from convert.gguf.vocabulary import read_vocabulary
from convert.to_gguf import ToGguf, export
from convert.to_hf import main as to_hf
from jllama import bundled
from jllama.decode.generate import generate
from jllama.decode.sampling import Sampling
from jllama.errors import InputError
from jllama.folders.load import load_model
from jllama.text.messages import Message
from jllama.text.tokenizer import load_tokenizer
from jllama.text.tokenizer_file import LLAMA3_PATTERN

pytestmark = pytest.mark.as_stored

DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Text of many kinds, for merges that reach into all of them.
LINES = [
    *(row["output"] for row in json.loads(bundled.ROWS.read_text())),
    *("Don't! I'LL we've it's 'tis 'RE", "x = 12345 + 0.5; // 3000000\n\n\treturn x;\r\n",
      "日本語の文章 中文文章 한국어", "Ünïcödé ÉCOLE école Straße ΑΒΓ αβγ Привет мир",
      "🙂🚀 🙂  \u200d ﬁ ½ ٣٤ Ⅷ", "    deep    spaces     here      ") * 40,
]  # fmt: skip
PARTS = ["the", "The", " ", "  ", "     ", "\n", "\n\n", "\r\n", "\t", "1234", "7", "٣٤", "½Ⅷ²",
         "é", "e\u0301", "ÉÈ", "ß", "日本", "中文", "한국", "🚀", "👩\u200d🚀", "'RE", "'ll",
         "don't", "x'", "_", "▁", "<s>", "</s>", "<|im_end|>", "<think>", "[PAD]", "opposite",
         "<0x0A>", "\u200d", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "\x0b", "\x00", "Ġ",
         "x", "...", "#!", "€", "$1", "a.b", "http://", "ﬁ", "ӱ", "ก็", "नि", "\ufeff",
         "\U0010ffff"]  # fmt: skip
DRAW = random.Random(1)
TEXTS = ["".join(DRAW.choices(PARTS, k=DRAW.randrange(1, 12))) for _ in range(200)]
# What is between special tokens, and marked ones side by side.
MARKED = ["{0}user\nHi there{1}\n{0}assistant\n", "{0}{1}{1} {0} the\n", "a{1}b{0}", "{1} "]


def split(pattern):
    words = pre_tokenizers.Split(Regex(pattern), "isolated", invert=False)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])


QWEN2 = LLAMA3_PATTERN.replace("{1,3}", "")
GPT2 = pre_tokenizers.ByteLevel(False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])


def letters(pre_tokenizer, specials, ignore_merges=False, more=()):
    """A folder of a byte-level BPE, trained here; begin and end are the last two specials."""

    def make(root):
        tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=900, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(LINES, trainer)
        tokenizer.add_tokens([AddedToken(name, normalized=False) for name in more])
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=specials[-2], eos_token=specials[-1]
        )
        return saved(fast, root / "b")

    return make


def pieces(root):
    """Llama 2's form, with a fine-tune's tokens; `<think>` is text like any other."""
    tokenizer = exported(SAMPLE, root / "a")
    tokenizer.add_special_tokens({"additional_special_tokens": CHATML, "eos_token": CHATML[1]})
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return saved(tokenizer, root / "b")


def without_space_before(root):
    """The same, as a Metaspace that puts nothing before a text."""
    folder = pieces(root)
    file = folder / "tokenizer.json"
    metaspace = pre_tokenizers.Metaspace("▁", "never", split=False).__getstate__()
    content = json.loads(file.read_text())
    content |= {"normalizer": None, "pre_tokenizer": json.loads(metaspace)}
    file.write_text(json.dumps(content))
    return folder


def real(family):
    """Meta's own tokens, one of which a fine-tune renamed or added."""

    def make(root):
        content = (ASSETS / f"tokenizers/{family}_tokenizer.model").read_bytes()
        tokenizer = exported(content, root / "a")
        end = "<|eot_id|>" if family == "llama3" else "</s>"
        tokenizer.add_special_tokens({"additional_special_tokens": CHATML[:1], "eos_token": end})
        return saved(tokenizer, root / "b")

    return make


KINDS = {
    "smollm": letters(DIGITS, ["<|endoftext|>", *CHATML]),
    "gpt-2": letters(GPT2, ["<|endoftext|>", *CHATML]),
    "llama-bpe": letters(split(LLAMA3_PATTERN), DEEPSEEK, ignore_merges=True, more=["<think>"]),
    "dbrx": letters(split(LLAMA3_PATTERN), CHATML, more=["<think>"]),
    "qwen2": letters(split(QWEN2), CHATML),
    "pieces": pieces,
    "without space before": without_space_before,
}
REAL = {family: real(family) for family in ("llama2", "llama3")}


@pytest.fixture(
    scope="module", params=[*KINDS, *(pytest.param(x, marks=pytest.mark.real) for x in REAL)]
)
def kind(request, tmp_path_factory):
    """Name, model folder and GGUF file of a random model with such a tokenizer."""
    root = tmp_path_factory.mktemp("kind")
    words = (KINDS | REAL)[request.param](root)
    size = len(AutoTokenizer.from_pretrained(words)) + 3
    with mock.patch.multiple(random_models, VOCABULARY=size):
        to_hf([str(model_folder(root, GROUPED)), str(root / "hf")])
    for file in (root / "hf").glob("tokenizer*"):
        file.unlink()
    shutil.rmtree(root / "hf/original")
    (words / "config.json").unlink()
    shutil.copytree(words, root / "hf", dirs_exist_ok=True)
    if {*CHATML} <= AutoTokenizer.from_pretrained(words).get_vocab().keys():
        (root / "hf/chat_template.jinja").write_text(CHATML_TEMPLATE)
    (root / "hf/generation_config.json").write_text('{"eos_token_id": [1, 999999]}')
    from_hf([str(root / "hf"), str(root / "folder")])
    export(ToGguf(root / "folder", root / "m.gguf", dtype="f32"))
    return request.param, root / "folder", LlamaCpp(root / "m.gguf")


def test_llama_cpp_gives_our_ids(kind):
    name, folder, peer = kind
    vocabulary, ours = read_vocabulary(folder), load_tokenizer(folder)
    if name not in ("pieces", "without space before", "llama2"):
        assert vocabulary.pre == {"llama3": "llama-bpe"}.get(name, name)
    begin = [ours.bos_id] if vocabulary.begins else []
    assert {len(ours.encode(text)) for text in TEXTS} >= {1, 2, 3, 20}
    for text in TEXTS:
        assert peer.tokens(text) == [*begin, *ours.encode(text)], text
    marks = sorted(ours.specials, key=ours.special)[-2:]
    for text in (form.format(*marks) for form in MARKED):
        ids = ours.marked(text)
        assert {*ids} & {*map(ours.special, marks)}
        assert peer.tokens(text, marked=True) == [*begin, *ids], text


def test_the_modelfile_names_the_ends_as_they_are_written(kind):
    _, folder, _ = kind
    ours = load_tokenizer(folder)
    ends = [name for name in (*CHATML, *DEEPSEEK, "<s>", "</s>", "<|eot_id|>", "<|endoftext|>")
            if name in ours.specials and ours.special(name) in ours.stop_ids]  # fmt: skip
    lines = (folder.parent / "m.Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./m.gguf"
    assert len(ends) > 0
    assert {*lines[1:]} == {f'PARAMETER stop "{end}"' for end in ends}


def test_llama_cpp_chats_with_our_ids(kind):
    _, folder, peer = kind
    ours = load_tokenizer(folder)
    if ours.template is None:
        pytest.skip("a tokenizer without a chat template")
    said = ["What is the opposite of hot?", "Cold.\n", " and of cold"]
    roles = ("user", "assistant", "user")
    prompt = ours.template.prompt([Message(*turn) for turn in zip(roles, said, strict=True)])
    assert peer.chat(*said) == ours.marked(prompt)


def test_llama_cpp_generates_our_ids(kind):
    _, folder, peer = kind
    ours, model = load_tokenizer(folder), load_model(folder, "fp32")
    prompts = [[ours.bos_id, *ours.encode(text)] for text in TEXTS[:4]]
    answers = generate(model, prompts, 24, Sampling(temperature=0), stop_ids=ours.stop_ids)
    for prompt, answer in zip(prompts, answers, strict=True):
        found, _ = peer.answer(prompt, 24)
        same = min(len(found), len(answer))
        assert same > 2 or answer[-1] in ours.stop_ids
        assert found[:same] == answer[:same]


def test_tokens_of_a_fine_tune_have_their_types(tmp_path):
    folder = pieces(tmp_path)
    vocabulary = read_vocabulary(folder)
    size = len(vocabulary.tokens)
    assert {*vocabulary.tokens[size - 3 : size - 1]} == {*CHATML}
    assert vocabulary.tokens[size - 1] == "<think>"
    assert vocabulary.types[size - 3 :] == (*[TokenType.CONTROL] * 2, TokenType.USER_DEFINED)
    assert vocabulary.types[:4] == (TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, TokenType.BYTE)
    assert vocabulary.tokens[3] == "<0x00>"


def changed(make, change):
    def changed_folder(root):
        folder = make(root)
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return folder

    return changed_folder


def metaspace(scheme):
    made = json.loads(pre_tokenizers.Metaspace("▁", scheme, split=False).__getstate__())
    return lambda content: content.update(normalizer=None, pre_tokenizer=made)


def swap_merges(content):
    """Of two ways to make one token the other first, with another token's between them."""
    made = [left + right for left, right in content["model"]["merges"]]
    first = next(n for n, token in enumerate(made) if made.count(token) > 1)
    content["model"]["merges"].append(content["model"]["merges"].pop(first))


TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\s+|."
SMOLLM = KINDS["smollm"]
OTHER_IDS = {
    "another rule": (letters(split(TEKKEN), CHATML), r"it cuts text by \("),
    "no look-up": (letters(split(QWEN2), CHATML, ignore_merges=True), "that are tokens whole"),
    "a normalizer": (
        changed(SMOLLM, lambda c: c.update(normalizer={"type": "NFC"})),
        "its normalizer {'type': 'NFC'} changes text first",
    ),
    "a byte": (changed(SMOLLM, lambda c: c["model"]["vocab"].pop("Ā")), "no token for byte 0"),
    "a space before": (
        changed(SMOLLM, lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(
            add_prefix_space=True)), "it cuts text by",
    ),
    "a token that takes spaces": (
        changed(SMOLLM, lambda c: c["added_tokens"][1].update(lstrip=True)),
        r"token '<\|im_start\|>' is lstrip",
    ),
    "a token after the normalizer": (
        changed(pieces, lambda c: c["added_tokens"][-1].update(normalized=True)),
        "token '<think>' is normalized",
    ),
    "Metaspace": (changed(pieces, metaspace("first")), "no ▁ before a text that begins with a"),
    "Metaspace always": (changed(pieces, metaspace("always")), "no ▁ before a text"),
    "prepared otherwise": (
        changed(pieces, lambda c: c.update(normalizer={"type": "NFKC"})), "it prepares text by",
    ),
    "a way to join": (changed(pieces, lambda c: c["model"]["merges"].pop()), "it never joins"),
    "joined in turns": (changed(pieces, swap_merges), "prefers one way to make a token"),
    "a piece": (
        changed(pieces, lambda c: c["model"].update(vocab={
            text.replace("<0x0A>", "<line>"): n for text, n in c["model"]["vocab"].items()})),
        "no token <0x0A>",
    ),
    "dropout": (changed(SMOLLM, lambda c: c["model"].update(dropout=0.5)), "it has dropout 0.5"),
    "unigrams": (
        changed(SMOLLM, lambda c: c.update(
            model={"type": "Unigram", "unk_id": 0,
                   "vocab": [["<|endoftext|>", 0.0], *([name, 0.0] for name in CHATML)]})),
        "its model is Unigram, not BPE",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER_IDS)
def test_a_tokenizer_to_which_llama_cpp_would_give_other_ids_is_refused(what, tmp_path):
    make, reason = OTHER_IDS[what]
    with pytest.raises(InputError, match=rf"tokenizer\.json: .*{reason}.*so llama\.cpp's ids") as x:
        read_vocabulary(make(tmp_path))
    assert "export with to-hf" in str(x.value)


def test_a_tokenizer_without_merges_is_refused_which_llama_cpp_does_not_load(tmp_path):
    files = {name: text.encode() for name, text in files_of_letters().items()}
    content = json.loads(files["tokenizer.json"])
    content["model"]["merges"] = []
    files["tokenizer.json"] = json.dumps(content).encode()
    for name, text in files.items():
        (tmp_path / name).write_bytes(text)
    with pytest.raises(InputError, match=r"merges nothing, and llama\.cpp loads"):
        read_vocabulary(tmp_path)


def test_a_template_that_is_no_jinja_is_refused(tmp_path):
    folder = pieces(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages")
    with pytest.raises(InputError, match=r"chat_template\.jinja: line 1: unexpected end"):
        read_vocabulary(folder)
