"""The scoring command against `transformers` and `peft`, and against what training learns."""

import json
import math

import pytest

pytest.importorskip("torch")

import jax
import numpy as np
import peft
import torch
from flax import nnx
from meta_files import random_tensors, reference, write_meta
from random_models import BASE, GROUPED, TOKENIZER, model_folder

import jllama
from convert.from_meta import FromMeta, convert
from eval.exact import Asked, exact_answers, short_answers
from eval.likelihood import compare, hidden, score_sequences
from eval.score import NEUTRAL, main
from jllama.config import LoraConfig
from jllama.folders.adapter import save_adapter
from jllama.folders.json_files import read_json_lines
from jllama.folders.manifest import read_sealed
from jllama.lora import attach
from jllama.text.rows import make_examples
from jllama.text.tokenizer import load_tokenizer
from train.lora import main as train

pytestmark = pytest.mark.integration

LORA = LoraConfig(rank=4, alpha=8, targets=("all",))
LIMIT = 160  # --max-seq-len
WIDTHS = {64, 256}  # positions that these rows and the neutral text are padded to
ROWS = [
    {"instruction": f"Say {word}.", "input": "In capitals." * (i % 2), "output": word * times}
    for i, (word, times) in enumerate(
        [("one", 10), ("trois", 24), ("vier", 8), ("cinq", 60), ("six", 12), ("sieben", 1)]
    )
]
ROWS[-1]["instruction"] *= 3
TALK = {"messages": [{"role": role, "content": text} for role, text in (
    ("system", "Be brief."), ("user", "Hello?"), ("assistant", "Yes."), ("user", "Who?"),
    ("assistant", "Me."))]}  # fmt: skip


def write_adapter(model, folder, seed=0):
    """A fresh adapter with a random B, saved as PEFT has it."""
    attach(model, LORA, jax.random.key(seed))
    state = nnx.state(model, nnx.LoRAParam)
    drawn = jax.tree.map(lambda x: 0.15 * jax.random.normal(jax.random.key(x.size), x.shape), state)
    nnx.update(model, drawn)
    save_adapter(folder, model, LORA, "base", {"prompt_style": "alpaca"})


@pytest.fixture(scope="module", params=[BASE, GROUPED], ids=["multi-head", "grouped-query"])
def pair(request, tmp_path_factory):
    """A model, an adapter and rows on disk, and the same two in `transformers` and `peft`."""
    root = tmp_path_factory.mktemp("pair")
    model_folder(root, request.param)
    write_adapter(jllama.load_model(root / "model", "fp32"), root / "adapter")
    (root / "rows.json").write_text(json.dumps(ROWS))
    plain = reference(request.param, random_tensors(request.param))
    return root, peft.PeftModel.from_pretrained(plain, root / "adapter").eval()


@pytest.fixture(scope="module")
def sequences(pair):
    examples, _ = trained_on(ROWS, load_tokenizer(pair[0] / "model"))
    return [(example.ids.tolist(), example.learned.tolist()) for example in examples]


@pytest.fixture(scope="module")
def result(pair):
    """What the command says of the pair, with the numbers of compilations that it took."""
    root, _ = pair
    hidden.clear_cache()
    compare.clear_cache()
    main([
        "--model", str(root / "model"), "--adapter", str(root / "adapter"), "--precision", "fp32",
        "--data", str(root / "rows.json"), "--prompt-style", "plain", "--max-seq-len", str(LIMIT),
        "--exact-tokens", "0", "--output", str(root / "score.json"), "--json",
    ])  # fmt: skip
    compiled = hidden._cache_size(), compare._cache_size()
    return json.loads((root / "score.json").read_text()) | {"compiled": compiled}


