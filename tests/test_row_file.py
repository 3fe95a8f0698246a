"""Files of rows: read by content whatever their name, or refused with rows, lines and formats."""

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import os
import sys
import time
import tracemalloc

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from jllama.errors import InputError
from jllama.text.messages import ignored, row_messages
from jllama.text.row_file import Rows, read_rows
from jllama.text.rows import answered
from jllama.text.scan.json_rows import Scan

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


def packed(pack):
    return lambda content: pack("\n".join(map(json.dumps, content)).encode())


def table(delimiter, encoding="utf-8"):
    """A table with a field of several lines, as a spreadsheet writes it."""

    def write(rows):
        text = io.StringIO(newline="")
        lines = csv.DictWriter(text, [*rows[0]], delimiter=delimiter)
        lines.writeheader()
        lines.writerows(rows)
        return text.getvalue().encode(encoding)

    return write


def arrow(write):
    def content(rows):
        sink = pyarrow.BufferOutputStream()
        write(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()

    return content


def stream(rows, sink):
    with pyarrow.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=1)


FORMATS = {
    "a.json.gz": packed(gzip.compress),
    "a.xz": packed(lzma.compress),
    "a.bz2": packed(bz2.compress),
    "a.csv": table(","),
    "a.tsv": table("\t"),
    "a.txt": table(";", "utf-8-sig"),
    "b.csv": table(",", "utf-16"),
    "a.csv.gz": lambda rows: gzip.compress(table(",")(rows)),
    "a.parquet": arrow(pyarrow.parquet.write_table),
    "a.feather": arrow(pyarrow.feather.write_feather),
    "a.arrow": arrow(stream),
}
TWO = [
    {"instruction": 'Add,\n "now"; é', "input": "2\t3", "output": "5"},
    {"instruction": "x", "input": "", "output": "☕"},
]


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_read_by_their_content(name, written):
    content = FORMATS[name](TWO)
    for shown in (name, "rows"):
        rows = read_rows(written(content, shown))
        assert isinstance(rows, Rows)
        assert list(rows) == TWO
        assert list(rows[1:]) == TWO[1:]


@pytest.mark.parametrize("name", ["a.csv", "A.TSV"])
def test_a_table_without_rows_is_named_as_one(name, written):
    with pytest.raises(InputError, match="read as CSV: no rows below the names"):
        read_rows(written(b"instruction,output\n", name))


def test_a_table_of_arrow_holds_conversations_and_what_is_ignored(written):
    turns = [
        {"role": "user", "content": "a", "weight": None},
        {"role": "assistant", "content": "b"},
    ]
    about = {"when": datetime.date(2026, 11, 27), "picture": b"\x00", "score": float("nan")}
    rows = read_rows(written(FORMATS["a.parquet"]([{"messages": turns} | about])))
    assert [message.content for message in row_messages(rows[0])] == ["a", "b"]
    assert ignored(rows[0]) == {"score"}  # what JSON has no word for is missing
    about["completion"] = about.pop("picture")
    with pytest.raises(InputError, match="no answer"):
        answered(
            row_messages(read_rows(written(FORMATS["a.parquet"]([about | {"prompt": "a"}])))[0])
        )


def test_a_folder_is_the_rows_of_its_files(written, tmp_path):
    for number, rows in enumerate((TWO[:1], TWO[1:])):
        written(FORMATS["a.parquet"](rows), f"train-0000{number}-of-00002.parquet")
    written(b"# a card", "README.md")
    written(b"\x00\x05\x16\x07", "._train-00000-of-00002.parquet")  # as macOS leaves them
    assert list(read_rows(tmp_path)) == TWO
    written(FORMATS["a.parquet"](TWO), "test-00000-of-00001.parquet")
    with pytest.raises(InputError, match="files for test and train; name a file"):
        read_rows(tmp_path)


