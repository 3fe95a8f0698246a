"""The `jllama` script, and the child processes of commands."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from random_models import BASE, model_folder

from jllama import bundled
from jllama.cli import children, script
from jllama.cli.command import run_command
from jllama.cli.terminal import command_line
from jllama.errors import checked

TRAPS = ("train.py", "convert.py", "eval.py", "jllama.py", "json.py")


def run(*words, **how):
    command = [sys.executable, "-m", "jllama", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **how)


def test_every_command_is_named_with_what_it_does(capsys):
    script.main([])
    said = capsys.readouterr().out
    for name, command in script.COMMANDS.items():
        assert f"  {name} " in said
        assert command.does in said
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.integration
def test_the_version_is_told():
    assert run("--version").stdout.startswith("jllama 0.")


@pytest.mark.parametrize(
    ("word", "answer"),
    [("trian", "did you mean train?"), ("from-met", "did you mean from-meta?"),
     ("xyz", "choose from from-meta, ")],
)  # fmt: skip
def test_a_mistyped_command_is_answered_with_the_nearest(word, answer, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main([word])
    assert ended.value.code == 2
    assert answer in capsys.readouterr().err


@pytest.mark.integration
def test_help_needs_neither_jax_nor_torch():
    code = (
        "import sys\nfrom jllama.cli.script import main\nmain(['--help'])\n"
        "assert not {'jax', 'torch', 'flax', 'tyro'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.integration
def test_a_reader_that_goes_ends_a_command_silently():
    with subprocess.Popen(
        [sys.executable, "-m", "jllama", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout
        assert child.stderr
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


def test_hints_are_quoted_for_the_shell():
    assert command_line("train", "--model", Path("my models/a")) == (
        "jllama train --model 'my models/a'"
    )


@checked
class Nothing:
    """Settings of a command without flags."""


def ended(capsys, function):
    """The exit code of a command that does this, and what it says on stderr."""
    with pytest.raises(SystemExit) as end:
        run_command(lambda _: function(), Nothing, [], name="train", gpu=False)
    return end.value.code, capsys.readouterr().err


def raising(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (children.InputError("a\x1b\nb"), 2, "jllama train: a␛\n  b\n"),
        (OSError(27, "File too large"), 2, "jllama train: [Errno 27] File too large\n"),
        (MemoryError("Unable to allocate 9 GiB"), 2, "out of memory: Unable to allocate 9 GiB; "),
        (MemoryError(), 2, "out of memory: this process may take no more; use a smaller model"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes\nmore"), 2, "RESOURCE_EXHAUSTED: 9 bytes; "),
        (
            UnicodeEncodeError("utf-8", "a\udcc3", 1, 2, "surrogates not allowed"),
            2,
            r"a\udcc3: a name that is no text in this locale (utf-8); rename it, or set LC_ALL",
        ),
        (KeyboardInterrupt(), 130, "jllama train: interrupted\n"),
    ],
)
def test_a_failure_that_is_nobodys_mistake_is_one_message(error, code, message, capsys):
    found, said = ended(capsys, raising(error))
    assert found == code
    assert message in said
    assert "Traceback" not in said


def test_a_mistake_of_ours_is_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(lambda _: raising(RuntimeError("a bug"))(), Nothing, [], name="x", gpu=False)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_without_its_children_and_files(
    number, code, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started = []
    popen = subprocess.Popen

    def noted(*arguments, **how):
        started.append(popen(*arguments, **how))
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)

    def measure():
        with tempfile.TemporaryDirectory():
            children.Children().run("timeit", ["-n", "1", "-r", "1", "import time; time.sleep(60)"])

    before = signal.getsignal(number)
    found, said = ended(capsys, measure)
    assert (found, said) == (code, "")
    assert started[0].returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before


def test_an_ignored_hangup_stays_ignored():  # nohup
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run_command(lambda _: os.kill(os.getpid(), signal.SIGHUP), Nothing, [], name="x", gpu=False)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def traps(tmp_path, monkeypatch):
    """A working directory of files that must not be taken for modules; says whether one was."""
    for name in TRAPS:
        (tmp_path / name).write_text("open('executed', 'w').close()\nraise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    return (tmp_path / "executed").exists


@pytest.mark.integration
def test_the_sample_is_converted_whatever_lies_in_the_working_directory(traps):
    bundled.convert_sample(Path("models/sample"))
    assert Path("models/sample/manifest.json").is_file()
    assert not traps()


@pytest.mark.integration
def test_commands_run_whatever_lies_in_the_working_directory(traps, tmp_path):
    """Those that start children, and those that only might be mistaken."""
    model_folder(tmp_path, BASE | {"n_layers": 1})
    rows = [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(8)]
    Path("rows.json").write_text(json.dumps(rows))
    data = ["--model", "model", "--data", "rows.json", "--max-seq-len", "32"]
    once = ["--precision", "fp32", "--accumulation", "1", "--remat", "none", "--tune", "lora",
            "--steps", "2", "--sequences", "2", "--repeats", "1", "--val-size", "2"]  # fmt: skip
    speed = ["--model", "model", "--prompt-tokens", "5", "--new-tokens", "8", "--batch-size", "1",
             "--threads", "1", "--repeats", "1"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for words in (
        ["train", *data, "--epochs", "1", "--output-dir", "run"],
        ["plan", "--model", "model", "--max-seq-len", "32"],
        ["ablate", *data, *once, "--output", "ablation"],
        ["report", "--run", "run", "--ablation", "ablation", "--only-read"],
        ["speed", "generate", *speed],
    ):
        done = subprocess.run(
            [Path(sys.executable).with_name("jllama"), *words], capture_output=True, text=True,
            check=False, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not traps(), words


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_children_and_theirs_end_with_their_parent(number):
    def starts(code):
        """A program that starts a child of ours, which runs another program."""
        words = ["-n", "1", "-r", "1", code]
        return (
            "import os, subprocess\nfrom jllama.cli import children\n"
            f"print(os.getpid(), flush=True)\nsubprocess.run(children.command('timeit', {words}))"
        )

    inner = starts("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", starts(inner)], stdout=subprocess.PIPE) as process:
        assert process.stdout
        family = [int(process.stdout.readline()) for _ in range(3)]
        assert len(set(family)) == 3
        process.send_signal(number)
        process.wait(10)
    for _ in range(100):
        if not any(map(alive, family)):
            return
        time.sleep(0.1)
    pytest.fail(f"of {family} some live on")


def test_a_child_is_heard_line_by_line():
    heard = []
    done = children.Children().run("jllama", ["--help"], heard=heard.append)
    assert done.output == "".join(heard)
    assert heard[0] == "usage: jllama COMMAND [--help] ...\n"


def alive(number: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.integration
def test_what_a_child_says_is_heard():
    assert children.run("jllama", ["--version"]).startswith("jllama ")
    with pytest.raises(children.InputError, match="no command 'trian'"):
        children.run("jllama", ["trian"])
    done = children.Children().run("jllama", ["trian"])
    assert (done.code, done.reason[:7]) == (2, "jllama:")
