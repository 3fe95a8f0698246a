"""The talking command, line by line; what it hands to `jllama.stream` is recorded on the way."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from random_models import BASE, model_folder

import jllama
from eval.chat import main
from jllama.folders.manifest import file_sha256, read_sealed, write_sealed
from jllama.text.prompt import Message, encode, prompt_ids, render
from train.lora import main as train

pytestmark = pytest.mark.integration

CONTEXT = 256
DEFAULTS = {
    "sampling": jllama.Sampling(temperature=0.6, top_p=0.9),
    "max_new_tokens": 256,
    "seed": 0,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    model_folder(root, BASE | {"max_seq_len": CONTEXT}, seed=9)  # one that talks; some stop at once
    rows = [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(8)]
    (root / "rows.json").write_text(json.dumps(rows))
    for tune in ("lora", "full"):
        train([
            "--model", str(root / "model"), "--data", str(root / "rows.json"), "--tune", tune,
            "--precision", "fp32", "--output-dir", str(root / tune), "--prompt-style", "report",
            "--max-seq-len", "64", "--epochs", "8", "--learning-rate", "0.02", "--seed", "2",
        ])  # fmt: skip
    return root


@pytest.fixture
def heard(monkeypatch):
    """A row for every answer: what was asked of the model, and its text."""
    rows, real = [], jllama.stream

    def stream(model, tokenizer, prompt, max_new_tokens, sampling, *, seed, adapter_scale):
        row = {"prompt": list(prompt), "max_new_tokens": max_new_tokens, "sampling": sampling}
        rows.append(row | {"seed": seed, "scale": adapter_scale, "text": ""})
        pieces = real(
            model, tokenizer, prompt, max_new_tokens, sampling, seed=seed,
            adapter_scale=adapter_scale, chunk=2,
        )  # fmt: skip
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                return end.value
            rows[-1]["text"] += piece
            yield piece

    monkeypatch.setattr(jllama, "stream", stream)
    return rows


@pytest.fixture
def talk(place, monkeypatch, capsys):
    """Lines in, what was printed out; of the LoRA run, greedy and short unless told otherwise."""

    def run(*lines, arguments=("--temperature", "0", "--max-new-tokens", "8"), of="lora"):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        capsys.readouterr()
        main(["--run", str(place / of), *arguments])
        return capsys.readouterr().out

    return run


def expected(folder, ids, adapter=None):
    """The greedy answer of a model loaded apart."""
    model, tokenizer = jllama.load_model(folder, "fp32"), jllama.load_tokenizer(folder)
    if adapter:
        jllama.load_adapter(model, adapter)
    greedy = jllama.Sampling(temperature=0)
    (new,) = jllama.generate(model, [ids], 8, greedy, stop_ids=tokenizer.stop_ids)
    return tokenizer.decode([token for token in new if token not in tokenizer.stop_ids])


def conversation(place, *turns):
    roles = ["user", "assistant"] * len(turns)
    messages = [Message(role, text) for role, text in zip(roles, turns, strict=False)]
    return encode(render("llama3-chat", messages), jllama.load_tokenizer(place / "model"))[0]


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_base_and_tuned_answer_as_the_models_alone(place, heard, talk, tune):
    talk("Say 3.", "/base", "Say 3.", "/tuned", "Say 3.", of=tune)
    tokenizer = jllama.load_tokenizer(place / "model")
    ids = prompt_ids("report", {"prompt": "Say 3."}, tokenizer)
    assert [row["prompt"] for row in heard] == [ids] * 3
    base = expected(place / "model", ids)
    if tune == "lora":
        tuned = expected(place / "model", ids, adapter=place / "lora" / "adapter")
    else:
        tuned = expected(place / "full" / "model", ids)
    assert base != tuned
    assert [row["text"] for row in heard] == [tuned, base, tuned]


def test_both_answer_from_one_history_that_keeps_the_tuned_answer(place, heard, talk):
    out = talk(
        "/both", "Say 3.", "Say 4.",
        arguments=["--prompt-style", "llama3-chat", "--temperature", "0", "--max-new-tokens", "8"],
    )  # fmt: skip
    assert [row["scale"] for row in heard] == [0, 1, 0, 1]
    assert [row["seed"] for row in heard] == [0, 0, 1, 1]
    assert heard[0]["text"] != heard[1]["text"] != ""
    second = conversation(place, "Say 3.", heard[1]["text"], "Say 4.")
    assert [row["prompt"] for row in heard[2:]] == [second, second]
    assert out.count("base: ") == out.count("tuned: ") == 2


def test_styles_without_turns_send_the_question_alone_and_say_so(heard, talk):
    out = talk("Say 3.", "Say 3.")
    assert heard[0]["prompt"] == heard[1]["prompt"]
    assert "[trained on rows of one question: each question is sent alone" in out
    out = talk("Say 3.", arguments=["--prompt-style", "llama3-chat", "--max-new-tokens", "4"])
    assert "sent alone" not in out


@pytest.mark.parametrize(
    ("rows", "prompts"),
    [("single", ["report", "report"]), ("several", ["report", "history"])],
)
def test_chat_keeps_history_wherever_training_did(
    place, tmp_path, heard, talk, rows, prompts, capsys
):
    turns = [{"role": role, "content": "Say 3."} for role in ("user", "assistant")]
    data = [{"messages": turns * (2 if rows == "several" else 1)}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(data))
    train([
        "--model", str(place / "model"), "--data", str(tmp_path / "rows.json"), "--precision",
        "fp32", "--output-dir", str(tmp_path / "run"), "--prompt-style", "report", "--epochs", "1",
        "--max-seq-len", "64", "--train-on-prompt",
    ])  # fmt: skip
    out = talk("Say 3.", "Say 4.", of=tmp_path / "run")
    tokenizer = jllama.load_tokenizer(place / "model")
    messages = [Message("user", "Say 3."), Message("assistant", heard[0]["text"])]
    asked = {
        "report": [Message("user", "Say 4.")],
        "history": [*messages, Message("user", "Say 4.")],
    }[prompts[1]]
    assert heard[1]["prompt"] == encode(render("report", asked), tokenizer)[0]
    assert ("sent alone" in out) == (rows == "single")
    own = ["--prompt-style", "plain", "--max-new-tokens", "4"]  # another style has seen no turns
    assert "sent alone" in talk("Say 3.", of=tmp_path / "run", arguments=own)


def test_one_question_may_go_to_both(heard, talk):
    out = talk("/both Say  3.", "Say 4.", "/base Say 5.", "Say 6.")
    assert [row["scale"] for row in heard] == [0, 1, 1, 0, 1]
    assert heard[0]["prompt"] == heard[1]["prompt"]
    assert out.count("base: ") == out.count("tuned: ") == 1


@pytest.mark.parametrize("style", ["report", "plain", "alpaca", "llama3-chat"])
def test_a_system_prompt_is_in_every_prompt_until_it_is_removed(place, heard, talk, style):
    arguments = ["--prompt-style", style, "--temperature", "0", "--max-new-tokens", "4",
                 "--system", "Be brief."]  # fmt: skip
    out = talk(
        "Say 3.", "/clear", "/system Be  kind.", "Say 3.", "/clear", "/system", "Say 3.",
        arguments=arguments,
    )  # fmt: skip
    tokenizer = jllama.load_tokenizer(place / "model")
    for row, system in zip(heard, ("Be brief.", "Be  kind.", ""), strict=True):
        messages = [Message("system", system)] if system else []
        messages.append(Message("user", "Say 3."))
        assert row["prompt"] == encode(render(style, messages), tokenizer)[0]
    assert "[no system prompt]" in out


def test_every_setting_reaches_the_next_answer(heard, talk):
    out = talk(
        "/set temperature 0.5", "/set top_p 0.8", "/set top_k 7", "/set min_p 0.1",
        "/set repetition_penalty 1.5", "/set max_new_tokens 3", "/set seed 9", "Say 3.", "/set",
        arguments=[],
    )  # fmt: skip
    assert heard[0]["sampling"] == jllama.Sampling(0.5, 7, 0.8, 0.1, 1.5)
    assert (heard[0]["max_new_tokens"], heard[0]["seed"]) == (3, 9)
    assert "temperature 0.5, top_p 0.8, top_k 7, min_p 0.1" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set top_p 2", "top_p 2, expected a number, above 0 and at most 1; it stays 0.9"),
        ("/set temperature warm", "temperature warm, expected a number, at least 0; it stays 0.6"),
        ("/set temperature inf", "temperature inf, expected a number, at least 0"),
        ("/set top_k 1.5", "top_k 1.5, expected a whole number, at least 0; it stays 0"),
        (
            "/set max_new_tokens 0",
            "max_new_tokens 0, expected a whole number, at least 1; it stays 256",
        ),
        ("/set seed -1", "seed -1, expected a whole number, at least 0"),
        (
            "/set top_k 99999999999",
            "top_k 99999999999, expected a whole number, at least 0 and at most 2147483647",
        ),
        ("/set colour red", "no setting colour; there are temperature, top_p, top_k, min_p, "),
        ("/set temprature 1", "no setting temprature; did you mean temperature?"),
        ("/set system x", "no setting system; there are temperature, top_p"),
        ("/set seed", "/set seed: expected a name and a value"),
        (
            "/hello there",
            "no command /hello; there are /base, /tuned, /both, /system, /set, /clear, /help",
        ),
    ],
)
def test_a_wrong_command_says_why_and_changes_nothing(heard, talk, line, message):
    assert message in talk(line, "Say 3.", arguments=[])
    assert {name: heard[0][name] for name in DEFAULTS} == DEFAULTS


def test_a_cut_answer_says_what_cut_it(place, heard, talk):
    arguments = ["--prompt-style", "llama3-chat", "--temperature", "0", "--max-new-tokens", "5"]
    out = talk("/base", "Say 3.", "/set max_new_tokens 300", "/clear", "Say 3.",
               arguments=arguments)  # fmt: skip
    room = CONTEXT - len(heard[1]["prompt"])
    assert heard[1]["text"].startswith(heard[0]["text"])
    said = [line for line in out.splitlines() if line.startswith("[cut")]
    assert said == [
        "[cut at 5 tokens; /set max_new_tokens changes that]",
        f"[cut at {room} tokens: the context is full; /clear makes room]",
    ]


def test_an_answer_that_ends_by_itself_is_not_called_cut(talk, monkeypatch):
    def ends(*_, **__):
        yield "3"
        return False

    monkeypatch.setattr(jllama, "stream", ends)
    assert "[cut" not in talk("Say 3.")


@pytest.mark.parametrize(
    ("data", "flags", "expected"),
    [("sample", [], 0.0), ("sample", ["--temperature", "0.4"], 0.4), ("other", [], 0.6)],
)
def test_a_run_on_the_sample_answers_greedily(place, tmp_path, heard, talk, data, flags, expected):
    run = shutil.copytree(place / "lora", tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    if data == "sample":
        config["data"] = str(jllama.SAMPLE / "train.json")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    record = read_sealed(run / "run.json", "")
    write_sealed(run / "run.json", record | {"config_sha256": file_sha256(run / "config.yaml")})
    out = talk("/set", "Say 3.", arguments=["--max-new-tokens", "2", *flags], of=run)
    assert f"temperature {expected}, " in out
    assert heard[0]["sampling"].temperature == expected


def test_a_turns_seed_is_its_number_and_a_cleared_history_starts_again(place, heard, talk):
    arguments = ["--prompt-style", "llama3-chat", "--seed", "5", "--max-new-tokens", "8"]
    talk("Say 3.", "", "Say 3.", "/clear", "Say 3.", "Say 3.", arguments=arguments)
    assert [row["seed"] for row in heard] == [5, 6, 5, 6]
    assert heard[:2] == heard[2:]
    assert heard[0]["prompt"] == conversation(place, "Say 3.")


def test_the_oldest_turns_go_when_the_context_is_full(place, heard, talk):
    questions = [letter * 60 for letter in "abcd"]
    arguments = ["--prompt-style", "llama3-chat", "--max-new-tokens", "8"]
    out = talk(*questions, arguments=arguments)
    texts = [row["text"] for row in heard]
    assert heard[1]["prompt"] == conversation(place, questions[0], texts[0], questions[1])
    assert heard[2]["prompt"] == conversation(place, questions[1], texts[1], questions[2])
    assert all(len(row["prompt"]) + 8 <= CONTEXT for row in heard)
    assert out.count(f"[oldest turns forgotten: 1; the context is {CONTEXT} tokens]") == 2


def test_turns_go_before_an_answer_has_no_room(place, heard, talk):
    first, second = "a" * 90, "b" * 90
    arguments = ["--prompt-style", "llama3-chat", "--max-new-tokens", "8"]
    talk(first, "/set max_new_tokens 100", second, arguments=arguments)
    assert len(conversation(place, first, heard[0]["text"], second)) < CONTEXT
    assert heard[1]["prompt"] == conversation(place, second)


def test_a_question_longer_than_the_context_is_refused_and_nothing_is_lost(place, heard, talk):
    arguments = ["--prompt-style", "llama3-chat", "--max-new-tokens", "8"]
    out = talk("Say 3.", "x" * 100_000, "Say 4.", arguments=arguments)
    assert "tokens, the context of the model is 256; ask a shorter one" in out
    assert "forgotten" not in out
    assert len(heard) == 2
    assert heard[1]["prompt"] == conversation(place, "Say 3.", heard[0]["text"], "Say 4.")


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(place, heard, talk, monkeypatch, pieces):
    recorded, answers = jllama.stream, []

    def interrupted(*arguments, **more):
        answers.append(arguments)
        stream = recorded(*arguments, **more)
        if len(answers) == 1:
            for _ in range(pieces):
                yield next(stream)
            raise KeyboardInterrupt
        yield from stream

    monkeypatch.setattr(jllama, "stream", interrupted)
    arguments = ["--prompt-style", "llama3-chat", "--max-new-tokens", "40", "--temperature", "0"]
    out = talk("Say 3.", "Say 4.", arguments=arguments)
    assert "[stopped]" in out
    kept = ["Say 3.", heard[0]["text"]] if pieces else []
    assert heard[-1]["prompt"] == conversation(place, *kept, "Say 4.")
    assert heard[-1]["text"]
    if pieces:
        talk("Say 3.", arguments=arguments)
        assert heard[-1]["text"].startswith(kept[1])
        assert len(heard[-1]["text"]) > len(kept[1])


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stdin", [Terminal, io.StringIO])
def test_ctrl_c_clears_the_line_of_a_terminal_and_ends_a_pipe(place, heard, monkeypatch, stdin):
    typed = iter([KeyboardInterrupt, "Say 3.", "/both", "Say 4.", KeyboardInterrupt])
    prompts = []

    def read(prompt):
        prompts.append(prompt)
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", stdin())
    arguments = ["--run", str(place / "lora"), "--max-new-tokens", "4"]
    if stdin is Terminal:
        main(arguments)
        assert len(heard) == 3
        assert prompts == ["tuned> "] * 3 + ["both> "] * 3
    else:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 130


def test_what_would_command_the_terminal_is_shown_as_pictures(talk, monkeypatch):
    monkeypatch.setattr(jllama, "stream", lambda *_, **__: iter(["é\x1b[31m", "\n\x9b日"]))
    assert "é␛[31m\n\ufffd日\n" in talk("Say 3.")


def test_a_model_alone_is_the_base(place, heard, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/tuned\n/both\nSay 3.\n/help\n/quit\nSay 4."))
    main(["--model", str(place / "model"), "--precision", "fp32", "--max-new-tokens", "4"])
    out = capsys.readouterr().out
    assert out.count("nothing tuned is loaded") == 2
    assert "/set NAME VALUE  changes" in out
    assert [row["scale"] for row in heard] == [0]


def test_a_pipe_takes_any_bytes_and_ends_with_them(place):
    text = "\n   \nécole 日本 😀?\n/école\n".encode() + b"wrong \xff byte\nlast"
    done = subprocess.run(
        [sys.executable, "-m", "eval.chat", "--run", place / "lora", "--max-new-tokens", "4"],
        input=text, capture_output=True, timeout=120, cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert "no command /école; there are" in done.stdout.decode()


def test_a_style_that_the_tokenizer_lacks_ends_before_the_first_question(capsys):
    sample = ["--model", str(jllama.SAMPLE), "--prompt-style", "llama3-chat"]
    with pytest.raises(SystemExit) as ended:
        main(sample)
    assert ended.value.code == 2
    assert "choose a prompt style without it" in capsys.readouterr().err
