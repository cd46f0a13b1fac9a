from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import re
import unicodedata
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.samples.rows import MAX_ROW_BYTES, Format, RowParser
from edge_agent.samples.sample import Row
from sidestream.contract.errors import DataError

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
ROWS = st.lists(st.tuples(TEXTS, TEXTS.filter(lambda text: bool(text.strip()))), min_size=1, max_size=8)


def nfc(label: str) -> str:
    """As labels are kept."""
    return unicodedata.normalize("NFC", label).strip()


def parse(data: bytes, kind: Format, cuts: Sequence[int] = ()) -> tuple[list[Row], RowParser]:
    """Feed ``data`` in the pieces that ``cuts`` make of it."""
    parser = RowParser("x", kind, "text", "label", "text_pair")
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    rows = [row for start, end in itertools.pairwise(places) for row in parser.feed(data[start:end])]
    return [*rows, *parser.feed(b"", final=True)], parser


def as_jsonl(rows: Sequence[tuple[str, str]]) -> bytes:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows).encode()


def as_csv(rows: Sequence[tuple[str, str]]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=csv.QUOTE_ALL)
    writer.writerows([("id", "text", "label"), *((number, *row) for number, row in enumerate(rows))])
    return file.getvalue().encode()


@pytest.mark.slow
@given(rows=ROWS, cuts=st.lists(st.integers(0, 10_000), max_size=6))
def test_jsonl_comes_out_as_it_went_in_however_it_is_cut(
    rows: list[tuple[str, str]], cuts: list[int]
) -> None:
    assert parse(as_jsonl(rows), "jsonl", cuts)[0] == [Row(text, nfc(label)) for text, label in rows]


@given(rows=ROWS, cuts=st.lists(st.integers(0, 10_000), max_size=6))
def test_csv_comes_out_as_it_went_in_however_it_is_cut(rows: list[tuple[str, str]], cuts: list[int]) -> None:
    assert parse(as_csv(rows), "csv", cuts)[0] == [Row(text, nfc(label)) for text, label in rows]


@given(data=st.binary(max_size=300), kind=st.sampled_from(["jsonl", "csv", "tsv"]))
def test_arbitrary_bytes_are_broken_rows_or_a_missing_column_and_nothing_else(
    data: bytes, kind: Format
) -> None:
    header = (
        b'{"text": "a", "label": "b"}\n'
        if kind == "jsonl"
        else b"text\tlabel\n".replace(b"\t", b"," if kind == "csv" else b"\t")
    )
    parse(header + data, kind)
    try:
        parse(data, kind)
    except DataError as exc:
        assert re.search(r"no column '(text|label)'|JSON document|UTF-16|zero bytes|gzip|^x: is ", str(exc))


def test_tsv_takes_quotes_as_they_are() -> None:
    rows, _ = parse(b'label\ttext\non\ta 5" screen\r\noff\t"so"\n', "tsv")
    assert rows == [Row('a 5" screen', "on"), Row('"so"', "off")]


def test_numbers_and_truth_values_are_labels_too() -> None:
    rows, _ = parse(
        b'{"text": "a", "label": 1}\n{"text": "b", "label": true}\n{"text": "c", "label": null}', "jsonl"
    )
    assert rows == [Row("a", "1"), Row("b", "true"), Row("c", None)]


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm() -> None:
    rows, _ = parse(b"\xef\xbb\xbftext,label\r\nwarm,on\r\n\r\n", "csv", cuts=[1, 2])
    assert rows == [Row("warm", "on")]


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("jsonl", b"{not json"),
        ("jsonl", b"[1, 2]"),
        ("jsonl", b'{"label": "on"}'),
        ("jsonl", b'{"text": ["a", "b c"], "label": "on"}'),
        ("jsonl", b'{"text": ["a", ""], "label": "on"}'),
        ("jsonl", b'{"text": [["a"]], "label": "on"}'),
        ("jsonl", b'{"text": "a", "label": [["b"]]}'),
        ("jsonl", b'{"text": "a", "text_pair": {}, "label": "b"}'),
        ("jsonl", b'{"text": "a", "label": {"b": 1}}'),
        ("jsonl", b"\xff\xfe"),
        ("csv", b"too,many,fields"),
        ("csv", b"few"),
        ("csv", b'"quoted"wrongly,on'),
        ("tsv", b"few"),
    ],
)
def test_a_broken_row_is_skipped_and_counted_and_its_line_told(
    kind: Format, bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    good = {
        "jsonl": [b'{"text": "t", "label": "l"}'] * 2,
        "csv": [b"text,label", b"t,l"],
        "tsv": [b"text\tlabel", b"t\tl"],
    }
    first, second = good[kind]
    with caplog.at_level(logging.WARNING):
        rows, parser = parse(b"\n".join([first, bad, second, b""]), kind)
    assert rows[-1] == Row("t", "l") and parser.broken == 1
    assert "x, line 2" in caplog.text


def test_many_broken_rows_make_few_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, parser = parse(b'{"text": "a", "label": "b"}\n' + b"{\n" * 50, "jsonl")
    assert parser.broken == 50 and len(caplog.records) == 3


def test_a_quote_that_never_closes_costs_its_own_row_only() -> None:
    rows, parser = parse(b'text,label\n"open,on\nwarm,off\ncold,on\n', "csv")
    assert rows == [Row("warm", "off"), Row("cold", "on")] and parser.broken == 1


def test_a_row_without_end_is_dropped_in_bounded_memory() -> None:
    parser = RowParser("x", "jsonl", "text", "label")
    for _ in range(3 * MAX_ROW_BYTES // 65536):
        assert not list(parser.feed(b"x" * 65536))
        assert len(parser._tail) <= MAX_ROW_BYTES
    assert list(parser.feed(b'\n{"text": "a", "label": "b"}\n')) == [Row("a", "b")]
    assert parser.broken == 1


@pytest.mark.parametrize(("text", "label", "field"), [("txt", "label", "text"), ("text", "intent", "label")])
def test_an_unknown_column_is_an_error_that_names_the_columns_there_are(
    text: str, label: str, field: str
) -> None:
    parser = RowParser("x.csv", "csv", text, label)
    wanted = (
        f"data.{field}_column: no column '{text if field == 'text' else label}' in x.csv; it has: text, label"
    )
    with pytest.raises(DataError, match=wanted):
        list(parser.feed(b"text,label\na,b\n"))


def test_a_list_of_words_is_a_text_and_a_list_of_labels_stays_one() -> None:
    lines = b'{"tokens": ["Ada", "wrote"], "labels": ["PER", "O"]}\n{"tokens": ["so"], "labels": []}\n'
    rows, parser = parse(lines, "jsonl")
    assert rows == [Row("Ada wrote", '["PER", "O"]'), Row("so", "[]")] and parser.broken == 0


def test_a_second_text_makes_a_pair_where_there_is_one() -> None:
    rows, _ = parse(b"text,text_pair,label\na,b,on\nc,,off\n", "csv")
    assert rows == [Row(("a", "b"), "on"), Row("c", "off")]
    assert [row.input for row in rows] == [("a", "b"), "c"]


def test_objects_without_labels_are_read_and_what_was_looked_for_is_known() -> None:
    rows, parser = parse(b'{"text": "a"}\n{"text": "b", "label": "on"}\n', "jsonl")
    assert rows == [Row("a", None), Row("b", "on")] and parser.broken == 0
    assert "no 'label' (it has: text)" in parser.lacking
    assert not parse(b'{"text": "a", "label": "on"}\n', "jsonl")[1].lacking
