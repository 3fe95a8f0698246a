"""lm-evaluation-harness: jllama's answers beside those of lm_eval's own `hf` with an export."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

pytest.importorskip("torch")

import transformers
from random_models import adapted
from test_report import Page, follow
from test_tokenizer_folders import alpaca, chatml, deepseek, llama3, saved_again, smollm

from convert.to_hf import main as to_hf
from eval.harness.command import HarnessConfig, load_tasks
from eval.harness.command import main as harness
from eval.report.command import main as report
from eval.subject import Subject, load_voices, resolve
from jllama import bundled
from jllama.errors import InputError
from jllama.folders.json_files import write_json_lines
from jllama.folders.manifest import read_sealed, write_sealed
from jllama.text.json_tokenizer import adds_bos
from jllama.text.tokenizer import load_tokenizer, tokenizer_files
from train.lora import main as train

pytestmark = pytest.mark.integration

CONTEXT = 64  # so that some prompts lose their beginning, and long texts are cut into windows
CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}\n",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "right",
    "target_delimiter": "",
    "num_fewshot": 2,
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ANSWERS = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}\n",
    "doc_to_target": "{{answer}}",
    "num_fewshot": 1,
    "generation_kwargs": {"until": ["letter", "\n"], "max_gen_toks": 24},
    "metric_list": [{"metric": "exact_match"}],
}
ORDERS = (0, 3, 5), (3, 0, 5), (3, 5, 0)  # of three answers, the right one is 0 rows on
PAGES = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{page}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}


def write_tasks(place: Path) -> Path:
    """Three tasks of the bundled sample's held-out rows, which name files of their own."""
    rows = json.loads(bundled.HELD_OUT.read_text())[:10]
    said = [row["output"] for row in rows]
    questions = [
        {
            "question": f"{row['instruction']} {row['input']}".strip(),
            "answer": row["output"],
            "choices": [
                said[(i + k) % len(said)] for k in ((0, 3, 5), (3, 0, 5), (3, 5, 0))[i % 3]
            ],
            "right": i % 3,
        }
        for i, row in enumerate(rows)
    ]
    pages = [{"page": " ".join(said[:n])} for n in (1, 5, 10)]
    folder = place / "tasks"
    folder.mkdir()
    for name, task, content in (
        ("choices", CHOICES, questions),
        ("answers", ANSWERS, questions),
        ("pages", PAGES, pages),
    ):
        write_json_lines(folder / f"{name}.jsonl", content)
        files = {"test": str(folder / f"{name}.jsonl")}
        of_files = {"dataset_path": "json", "dataset_kwargs": {"data_files": files},
                    "test_split": "test", "fewshot_split": "test"}  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | of_files | task))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The bundled sample as a model folder and as Hugging Face's."""
    root = tmp_path_factory.mktemp("harness")
    bundled.convert_sample(root / "model")
    to_hf([str(root / "model"), str(root / "export")])
    return root


@pytest.fixture(scope="module")
def place(folders):
    """The same with an adapter and tasks."""
    pytest.importorskip("lm_eval")
    adapted(folders / "model", folders / "adapter", size=0.03)
    write_tasks(folders)
    return folders


def ours(place, **more):
    from eval.harness.backend import JllamaLM

    arguments = {"model": place / "model", "adapter": place / "adapter", "precision": "fp32"}
    return JllamaLM.create_from_arg_obj(arguments | more, {"batch_size": 4, "device": "cuda:0"})


@pytest.fixture(scope="module")
def both(place):
    """Base and tuned as the command has them, from one load."""
    from eval.harness.backend import JllamaLM, texts_of

    config, _ = resolve(Subject(model=str(place / "model"), adapter=str(place / "adapter"),
                                precision="fp32"))  # fmt: skip
    texts = texts_of(config, "base")
    return {who: JllamaLM(who, voice, texts, 4) for who, voice in load_voices(config).items()}