def test_a_folder_of_the_datasets_package(written, tmp_path):
    files = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, rows in zip(files, (TWO[:1], TWO[1:]), strict=True):
        written(FORMATS["a.arrow"](rows), name)
    state = written(json.dumps({"_data_files": [{"filename": name} for name in files]}).encode(),
                    "state.json")  # fmt: skip
    assert list(read_rows(tmp_path)) == TWO
    for entries in ([{"filename": "../a"}], [], None, [{"filename": 3}]):
        state.write_text(json.dumps({"_data_files": entries}))
        with pytest.raises(InputError, match="names no files of rows in its folder"):
            read_rows(tmp_path)
    written(b'{"splits": ["train", "test"]}', "dataset_dict.json")
    with pytest.raises(InputError, match=r"name one of them: \['train', 'test'\]"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"PK\x03\x04", "a.xlsx", "Excel.* To convert it:\n  unzip .*read_excel"),
        (b"\x28\xb5\x2f\xfd", "a", "Zstandard.* To convert it:\n  zstd"),
        (b"PAR1\x15\x04", "a", "damaged Parquet"),
        (b"ARROW1\0\0", "a", "damaged Arrow"),
        (b"\xff\xff\xff\xff\x10", "a", "damaged Arrow"),
        (b"BZh9", "a", "damaged bzip2"),
        (b"\x1f\x8b\x08", "a", "damaged gzip"),
        (gzip.compress(b'{"prompt": "a"}', mtime=0)[:-1], "a", "damaged gzip"),
        (b"\xfd7zXZ\x00", "a", "damaged xz"),
        (gzip.compress(bytes(2**20), mtime=0), "a", "invalid JSON"),
        (b"a,b\n1,2,3\n4,5,6\n", "a", "line 2: more fields than the 2 names\n  line 3"),
        (b'a,b\n"1', "a", "line 2: unexpected end of data"),
        (b"a,a\n1,2\n", "a", "several columns are named a"),
        (b"a,b\n", "a.csv", "no rows below the names"),
        (b"a,b\n\xff,\n", "a.csv", "not UTF-8"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_another_format_is_one_message(content, name, message, written):
    file = written(content, name)
    with pytest.raises(InputError, match=message) as error:
        read_rows(file)
    assert str(file) in str(error.value)


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(written, monkeypatch):
    monkeypatch.setattr("jllama.text.row_formats._SMALL", 2**20)
    with pytest.raises(InputError, match="holds no text"):
        read_rows(written(gzip.compress(bytes(2**26))))


def test_without_pyarrow_the_extra_is_named(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="read by pyarrow; run: pip install pyarrow"):
        read_rows(written(FORMATS["a.parquet"](TWO)))


def test_columns_get_names(written):
    row = {"q": "Add.", "prompt": "no", "a": "5", "more": 1}
    rows = read_rows(written(json.dumps(row).encode()), "prompt=q, completion=a")
    assert rows[0] == {"prompt": "Add.", "completion": "5", "more": 1}
    assert rows[:1][0] == rows[0]
    swapped = read_rows(written(b'{"prompt": "5", "completion": "Add."}'),
                        "prompt=completion,completion=prompt")  # fmt: skip
    assert swapped[0] == {"prompt": "Add.", "completion": "5"}
    for columns, message in {
        "prompt=b": "no row has the column b; found: a, more, prompt, q",
        "quest=q": "columns quest=q: expected NAME=COLUMN",
        "prompt": "expected NAME=COLUMN",
        "prompt=q,prompt=a": "each once",
    }.items():
        with pytest.raises(InputError, match=message):
            read_rows(written(json.dumps(row).encode()), columns)


def test_pipes_and_folders_are_no_files_of_rows(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "pipe", "a named pipe"), (tmp_path, "a folder"),
                          ("/dev/zero", "a device"), ("a\0b", "null")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            read_rows(path)


TEXTS = [
    '[{"a": 1}, {"b": [1, 2]},  {"c": "☕"}] ', '{"a": 1}\n{"b": "x\\ny"}\n\n {"c": 12.5}\n',
    '{"about": {"x": [1]}, "data": [ {"a": 1} , {"b": 2}], "more": 12}', '{"data": []}',
    '{"rows":   [{"a": 1}]}', '{"data": [1, 2]}', '[{"a": 1} {"b": 2}]', '[{"a": 1}, 12, {"b": 2}]',
    '{"a": 1}\n{"b": \n{"c": 3}\n12\n"x"\n', '[{"a": 1}] x', '{"a": 1}{"b": 2} {"c": 3}', "12 34",
    '{"a": 1, "a": 2}\n{"b": 2}', '[{"a": 1},', '[{"a": "' + "x" * 70 + '"}]', " \n \n", "",
    "[" * 20_000,
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_scan_in_parts_finds_what_a_scan_of_the_whole_text_does(text):
    content = text.encode()
    whole = Scan(content)
    whole.file()
    for window in (1, 2, 3, 5, 8, 13, 64):
        scan = Scan(content, window)
        scan.file()
        assert (scan.spans, scan.problems, scan.beside) == (
            whole.spans, whole.problems, whole.beside,
        )  # fmt: skip


def test_a_scan_holds_no_second_copy_of_the_text():
    content = b'{"prompt": "' + b"x" * 1000 + b'"}\n'
    content *= 2000
    tracemalloc.start()
    try:
        Scan(content, 2**14).file()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(content) / 10
