"""What reaches a terminal: never a control character of a file, in any locale, at any width."""

import io
import subprocess
import sys
import unicodedata

import pytest
from rich.text import Text

from jllama.cli import script, terminal
from jllama.cli.terminal import (
    Progress,
    command_line,
    complain,
    console,
    print_json,
    quoted,
    show_table,
    to_any_reader,
    visible,
)

# Colours, the title, a link (OSC 8), a bell, C1, other line ends, marks that turn the line.
HOSTILE = (
    "a\x1b[31m\x1b]0;owned\x07\x1b]8;;http://x\x1b\\b\x9b2J\x7f\r\u2028\u2029\u202ec\u2066d\x00"
)


def commands_in(text):
    """What a terminal would obey: control and format characters, but for tab and line end."""
    return [
        x for x in text if unicodedata.category(x) in ("Cc", "Cf", "Zl", "Zp") and x not in "\n\t"
    ]


def test_control_characters_are_made_visible():
    assert visible("a\x1b[31m\tb\n\x07\x9b") == "a␛[31m\tb\n␇\ufffd"
    assert visible("a\rb\u2028c\u2029d\u202ee\u2066f\x7f") == "a␍b␤c␤d\ufffde\ufffdf␡"
    assert visible("é 日 😀") == "é 日 😀"
    assert not commands_in(visible(HOSTILE))


@pytest.mark.parametrize(
    "show",
    [
        console.print,
        complain,
        lambda text: console.print(Text(text)),
        lambda text: console.print(text, end=""),
        lambda text: show_table(["name", text], [["a", text], ["b", text]], text),
        lambda text: show_table(["", ""], [["a", text]]),
        lambda text: Progress(text, 1, "steps", note=text).__enter__().advance(text),
    ],
)
def test_no_way_of_printing_passes_on_what_commands_a_terminal(show, capsys):
    show(HOSTILE)
    said = capsys.readouterr()
    assert "owned" in said.out + said.err
    assert commands_in(said.out + said.err) == []


def test_a_line_end_in_a_name_begins_no_line_of_its_own(capsys):
    complain("jllama train: a\njllama train: wrote adapter/\n  b: wrong")
    assert capsys.readouterr().err.splitlines() == [
        "jllama train: a", "  jllama train: wrote adapter/", "  b: wrong",
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["my model", "it's", "a\nb", HOSTILE.replace("\x00", ""), "é\t\\"])
def test_a_hint_is_what_a_shell_takes_and_a_terminal_shows(word):
    line = quoted("printf", "%s", word)
    assert commands_in(line) == []
    assert "\n" not in line
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True,
                          env={"LC_ALL": "C.UTF-8"})  # fmt: skip
    assert done.stdout.decode() == word


def test_a_name_that_is_no_unicode_is_quoted_as_its_bytes():
    assert command_line("lint", "a\udcff") == "jllama lint $'a\\xff'"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_no_locale_refuses_a_character(encoding, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with to_any_reader():
        console.print("日\x1b ⟦\udcff⟧")
        show_table(["é", "b"], [["日" * 30, "⏎"]], "title")
        complain("ü 日")
        print_json({"a": "日"})
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert out.startswith("\\u65e5\\u241b \\u27e6\\udcff\\u27e7\n")
    assert "\\u65e5" in err
    with pytest.raises(SystemExit) as ended:
        script.main(["日本"])
    assert ended.value.code == 2


def table(capsys, monkeypatch, width, *arguments):
    monkeypatch.setattr(console, "_width", width)
    show_table(*arguments)
    return capsys.readouterr().out.splitlines()


WORDS = "The opposite of weak is strong, and that of small is large."


@pytest.mark.parametrize(("width", "records"), [(40, True), (80, True), (120, False)])
def test_a_table_becomes_records_where_its_text_would_be_narrow(
    width, records, capsys, monkeypatch
):
    rows = [[WORDS, WORDS, "3", WORDS], [WORDS, "a\nb", WORDS, WORDS]]
    lines = table(capsys, monkeypatch, width, ["prompt", "base", "tuned", "expected"], rows)
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("prompt    The opposite") == records
    if records:
        assert [line.split()[0] for line in lines if line[:1].strip()] == [
            "prompt", "base", "tuned", "expected",
        ] * 2  # fmt: skip
        text = " ".join(line[10:].strip() for line in lines)
        assert text.count(WORDS) == 6
        assert "          b" in map(str.rstrip, lines)  # its lines stay in their column


@pytest.mark.parametrize("width", [40, 80])
def test_numbers_and_settings_fit_any_width(width, capsys, monkeypatch):
    lines = table(
        capsys, monkeypatch, width, ["epoch", "average loss"], [["1", "2.5"], ["10", "12"]]
    )
    assert lines[3] == "│     1 │          2.5 │"
    pairs = [["gradient_accumulation_steps", "4"], ["model", "models/" + "m" * 60]]
    lines = table(capsys, monkeypatch, width, ["", ""], pairs, "settings")
    assert max(map(len, lines)) <= width
    assert "4" in next(line for line in lines if "gradient_accumulation_steps" in line)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_messages_stand_above_the_bar_that_shares_their_console(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "is_interactive", True)
    monkeypatch.setattr(console, "_width", 60)
    with Progress("train", 3, "steps", note="compiling the step") as progress:
        console.print("a message")
        progress.advance("loss [red] 2.5")
    said = out.getvalue()
    assert "compiling the step" in said
    assert "loss [red] 2.5" in said  # no markup
    before = said[: said.index("a message")]
    assert before.endswith("\x1b[2K")  # the bar's line was cleared for it
    assert terminal.console.file is out


def test_without_a_terminal_the_first_line_says_what_takes_so_long(capsys):
    with Progress("plan", 2, "programs", note="compiling steps") as progress:
        assert capsys.readouterr().out == "plan 0/2 programs  compiling steps\n"
        progress.advance()
    assert capsys.readouterr().out == "plan 1/2 programs\n"