@pytest.fixture(scope="module", params=["base", "tuned"])
def pair(request, place, both):
    """The same model twice: jllama's, and lm_eval's `hf` with the export and the adapter."""
    from lm_eval.models.huggingface import HFLM

    found = both[request.param]
    assert found.max_length == 4096
    found.max_length = CONTEXT
    peer = HFLM(
        str(place / "export"), device="cpu", dtype="float32", batch_size=4, max_length=CONTEXT,
        peft=str(place / "adapter") if request.param == "tuned" else None,
    )  # fmt: skip
    return found, peer


def asked(place, lm, names="choices,answers,pages", **more):
    import lm_eval

    tasks = load_tasks(HarnessConfig(tasks=names, include_path=str(place / "tasks"), **more))
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    return lm_eval.evaluate(lm, tasks, limit=more.get("limit"))


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_tasks_of_every_kind_give_what_hf_gives_with_the_export(place, pair, capsys):
    found = [asked(place, lm) for lm in pair]
    (ours, our_samples), (theirs, their_samples) = ((x["results"], x["samples"]) for x in found)
    assert "requests lost their beginning" in capsys.readouterr().out
    for task, metrics in theirs.items():
        assert ours[task].keys() == metrics.keys()
        for name, value in metrics.items():
            if isinstance(value, float) and "," in name:
                assert ours[task][name] == pytest.approx(float(value), rel=1e-5), (task, name)
    for one, other in zip(our_samples["choices"], their_samples["choices"], strict=True):
        assert one["arguments"] == other["arguments"]
        for (logprob, greedy), (expected, expected_greedy) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert logprob == pytest.approx(expected, abs=1e-4)
            assert greedy == expected_greedy
    texts = [[sample["resps"] for sample in samples["answers"]]
             for samples in (our_samples, their_samples)]  # fmt: skip
    assert texts[0] == texts[1]
    assert len({text for [[text]] in texts[0]}) > 4
    for one, other in zip(our_samples["pages"], their_samples["pages"], strict=True):
        assert one["resps"][0][0] == pytest.approx(other["resps"][0][0], abs=1e-4)


def test_base_and_adapter_are_told_apart(place):
    (base,), (tuned,) = (
        ours(place, voice=voice).loglikelihood(requests("loglikelihood", ("One", " two.")))
        for voice in ("base", "tuned")
    )
    assert abs(base[0] - tuned[0]) > 1e-2


def test_odd_requests_are_read_as_hf_reads_them(pair):
    """BOS, spaces at the border, special tokens in a text, and contexts that are too long."""
    found, peer = pair
    ending = {"until": ["."], "max_gen_toks": 20}
    (written,) = found.generate_until(
        requests("generate_until", ("The young of the cow is", ending))
    )
    assert written
    odd = requests(
        "loglikelihood",
        ("", "The capital of France is Paris."),
        ("The capital of France is ", "Paris"),
        ("<s>The capital of France is", " Paris"),
        ("The young of the cow is", f" {written.strip()}"),
        ("The capital of Spain is Madrid.\n" * 12, "The capital of Spain is Madrid."),
        ("Which letter </s> does push begin with?", " p"),
        *(("Which letter does push begin with?", f" {letter}") for letter in "abcpqrxyz"),
    )
    both = [lm.loglikelihood(odd) for lm in pair]
    for request, (logprob, greedy), (expected, theirs) in zip(odd, *both, strict=True):
        assert logprob == pytest.approx(expected, abs=1e-4), request.args
        assert greedy == theirs
    assert {greedy for _, greedy in both[0]} == {False, True}
    for text in ("", "Hello", "<s>Hello", "a  b ", "ö\n"):
        assert found.tok_encode(text) == peer.tok_encode(text), text


def test_an_answer_ends_at_its_stop_string_its_budget_or_its_end_token(pair):
    kwargs = [
        {"until": ["\n", "."]},
        {"until": "is", "max_gen_toks": 5},
        {"until": [], "max_gen_toks": 9},
        {"do_sample": False, "temperature": 0.7},
        {"until": ["the", " of"]},
    ]
    texts = ("The capital of France", "What is a young pigeon called?\n", "The colour of coal")
    odd = requests(
        "generate_until",
        *((text, {"max_gen_toks": 20} | asked) for text in texts for asked in kwargs),
    )
    answers = [lm.generate_until(odd) for lm in pair]
    assert answers[0] == answers[1]
    assert not any("is" in answer for answer in answers[0][1::5])


