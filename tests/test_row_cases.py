"""The collected files of rows and prompts: each is read, warned about or refused."""

import pytest

import jllama
from eval.prompts import main as prompts
from jllama.text.row_file import read_rows
from train.data.lint.command import main as lint

pytestmark = pytest.mark.real


@pytest.fixture
def cases(assets):
    return assets.parent / "cases"


# What the lint says of each, and its exit code.
SAID = {
    "01-sharegpt-conversations.jsonl": (0, "⟦ The raven.</s>⟧"),
    "02-text-only.jsonl": (0, "Human: Which bird is black?"),
    "03-null-input.jsonl": (0, "duplicates: 1 rows occur more than once"),
    "07-huge-integer.jsonl": (1, "row 0: 'completion' is a number, expected text"),
    "09-openai-weight0.jsonl": (0, "five</s><s> Are you sure?⏎\n⟦ four</s>⟧"),
    "10-tool-calls.jsonl": (2, "prompt style plain does not know tool, tool_calls, tools"),
    "12-empty-middle-answer.jsonl": (1, "row 0: message 1: the answer is empty"),
    "14-ends-with-user.jsonl": (0, "1 rows end with a turn that nothing answers, which is dropped"),
    "16-system-and-history.jsonl": (0, "<s> Answer with one word."),
    "23-utf16.jsonl": (0, "⟦ red</s>⟧"),
    "30-wrapped-data.json": (0, "2 rows, no errors"),
    "34-csv.csv": (0, "rows, no errors"),
    "37-special-in-text.jsonl": (0, "2 rows spell out special tokens such as </s>"),
    "38-question-answer.jsonl": (0, "⟦ red</s>⟧"),
    "40-escape-sequences.jsonl": (0, "a<0x1B><0x5B>31mRED"),
    "51-single-object.json": (0, "1 rows, no errors"),
}


def test_every_file_has_a_verdict(cases):
    assert {file.name for file in (cases / "data").iterdir()} == SAID.keys()


@pytest.mark.parametrize("name", SAID)
def test_rows(name, cases, capsys):
    code, words = SAID[name]
    try:
        lint([str(cases / "data" / name)])
        ended = 0
    except SystemExit as end:
        ended = end.code
    heard = capsys.readouterr()
    assert ended == code
    assert words in heard.out + heard.err
    assert "\x1b" not in heard.out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("temp-text.json", "beside its rows: temperature hot, expected a number"),
        ("17th-too-long.json", "row 16: its prompt has "),
    ],
)
def test_prompts(name, words, cases, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    from convert.from_meta import FromMeta, convert

    convert(FromMeta(jllama.SAMPLE, tmp_path / "model"))
    monkeypatch.setattr(jllama, "load_model", lambda *_: pytest.fail("loaded"))
    file = cases / "prompts" / name
    with pytest.raises(SystemExit) as ended:
        prompts(["--model", str(tmp_path / "model"), "--prompts", str(file)])
    assert ended.value.code == 2
    assert f"{file}: {words}" in capsys.readouterr().err


def test_jsonl_is_read_whatever_its_name_ends_in(cases):
    assert len(read_rows(cases / "prompts" / "jsonl-named.json")) == 2
