"""Files of rows: read by content whatever their name, or refused with rows, lines and formats."""

import gzip
import json
import os
import time

import pytest

from jllama.errors import InputError
from jllama.text.messages import row_messages
from jllama.text.row_file import Rows, read_rows

ROW = {"instruction": "Add.", "input": "2 3", "output": "5"}
LINES = (json.dumps(ROW), '{"prompt": "[ü☕\\\\\\" ,{", "completion": "é]"}')
PRETTY = json.dumps(ROW, indent=2)


@pytest.fixture
def written(tmp_path):
    """A file with this content."""

    def write(content: bytes, name: str = "rows"):
        file = tmp_path / name
        file.write_bytes(content)
        return file

    return write


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
@pytest.mark.parametrize(
    "text",
    [
        "[{}, {}]",
        " [\n\t{}\r\n,\n{}] \n",
        "\ufeff[{},{}]",
        "{}\n{}",
        "\n{}\r\n \n  {}\n\n",
        "\ufeff{}\n{}\n",
        "{} {}",
        "{}{}",
        '{"data": [{}, {}]}',
        ' {"about": [{"x": 1}], "prompts":\n[{}, {}], "n": 1}\n',
    ],
)
def test_rows_are_found_by_content_and_hold_text_alone(text, name, written):
    first, last = LINES
    rows = read_rows(written(text.replace("{}", first, 1).replace("{}", last).encode(), name))
    assert isinstance(rows, Rows)
    assert list(rows) == [json.loads(line) for line in LINES]
    assert list(rows[1:]) == [rows[1]]


@pytest.mark.parametrize("count", [1, 3])
def test_objects_over_many_lines_are_rows(count, written):
    assert list(read_rows(written("\n".join([PRETTY] * count).encode()))) == [ROW] * count


def test_what_stands_beside_the_rows_is_kept(written):
    rows = read_rows(written(b'{"temperature": 0, "prompts": [{"prompt": "a"}], "about": "b"}'))
    assert rows.beside == {"temperature": 0, "about": "b"}
    assert rows[:1].beside == rows.beside


@pytest.mark.parametrize("row", ['{"data": ["a", "b"]}', '{"prompt": "a", "data": [{}]} {"x": 1}'])
def test_a_row_with_such_a_column_is_a_row(row, written):
    assert read_rows(written(row.encode()))[0] == json.loads(row.partition(" {")[0] or row)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_other_encodings_of_unicode_are_read(encoding, written):
    rows = read_rows(written("\n".join(LINES).encode(encoding)))
    assert list(rows) == [json.loads(line) for line in LINES]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; expected rows"),
        (b" \n", "empty"),
        (b"[{]", r"row 0 \(line 1\): invalid JSON"),
        (
            b'{"prompt": "a"}\n{"prompt"\n{bad\n{"prompt": "b"}\n{"prompt": "c',
            r"row 1 \(line 2\): invalid JSON .*\n  row 2 \(line 3\): .*\n  row 4 \(line 5\): ",
        ),
        (b"[1, 2]", r"row 0 \(line 1\): a number, expected an object\n  row 1"),
        (b'["a", {"prompt": "b"}, null]', r"row 0 .*: text, expected .*\n  row 2 .*: null"),
        (b"[]", "no rows"),
        (b'{"data": []}', "no rows"),
        (b'{"data": [{"prompt": "a"}, {"prompt" 3}]}', r"row 1 \(line 1\): invalid JSON"),
        (b'[{"prompt": "\xff"}]', r"row 0 \(line 1\): byte 13 is not UTF-8"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', r"row 1 \(line 2\): byte 28 is not UTF-8"),
        (b'[{"prompt": "a"}\n {"prompt": "b"}]', r"row 1 \(line 2\): invalid JSON .*comma"),
        (b'[{"prompt": "a"},\n]', r"row 1 \(line 2\): invalid JSON"),
        (b'[{"prompt": "a"}\n] 1', r"\(line 2\): invalid JSON \(more behind the end"),
        (b'[{"prompt": "a"}', "row 1 .*: invalid JSON"),
        (b'{"prompt": "a"}\n7\n"b"', r"row 1 \(line 2\): a number.*\n  row 2 \(line 3\): text"),
        (b'{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}', "row 1 .*: the key 'prompt' twice"),
        (PRETTY.encode() + b"\n" + PRETTY[:-9].encode(), r"row 1 \(line 6\): invalid JSON .*line"),
        (b'{"a": ' + b"[" * 100_000, r"row 0 \(line 1\): nested too deeply"),
        (b"[" * 100_000, r"row 0 \(line 1\): nested too deeply"),
        (b'{"prompt": "a"}\n' + b'{"a":' * 100_000, r"row 1 \(line 2\): nested too deeply"),
    ],
)
def test_a_broken_file_is_named_with_rows_and_lines(content, message, written):
    file = written(content, "rows.json")
    start = time.monotonic()
    with pytest.raises(InputError, match=message) as error:
        read_rows(file)
    assert str(file) in str(error.value)
    assert time.monotonic() - start < 5


def test_many_wrong_rows_are_one_short_message(written):
    for content in (b"{bad}\n" * 5000, b"[" + b"1," * 5000 + b"1]", b'{"a": 1, "a": 2}\n' * 5000):
        with pytest.raises(InputError) as error:
            read_rows(written(content))
        assert len(str(error.value)) < 3000


def test_a_number_of_5000_digits_is_the_matter_of_its_row(written):
    rows = read_rows(written(b'{"prompt": 1' + b"0" * 5000 + b'}\n{"prompt": "a"}'))
    with pytest.raises(InputError, match="'prompt' is a number, expected text"):
        row_messages(rows[0])
    assert row_messages(rows[1])


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"instruction,input,output\nName a colour.,,red\n", "a.txt", ("CSV", "csv.DictReader")),
        (b"text\nabc\n", "a b.csv", ("CSV", "a b.csv'")),
        (b"PAR1\x15\x04", "a", ("Parquet", "read_parquet")),
        (b"ARROW1\0\0", "a", ("Arrow", "read_feather")),
        (b"\xff\xff\xff\xff\x10", "a", ("Arrow", "datasets")),
        (b"PK\x03\x04", "a.xlsx", ("Excel", "unzip", "read_excel")),
        (gzip.compress(b'{"prompt": "a"}', mtime=0), "a.jsonl", ("gzip", "gunzip --keep")),
        (b"\x28\xb5\x2f\xfd", "a", ("Zstandard", "zstd")),
        (b"BZh9", "a", ("bzip2", "bunzip2")),
    ],
)
def test_another_format_is_named_with_its_conversion(content, name, words, written):
    with pytest.raises(InputError, match="To convert it:") as error:
        read_rows(written(content, name))
    assert [word for word in words if word not in str(error.value)] == []


def test_the_conversion_of_csv_makes_rows(written, tmp_path):
    file = written('instruction,output\nA "b",é\n'.encode(), "a file.csv")
    with pytest.raises(InputError) as error:
        read_rows(file)
    command = str(error.value).splitlines()[-1]
    assert os.system(command.replace("python -c", "python3 -c")) == 0
    assert list(read_rows(f"{file}.jsonl")) == [{"instruction": 'A "b"', "output": "é"}]


def test_pipes_and_folders_are_no_files_of_rows(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "pipe", "a named pipe"), (tmp_path, "a folder"),
                          ("/dev/zero", "a device"), ("a\0b", "null")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            read_rows(path)