def test_samples_depend_on_their_place_and_cuts_are_honoured(place):
    found = ours(place)
    kwargs = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    same = requests("generate_until", *[("The", kwargs)] * 6)
    answers = found.generate_until(same)
    assert len(set(answers)) > 3
    found.batch_size = 3
    assert found.generate_until(same) == answers
    greedy = requests("generate_until", *[("The", kwargs | {"top_k": 1})] * 3)
    assert len(set(found.generate_until(greedy))) == 1


def test_requests_that_differ_in_their_last_token_are_read_once(place, monkeypatch):
    from eval.harness import continuations

    found, read = ours(place), []
    run = continuations.hidden
    monkeypatch.setattr(continuations, "hidden", lambda *a, **k: read.append(1) or run(*a, **k))
    letters = [("Which letter does push begin with?", f" {letter}") for letter in "abcdefgh"]
    found.loglikelihood(requests("loglikelihood", *letters))
    assert len(read) == 1  # eight requests, four at a time


@pytest.fixture(scope="module")
def run(place):
    train([
        "--model", str(place / "model"), "--data", str(bundled.ROWS), "--max-steps", "4",
        "--max-seq-len", "64", "--precision", "fp32", "--output-dir", str(place / "run"),
    ])  # fmt: skip
    return place / "run"


def test_the_command_asks_both_from_one_compilation_and_the_report_shows_it(place, run, capsys):
    from eval.likelihood import hidden

    hidden.clear_cache()
    harness([
        "--run", str(run), "--tasks", "choices,answers", "--include-path", str(place / "tasks"),
        "--limit", "6", "--num-fewshot", "0",
    ])  # fmt: skip
    assert hidden._cache_size() == 1
    shown = capsys.readouterr().out
    assert shown.rstrip().splitlines()[-1] == f"wrote {run / 'harness.json'}"
    result = read_sealed(run / "harness.json", "")
    (acc, _, exact) = result["results"]
    assert (acc["task"], acc["metric"], exact["metric"]) == ("choices", "acc", "exact_match")
    assert (acc["samples"], acc["few_shot"], acc["higher_is_better"]) == (6, 0, True)
    for who in ("base", "tuned"):
        share = acc[who]["value"]
        assert acc[who]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 5))
        assert f"{share:.4f} ± " in shown
    lm = ours(place, adapter=run / "adapter")
    alone = asked(place, lm, "choices", limit=6, num_fewshot=0)
    assert alone["results"]["choices"]["acc,none"] == acc["tuned"]["value"]

    report(["--run", str(run), "--only-read"])
    page = Page((run / "report.html").read_text())
    assert "Tasks" in page.headings
    sources = [json.loads(attributes["data-source"]) for attributes, _ in page.data]
    of_tasks = [x for x in sources if x.get("file") == "harness.json"]
    assert {follow(run, x) for x in of_tasks} >= {acc["base"]["value"], acc["tuned"]["stderr"], 6}
    write_sealed(run / "harness.json", result | {"tuned_sha256": "of another"})
    report(["--run", str(run), "--only-read"])
    assert "harness.json is of another adapter" in (run / "report.html").read_text()


