"""The files that people have: packed, in any encoding, cut at anything, JSON as it comes, tables."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.config import DataConfig
from edge_agent.samples.json_lines import JsonLines
from edge_agent.samples.rows import MAX_ROW_BYTES, RowParser
from edge_agent.samples.sample import Row
from edge_agent.samples.sources import open_source, read_evaluation
from sidestream.contract.errors import ConfigError, DataError

PAIRS = [("turn it on", "an"), ("größer, bitte", "wärmer"), ("off", "aus")]


def read(path: Path, **settings: Any) -> list[tuple[str, str | None]]:
    source = open_source(DataConfig(path=str(path), **settings))
    return [(one.row.text, one.label) for one in source.read() if not one.broken]


def as_csv(delimiter: str = ",") -> str:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter).writerows([("text", "label"), *PAIRS])
    return file.getvalue()


def as_lines() -> str:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in PAIRS)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_what_columns_are_cut_at_is_found(tmp_path: Path, name: str, delimiter: str) -> None:
    (tmp_path / name).write_text(as_csv(delimiter), "utf-8")
    assert read(tmp_path / name) == PAIRS


def test_a_comma_within_the_header_of_a_file_cut_at_semicolons_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('"id, of the row";text;label\n1;one, two;on\n')
    assert read(path) == [("one, two", "on")]


def test_what_columns_are_cut_at_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text^label\none, two^on\n")
    assert read(path, delimiter="^") == [("one, two", "on")]
    path.write_text("text\tlabel\none\ton\n")
    assert read(path, delimiter="tab") == [("one", "on")]
    path.write_text("text^label\none^on\n")
    with pytest.raises(DataError, match=r"cut at something else than ',', set data\.delimiter"):
        read(path)


def test_a_column_that_is_missing_is_told_with_those_there_are_whatever_they_are_cut_at(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("satz;klasse\neins;an\n")
    with pytest.raises(DataError, match=r"no column 'text' in .*; it has: satz, klasse"):
        read(path)
    assert read(path, text_column="satz", label_column="klasse") == [("eins", "an")]


@pytest.mark.parametrize("value", ["ab", '"', "\n"])
def test_a_delimiter_is_one_character(value: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.delimiter"):
        DataConfig(delimiter=value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_file_whose_mark_says_what_it_is_in_is_read(tmp_path: Path, encoding: str) -> None:
    for name, text in (("a.csv", as_csv()), ("a.jsonl", as_lines())):
        (tmp_path / name).write_text(text, encoding)
        assert read(tmp_path / name) == PAIRS


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16-le", "utf-16-be", "utf-8"])
def test_an_encoding_can_be_said(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(as_csv(), encoding)
    assert read(path, encoding=encoding) == PAIRS


@pytest.mark.parametrize("guess", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_refused_with_the_way_to_read_it(tmp_path: Path, guess: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(as_csv(), guess)
    with pytest.raises(DataError, match=f'seems to be UTF-16.*set data.encoding = "{guess}"'):
        read(path)


def test_rows_that_are_in_another_encoding_are_broken_and_say_how_to_mend_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\none,on\ngrößer,an\n".encode("latin-1"))
    assert read(path) == [("one", "on")]
    assert "line 3" in caplog.text and "data.encoding" in caplog.text
    path.write_bytes(b"text,label\none,on\n\x81,an\ntwo,off\n")
    assert read(path, encoding="cp1252") == [("one", "on"), ("two", "off")]


@pytest.mark.parametrize("name", ["nonsense", "base64", "rot13"])
def test_what_is_no_encoding_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.encoding"):
        DataConfig(encoding=name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_packed_files_are_read_and_those_packed_in_pieces_too(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(as_csv().encode(encoding)))
    assert read(tmp_path / "a.csv.gz") == PAIRS
    lines = as_lines().encode().splitlines(keepends=True)
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    assert read(tmp_path / "b.jsonl.gz") == PAIRS
    assert len(read(tmp_path)) == 6, "in a folder"


def test_a_packed_file_that_is_damaged_is_told(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(as_csv().encode() * 50))
    packed[20] ^= 0xFF
    (tmp_path / "a.csv.gz").write_bytes(packed)
    with pytest.raises(DataError, match="packed by gzip, and damaged"):
        read(tmp_path / "a.csv.gz")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(as_csv().encode() * 50)[:-9])
    with pytest.raises(DataError, match="breaks off before its end"):
        read(tmp_path / "b.csv.gz")


def test_a_file_of_which_nothing_can_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\nStraße,zu\nSüden,auf\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"no usable row in .*, the first not in the encoding"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (b"PK\x03\x04xl/", "ZIP archive, as spreadsheets are"),
        (b"BZh91AY", "packed by bzip2"),
        (b"\xfd7zXZ\x00", "packed by xz"),
        (b"PAR1\x15", "is Parquet"),
        (b"%PDF-1.7", "is a PDF"),
        (b"ab\0cdefgh", "holds zero bytes"),
    ],
)
def test_what_is_no_text_is_refused_by_what_it_is(tmp_path: Path, start: bytes, says: str) -> None:
    (tmp_path / "a.csv").write_bytes(start + b"\nmore\n" * 20)
    with pytest.raises(DataError, match=says):
        read(tmp_path / "a.csv")


# --- JSON ------------------------------------------------------------------------------------------------

OBJECTS = [{"text": text, "label": label} for text, label in PAIRS]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    "document",
    [
        json.dumps(OBJECTS),
        json.dumps(OBJECTS, indent=2),
        "[\n" + ",\n".join(map(json.dumps, OBJECTS)) + "\n]\n",
        json.dumps({"version": 1, "data": OBJECTS}),
        json.dumps({"version": 1, "data": OBJECTS}, indent=1),
        json.dumps({"text": [text for text, _ in PAIRS], "label": [label for _, label in PAIRS]}, indent=1),
        "\n".join(json.dumps(one, indent=1) for one in OBJECTS),
        "\n".join(map(json.dumps, OBJECTS)),
        json.dumps({name: [one[name] for one in OBJECTS] for name in OBJECTS[0]}),
    ],
    ids=[
        "array",
        "pretty-array",
        "row-a-line",
        "one-line-document",
        "document",
        "columns",
        "pretty-objects",
        "lines",
        "columns-in-a-line",
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_is_read_however_it_is_written(tmp_path: Path, name: str, document: str) -> None:
    (tmp_path / name).write_text(document)
    assert read(tmp_path / name) == PAIRS


@given(rows=st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), max_size=5), cuts=st.data())
def test_an_array_is_cut_at_its_elements_however_it_comes(rows: list[Any], cuts: st.DataObject) -> None:
    data = json.dumps(rows, indent=cuts.draw(st.sampled_from([None, 1]))).encode()
    places = [0, *sorted(cuts.draw(st.lists(st.integers(0, len(data)), max_size=5))), len(data)]
    lines = JsonLines("x", {"text"})
    made = b"".join(lines.feed(data[start:end]) for start, end in itertools.pairwise(places))
    made += lines.feed(b"", final=True)
    assert [json.loads(line) for line in made.splitlines() if line.strip()] == rows


def test_an_array_without_end_is_read_in_bounded_memory() -> None:
    parser = RowParser("x", "jsonl", "text", "label")
    rows = list(parser.feed(b'[{"text": "'))
    for _ in range(3 * MAX_ROW_BYTES // 4096):
        rows += parser.feed(b"a" * 4096)
    rows += parser.feed(b'"}, {"text": "b", "label": "c"}]', final=True)
    assert rows == [Row("b", "c")] and parser.broken == 1


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (
            '{"version": 1,\n "about": "nothing"}',
            "one JSON document, with version, about, and no list of objects",
        ),
        ('{"a": 1,\n "b": [1, 2', "neither one JSON object a line nor a JSON document"),
    ],
)
def test_a_document_without_rows_is_refused(tmp_path: Path, document: str, says: str) -> None:
    (tmp_path / "a.json").write_text(document)
    with pytest.raises(DataError, match=says):
        read(tmp_path / "a.json")


def test_a_first_line_that_is_broken_does_not_make_lines_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "label": }\n' + as_lines())
    assert read(tmp_path / "a.jsonl") == PAIRS


# --- tables ----------------------------------------------------------------------------------------------


@pytest.fixture
def arrow() -> Any:
    return pytest.importorskip("pyarrow")


def write_dataset(arrow: Any, folder: Path, pairs: Sequence[tuple[str, int]], names: list[str]) -> None:
    """As ``Dataset.save_to_disk`` does, in two files."""
    folder.mkdir(parents=True)
    files = []
    for number, some in enumerate((pairs[:2], pairs[2:])):
        table = arrow.table({"text": [text for text, _ in some], "label": [label for _, label in some]})
        files.append({"filename": f"data-{number:05}-of-00002.arrow"})
        with (
            arrow.OSFile(str(folder / files[-1]["filename"]), "wb") as file,
            arrow.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": names, "_type": "ClassLabel"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))


def test_parquet_is_read_in_a_file_and_in_a_folder(arrow: Any, tmp_path: Path) -> None:
    import pyarrow.parquet

    table = arrow.table({"id": [1, 2, 3], "text": [a for a, _ in PAIRS], "label": [b for _, b in PAIRS]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet") == PAIRS == read(tmp_path)
    config = DataConfig(evaluation_path=str(tmp_path / "a.parquet"))
    assert [row.text for row in read_evaluation(config, (0, 1))] == [text for text, _ in PAIRS]


def test_rows_of_a_table_that_are_no_text_are_broken_and_a_missing_column_is_told(
    arrow: Any, tmp_path: Path
) -> None:
    import pyarrow.parquet

    table = arrow.table({"text": ["a", None, "c"], "label": ["x", "y", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [("a", "x"), ("c", None)]
    with pytest.raises(DataError, match=r"no column 'satz' in .*; it has: text, label"):
        read(tmp_path / "a.parquet", text_column="satz")


def test_a_saved_dataset_is_read_with_the_names_of_its_labels(arrow: Any, tmp_path: Path) -> None:
    write_dataset(arrow, tmp_path / "data" / "train", [("a", 1), ("b", 0), ("c", -1)], ["off", "on"])
    assert read(tmp_path / "data" / "train") == [("a", "on"), ("b", "off"), ("c", None)]
    (tmp_path / "data" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"several splits: name one, as .*/SPLIT; it has: train"):
        read(tmp_path / "data")


def test_a_damaged_table_is_told_and_one_that_is_being_written_is_waited_for(
    arrow: Any, tmp_path: Path
) -> None:
    import pyarrow.parquet

    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        read(tmp_path / "a.parquet")
    source = open_source(DataConfig(path=str(tmp_path), watch=True))
    assert list(source.read()) == []
    table = arrow.table({"text": ["a"], "label": ["x"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [one.row.text for one in source.read()] == ["a"] and list(source.read()) == []


def test_without_pyarrow_a_table_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"takes pyarrow; pip install 'sidestream\[data\]'"):
        read(tmp_path / "a.parquet")


# --- labels ----------------------------------------------------------------------------------------------


def test_labels_equal_in_unicodes_normal_form_are_one(tmp_path: Path) -> None:
    composed, apart = "größe", "gro\u0308ße"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "a", "label": composed})
        + "\n"
        + json.dumps({"text": "b", "label": [apart, "x"]})
        + "\n"
    )
    (tmp_path / "b.csv").write_text(f"text,label\nc,{apart}\n", "utf-8")
    assert {label for _, label in read(tmp_path)} == {
        composed,
        json.dumps([apart.replace("o\u0308", "ö"), "x"], ensure_ascii=False),
    }


def test_a_mark_at_the_start_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(codecs.BOM_UTF8 + as_csv().encode())
    assert read(tmp_path / "a.csv") == PAIRS