@pytest.fixture(scope="module")
def adapted(pair):
    return jllama.load_adapter(jllama.load_model(pair[0] / "model", "fp32"), pair[0] / "adapter")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run that tuned every weight until it knew its rows by heart, and another model."""
    root = tmp_path_factory.mktemp("place")
    model_folder(root, BASE)
    model_folder(root, GROUPED, name="other")
    (root / "rows.json").write_text(json.dumps(ROWS[:1] + [
        {"prompt": f"Say {i}.", "completion": str(i)} for i in range(4)
    ]))  # fmt: skip
    train([
        "--model", str(root / "model"), "--data", str(root / "rows.json"), "--precision", "fp32",
        "--output-dir", str(root / "run"), "--prompt-style", "report", "--tune", "full",
        "--epochs", "40", "--learning-rate", "1e-2", "--micro-batch-size", "5",
        "--gradient-accumulation-steps", "1", "--remat", "none",
    ])  # fmt: skip
    return root


def scored(capsys, *arguments):
    capsys.readouterr()
    main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def trained_on(rows, tokenizer, style="plain", skip=0, limit=LIMIT):
    return make_examples(
        rows, tokenizer, style, max_seq_len=limit, train_on_prompt=False, skip_bad_rows=skip,
        source="rows",
    )  # fmt: skip


@torch.no_grad()
def torch_scores(peer, ids, learned):
    """NLL of base and tuned and KL(tuned || base), summed over what is learned."""
    tokens, mask = torch.tensor([ids]), torch.tensor(learned[1:])
    tuned = torch.log_softmax(peer(tokens[:, :-1]).logits[0], -1)
    with peer.disable_adapter():
        base = torch.log_softmax(peer(tokens[:, :-1]).logits[0], -1)
    nll = [torch.nn.functional.nll_loss(log[mask], tokens[0, 1:][mask], reduction="sum").item()
           for log in (base, tuned)]  # fmt: skip
    kl = torch.nn.functional.kl_div(base[mask], tuned[mask], reduction="sum", log_target=True)
    return *nll, kl.item()


def test_held_out_rows_and_those_that_were_learned_are_scored_apart(place, capsys, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(
        [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(9)]
    ))  # fmt: skip
    train([
        "--model", str(place / "model"), "--data", str(tmp_path / "rows.json"), "--epochs", "1",
        "--output-dir", str(tmp_path / "run"), "--val-size", "3", "--seed", "5",
    ])  # fmt: skip
    run = ["--run", tmp_path / "run", "--exact-tokens", "0"]
    parts = [scored(capsys, *run), *(scored(capsys, *run, "--rows", part) for part in
             ("training", "all", "held-out"))]  # fmt: skip
    assert [part["part"] for part in parts] == ["held-out", "training", "all", "held-out"]
    held, learned, every = ({row["row"] for row in part["per_row"]} for part in parts[:3])
    assert (len(held), len(learned)) == (3, 6)
    assert held | learned == every == set(range(9))
    evaluated = [
        line["eval_loss"] for line in read_json_lines(tmp_path / "run" / "metrics.jsonl").values
        if "eval_loss" in line
    ]  # fmt: skip
    assert parts[0]["nll_per_token"] == pytest.approx(evaluated[-1], rel=1e-3)
    limited = scored(capsys, *run, "--limit", 2)
    assert [row["row"] for row in limited["per_row"]] == sorted(held)[:2]
    for arguments, message in (
        (["--run", place / "run", "--rows", "held-out"], "held no rows out"),
        ([*run, "--data", place / "rows.json", "--rows", "training"], "not the run's"),
    ):
        with pytest.raises(SystemExit):
            main([*map(str, arguments)])
        assert message in " ".join(capsys.readouterr().err.split())
    assert scored(capsys, *run, "--data", place / "rows.json")["part"] == "all"


def test_nll_and_kl_of_every_row_equal_transformers_and_peft(pair, sequences, result):
    _, peer = pair
    assert len(result["per_row"]) == len(ROWS) == result["rows"]
    for line, (ids, learned) in zip(result["per_row"], sequences, strict=True):
        tokens = sum(learned[1:])
        base, tuned, kl = (value / tokens for value in torch_scores(peer, ids, learned))
        assert line["tuned"]["tokens"] == tokens
        assert line["base"]["nll_per_token"] == pytest.approx(base, abs=1e-5)
        assert line["tuned"]["nll_per_token"] == pytest.approx(tuned, abs=1e-5)
        assert line["tuned"]["kl_per_token"] == pytest.approx(kl, abs=1e-5)
        assert abs(base - tuned) > 1e-2  # the adapter does something
        assert kl > 0.05


def test_neutral_text_is_scored_from_its_second_token_on(pair, result):
    root, peer = pair
    tokenizer = load_tokenizer(root / "model")
    texts = json.loads(NEUTRAL.read_text())["paragraphs"]
    assert 8 <= len(texts) <= 12
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    sums = np.sum([torch_scores(peer, ids, [True] * len(ids)) for ids in rows], axis=0)
    tokens = sum(len(ids) - 1 for ids in rows)
    for who, total in zip(("base", "tuned"), sums[:2], strict=True):
        assert result[who]["neutral"]["tokens"] == tokens
        assert result[who]["neutral"]["nll_per_token"] == pytest.approx(total / tokens, abs=1e-5)


def test_a_model_and_an_adapter_of_scale_0_do_not_diverge_from_the_base(pair, sequences, adapted):
    plain = jllama.load_model(pair[0] / "model", "fp32")
    short = [sequence for sequence in sequences if len(sequence[0]) <= 64]
    assert len(short) > 2
    for first, last in (
        ((plain, 0.0), (plain, 1.0)),
        ((adapted, 1.0), (adapted, 1.0)),
        ((plain, 0.0), (adapted, 0.0)),
    ):
        for score in score_sequences({"base": first, "tuned": last}, short, 8):
            assert abs(score.kl) / score.tokens < 1e-7
            assert score.nll["base"] == pytest.approx(score.nll["tuned"], rel=1e-7)


def test_kl_is_taken_from_the_tuned_model(pair, sequences, adapted):
    base, tuned = (adapted, 0.0), (adapted, 1.0)
    there = score_sequences({"base": base, "tuned": tuned}, sequences[:1], 8)[0].kl
    back = score_sequences({"tuned": tuned, "base": base}, sequences[:1], 8)[0].kl
    assert there != pytest.approx(back, rel=1e-3)
    assert there == pytest.approx(torch_scores(pair[1], *sequences[0])[2], rel=1e-4)


def test_totals_are_the_sums_over_the_rows(result):
    for who in ("base", "tuned"):
        rows = [line[who] for line in result["per_row"]]
        tokens, nll = sum(row["tokens"] for row in rows), sum(row["nll"] for row in rows)
        answers = result[who]["answers"]
        assert answers["tokens"] == tokens
        assert answers["nll_per_token"] == pytest.approx(nll / tokens, rel=1e-12)
        assert answers["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-12)
        assert nll / tokens != pytest.approx(np.mean([row["nll_per_token"] for row in rows]), 1e-4)
    kl = sum(line["tuned"]["kl_per_token"] * line["tuned"]["tokens"] for line in result["per_row"])
    assert result["tuned"]["answers"]["kl_per_token"] == pytest.approx(kl / tokens, rel=1e-12)
    assert {name: result[name] for name in ("nll_per_token", "tokens", "scored")} == {
        "nll_per_token": answers["nll_per_token"], "tokens": tokens, "scored": "tuned",
    }  # fmt: skip


def test_order_and_batches_change_nothing(sequences, adapted, result):
    voices = {"base": (adapted, 0.0), "tuned": (adapted, 1.0)}
    found = score_sequences(voices, sequences[::-1], 3)[::-1]
    for line, score in zip(result["per_row"], found, strict=True):
        for who in voices:
            expected = line[who]["nll_per_token"]
            assert score.nll[who] / score.tokens == pytest.approx(expected, abs=1e-6)
        assert score.kl / score.tokens == pytest.approx(line["tuned"]["kl_per_token"], abs=1e-6)


def test_base_and_tuned_share_one_compilation_of_each_length(result):
    assert result["compiled"] == (len(WIDTHS), len(WIDTHS))


def test_logits_of_a_batch_are_never_held_at_once_and_chunks_change_nothing():
    draw = np.random.default_rng(0)
    xs = [draw.standard_normal((4, 32, 16), np.float32) for _ in range(2)]
    heads = [draw.standard_normal((512, 16), np.float32) for _ in range(2)]
    rest = (draw.integers(0, 512, (4, 32)), draw.random((4, 32)) < 0.5)
    text = compare.lower(xs, heads, *rest, chunk=8).compile().as_text()
    assert "f32[8,512]" in text
    assert not any(shape in text for shape in ("[128,512]", "[4,32,512]"))
    for one, other in zip(
        jax.tree.leaves(compare(xs, heads, *rest, chunk=8)),
        jax.tree.leaves(compare(xs, heads, *rest)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)
        assert np.array_equal(one != 0, rest[1])


@pytest.mark.parametrize("style", ["report", "plain", "alpaca", "llama3-chat"])
def test_only_whole_short_rows_are_asked_for_their_last_answer(tmp_path, style):
    (tmp_path / "tokenizer.model").write_bytes(TOKENIZER)
    tokenizer = load_tokenizer(tmp_path)
    long = {"prompt": "Count.", "completion": "1, 2, " * 300}
    rows = [{"question": 1}, *ROWS, TALK, long]
    examples, _ = make_examples(
        rows, tokenizer, style, max_seq_len=1024, train_on_prompt=False, skip_bad_rows=1, source="-"
    )
    assert examples.cut.sum() == 1
    asked = short_answers(rows, examples, tokenizer, style, most=40, context=1024)
    assert [x.row for x in asked] == [1, 3, 5, 6, 7]  # by the bytes of their answers
    assert (asked[-1].answer, asked[0].answer) == ("Me.", "one" * 10)
    for question in asked:
        (whole,) = [x.ids.tolist() for x in examples if x.row == question.row]
        assert whole[: len(question.prompt)] == question.prompt
        said = whole[len(question.prompt) :]
        assert said == [*tokenizer.encode(question.answer), said[-1]]
    assert not short_answers(rows, examples, tokenizer, style, most=40, context=20)


def test_a_run_is_scored_whole_and_its_rows_are_known_by_heart(place, capsys):
    capsys.readouterr()
    main(["--run", str(place / "run")])
    shown = capsys.readouterr().out
    assert "KL(tuned || base)" in shown
    assert shown.rstrip().splitlines()[-1] == f"wrote {place / 'run' / 'score.json'}"
    result = json.loads((place / "run" / "score.json").read_text())
    assert result["settings"]["prompt_style"] == "report"
    assert result["settings"]["max_seq_len"] == 512
    assert result["base"]["exact"] == {"rows": 5, "share": 0.0}
    assert result["tuned"]["exact"] == {"rows": 5, "share": 1.0}
    assert (
        result["tuned"]["answers"]["nll_per_token"]
        < 0.1
        < result["base"]["answers"]["nll_per_token"]
    )
    assert result["tuned"]["neutral"]["nll_per_token"] > result["base"]["neutral"]["nll_per_token"]

    again = scored(capsys, "--run", place / "run", "--output", place / "again.json")
    assert again == read_sealed(place / "again.json", "")
    for name in ("base", "tuned", "per_row"):
        assert again[name] == result[name]


def test_only_short_whole_answers_are_asked_for(place, capsys):
    result = scored(capsys, "--run", place / "run", "--exact-tokens", "2")
    assert result["tuned"]["exact"] == {"rows": 4, "share": 1.0}
    assert [line["tuned"]["exact"] for line in result["per_row"]] == [None, *[True] * 4]
    result = scored(capsys, "--run", place / "run", "--exact-tokens", "0")
    assert result["tuned"]["exact"] == {"rows": 0, "share": None}


def test_an_exact_answer_is_the_whole_text_and_an_end(place, monkeypatch):
    tokenizer = load_tokenizer(place / "model")
    prompts = [[tokenizer.bos_id, *tokenizer.encode("a" * (9 - i))] for i in range(5)]
    found = [Asked(row, prompt, "Yes.") for row, prompt in enumerate(prompts)]
    end = [tokenizer.eos_id]
    said = [["Yes.", end], [" Yes.\n", end], ["Yes.!", []], ["yes.", end], ["Yes", end]]
    answers = {
        tuple(example.prompt): tokenizer.encode(text) + stop
        for example, (text, stop) in zip(found, said, strict=True)
    }

    def generate(model, prompts, max_new_tokens, sampling, *, stop_ids, adapter_scale):
        assert (len(prompts), max_new_tokens, sampling.temperature) == (2, 7, 0)
        assert (stop_ids, adapter_scale) == (tokenizer.stop_ids, 0.5)
        return [answers[tuple(prompt)] for prompt in prompts]

    monkeypatch.setattr(jllama, "generate", generate)
    asked = []
    right = exact_answers((None, 0.5), found, tokenizer, 7, 2, lambda: asked.append(1))
    assert right == {0: True, 1: True, 2: False, 3: False, 4: False}
    assert len(asked) == 3


def test_without_anything_tuned_the_base_is_scored(place, capsys):
    result = scored(
        capsys, "--model", place / "model", "--data", place / "rows.json", "--limit", "2",
        "--precision", "fp32", "--exact-tokens", "0",
    )  # fmt: skip
    assert result["scored"] == "base"
    assert result["rows"] == 2
    assert "tuned" not in result
    assert "kl_per_token" not in result["base"]["answers"]
    assert result["nll_per_token"] == result["base"]["answers"]["nll_per_token"]


def test_bf16_is_near_fp32(pair, sequences, result):
    model = jllama.load_model(pair[0] / "model", "bf16")
    (score,) = score_sequences({"base": (model, 0.0)}, sequences[:1], 8)
    expected = result["per_row"][0]["base"]["nll_per_token"]
    assert score.nll["base"] / score.tokens == pytest.approx(expected, abs=3e-2)
    assert score.nll["base"] / score.tokens != pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nowhere"], "nowhere: no config.yaml; expected a run folder"),
        (["--model", "{place}/model"], "--model without --data; give the rows"),
        (["--model", "{place}/model", "--data", "no.json"], "no.json: no such file"),
        (
            ["--model", "{place}/model", "--data", "{place}/text"],
            "text: row 1 (line 2): invalid JSON",
        ),
        (
            ["--model", "{place}/model", "--data", "{place}/list"],
            "row 1 (line 1): a number, expected an object",
        ),
        (["--model", "{place}/model", "--data", "{place}/bad"], "--skip-bad-rows 1\n  row 1: no"),
        (["--run", "{place}/run", "--max-seq-len", "5"], "its prompt fills all 5 tokens"),
        (
            ["--run", "{place}/run", "--batch-size", "0"],
            "--batch-size 0, expected a whole number, at least 1",
        ),
        (["--run", "{place}/run", "--output", "{place}/no/a.json"], "--output wants a file"),
        (
            ["--model", "{place}/other", "--tuned", "{place}/model", "--data", "{place}/rows.json"],
            "differ in sizes; give the base that was tuned",
        ),
    ],
)
def test_wrong_input_is_refused(place, capsys, arguments, message):
    (place / "text").write_text('{"prompt": "a", "completion": "b"}\nnot JSON\n')
    (place / "list").write_text("[1, 2]")
    (place / "bad").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n')
    with pytest.raises(SystemExit) as ended:
        main([word.format(place=place) for word in arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_models_of_different_tokenizers_are_not_compared(place, tmp_path, capsys):
    meta = write_meta(tmp_path / "meta", random_tensors(BASE), BASE)
    (meta / "tokenizer.model").write_bytes(b"".join(reversed(TOKENIZER.splitlines(keepends=True))))
    convert(FromMeta(meta, tmp_path / "tuned"))
    with pytest.raises(SystemExit):
        main(["--model", str(place / "model"), "--tuned", str(tmp_path / "tuned"), "--data", "x"])
    assert "differ in tokenizer; give the base that was tuned" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_named(place, tmp_path):
    model = jllama.load_model(place / "model", "fp32")
    model.norm.weight[...] = model.norm.weight[...] * np.nan
    with pytest.raises(jllama.InputError, match="not finite"):
        score_sequences({"base": (model, 0.0)}, [([1, 2, 3], [False, True, True])], 2)