def test_a_chat_template_is_that_of_the_training(place, run):
    found = ours(place, adapter=run / "adapter")
    text = found.apply_chat_template([{"role": "user", "content": "Say 3."}])
    assert text == "<s>Say 3.\n"
    assert found.tok_encode(text) == [1, *load_tokenizer(place / "model").encode("Say 3.\n")]
    with pytest.raises(InputError, match="gen_prefix"):
        found.apply_chat_template([{"role": "assistant", "content": "3"}], False)
    with pytest.raises(InputError, match="no chat template; name one"):
        ours(place).apply_chat_template([{"role": "user", "content": "Say 3."}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "choice"], "no task 'choice'; did you mean choices?"),
        ([], "--tasks wants the names of tasks"),
        (["--tasks", "choices", "--prompt-style", "alpaca"], "a task writes its own prompts"),
        (["--tasks", "choices", "--include-path", "nowhere"], "nowhere: no such folder"),
        (["--tasks", "choices", "--output", "no/a.json"], "--output wants a file in a folder"),
        (["--tasks", "choices", "--apply-chat-template"], "has no chat template; give --prompt"),
    ],
)
def test_wrong_input_is_refused(place, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "--include-path" not in arguments:
        arguments = [*arguments, "--include-path", str(place / "tasks")]
    with pytest.raises(SystemExit) as ended:
        harness(["--model", str(place / "model"), *arguments])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_requests_that_cannot_be_honoured_are_refused(place):
    found = ours(place)
    found.max_length = 8
    for kind, arguments, message in (
        ("generate_until", ("a", {"until": [], "num_beams": 4}), "num_beams: expected until"),
        ("generate_until", ("a", {"max_gen_toks": 8}), "leaves a prompt no room in a context of 8"),
        ("loglikelihood", ("a", " word" * 9), "no more than the context, 8"),
        ("loglikelihood", ("a", ""), "has 0 tokens; a continuation must have some"),
    ):
        with pytest.raises(InputError, match=message):
            getattr(found, kind)(requests(kind, arguments))
    for arguments, message in (
        ({"voice": "tuned", "adapter": ""}, "voice=tuned, expected base, or tuned where"),
        ({"vice": "base"}, "--model_args: vice is no such field"),
        ({"batch_size": "auto"}, "batch_size auto, expected a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            ours(place, **arguments)


def test_lm_evals_own_command_line_knows_jllama(place, monkeypatch, capsys):
    from eval.harness.cli import main

    model = f"model={place / 'model'},adapter={place / 'adapter'}"
    words = ["lm_eval", "--model", "jllama", "--model_args", model, "--tasks", "pages",
             "--include_path", str(place / "tasks"), "--limit", "1"]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    main()
    shown = capsys.readouterr().out
    assert "tuned: likelihood 1/1 batches" in shown
    assert "|word_perplexity|" in shown.replace(" ", "")
    monkeypatch.setattr("sys.argv", [*words[:4], "model=nowhere", *words[5:]])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "nowhere" in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("eval.harness.command.installed_version", lambda name: "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        harness(["--tasks", "arc_easy"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "jllama harness: this needs lm-evaluation-harness, which is not installed: "
        "pip install 'jllama[lm-eval]'\n"
    )


@pytest.mark.parametrize("make", [chatml, saved_again, alpaca, llama3, smollm, deepseek])
def test_bos_comes_first_as_transformers_puts_it_there(make, tmp_path):
    folder = make(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    first = theirs.encode("Hello")[0]
    assert adds_bos(tokenizer_files(folder), folder) == (first == theirs.bos_token_id)


@pytest.mark.parametrize("adds", [True, False, None])
def test_bos_comes_first_where_hugging_faces_tokenizer_adds_it(adds, folders, tmp_path):
    """Of a tokenizer.json, and of a SentencePiece model with a tokenizer_config.json alone."""
    export = Path(shutil.copytree(folders / "export", tmp_path / "export"))
    if adds is not None:
        content = json.loads((export / "tokenizer.json").read_text())
        if not adds:
            content["post_processor"] = None
        (export / "tokenizer.json").write_text(json.dumps(content))
    files = tokenizer_files(export)
    ids = transformers.AutoTokenizer.from_pretrained(export).encode("Hello")
    assert adds_bos(files, export) == (ids[0] == 1)
    words = json.dumps({} if adds is None else {"add_bos_token": adds}).encode()
    alone = {"tokenizer.model": b"", "tokenizer_config.json": words}
    assert adds_bos(alone, export) == (adds is not False)
