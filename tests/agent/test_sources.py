from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge_agent.samples.sources as sources
from edge_agent.config import DataConfig, parse_part
from edge_agent.samples.identities import Identities
from edge_agent.samples.sample import Row, is_held_out
from edge_agent.samples.source import SampleSource
from edge_agent.samples.sources import StreamSource, open_source, read_evaluation
from sidestream.contract.errors import ConfigError, DataError


def jsonl(path: Path, texts: Iterable[str], *, label: str = "on", mode: str = "w") -> Path:
    with path.open(mode) as file:
        file.writelines(json.dumps({"text": text, "label": label}) + "\n" for text in texts)
    return path


def texts_of(source: SampleSource) -> list[str]:
    return [sample.row.text for sample in source.read()]


# --- identity --------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(rows=st.lists(st.tuples(st.text("ab", max_size=2), st.sampled_from([None, "", "x"])), max_size=30))
def test_every_row_has_a_key_of_its_own_and_the_same_one_each_time(
    rows: list[tuple[str, str | None]],
) -> None:
    first, second = Identities(), Identities()
    keys = [first.name(Row(*row)).key for row in rows]
    assert len(set(keys)) == len(rows)
    assert [second.name(Row(*row)).key for row in rows] == keys


@given(rows=st.lists(st.text("ab", max_size=2), max_size=20), order=st.randoms(use_true_random=False))
def test_keys_do_not_depend_on_the_order_of_rows(rows: list[str], order: Any) -> None:
    shuffled = rows.copy()
    order.shuffle(shuffled)
    first, second = Identities(), Identities()
    assert {first.name(Row(r, "x")).key for r in rows} == {second.name(Row(r, "x")).key for r in shuffled}


def test_the_held_out_share_is_about_its_size_and_equal_texts_fall_together() -> None:
    held = [is_held_out(Row(f"text {number}", None), 0.1) for number in range(5000)]
    assert 400 < sum(held) < 600
    assert held == [is_held_out(Row(f"text {number}", None), 0.1) for number in range(5000)]
    assert not any(is_held_out(Row(f"text {number}", None), 0.0) for number in range(100))


def one_name(label: str) -> tuple[str, ...]:
    return (label,)


@pytest.mark.slow
@given(
    rows=st.lists(st.integers(0, 900), max_size=2000),
    again=st.integers(0, 3),
)
@settings(max_examples=20)
def test_keys_are_the_same_however_many_contents_were_counted_in_between(rows: list[int], again: int) -> None:
    between = [f"other {number}" for number in range(1500)]
    with tempfile.TemporaryDirectory() as folder:
        few, many = Identities(), Identities(Path(folder))
        with closing(few), closing(many):
            for _ in range(again):
                for row in rows:
                    assert few.name(Row(str(row), "on")).key == many.name(Row(str(row), "on")).key
                for text in between:
                    many.name(Row(text, "on"))


@pytest.mark.slow
def test_naming_rows_takes_no_more_memory_the_more_there_are(tmp_path: Path) -> None:
    with closing(Identities(tmp_path)) as identities:
        tracemalloc.start()
        try:
            for number in range(2000):
                identities.name(Row(f"row {number}", "on"))
            before = tracemalloc.get_traced_memory()[0]
            for number in range(30_000):
                identities.name(Row(f"further row {number}", "on"))
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    assert grown < 200_000  # a set of their hashes would be 2,000,000 and more


def test_nothing_is_left_of_the_counts_when_a_process_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from edge_agent.samples.identities import Identities; from edge_agent.samples.sample import Row\n"
        "identities = Identities(Path(sys.argv[1]))\n"
        "for number in range(5000): identities.name(Row(str(number), None))\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL and list(tmp_path.iterdir()) == []


def test_counts_that_find_no_room_on_the_disk_stay_in_memory(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with closing(Identities(gone)) as identities:
        keys = {identities.name(Row(str(number % 1500), None)).key for number in range(3000)}
        gone.mkdir()
        keys |= {identities.name(Row(str(number % 1500), None)).key for number in range(3000)}
    assert len(keys) == 6000


# --- files -----------------------------------------------------------------------------------------------


def test_a_file_is_read_once_and_its_labels_are_listed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["one", "two"])
    jsonl(path, ["three"], label="off", mode="a")
    source = open_source(DataConfig(path=str(path)))
    assert source.labels(one_name) == ("off", "on")
    assert texts_of(source) == ["one", "two", "three"] and source.ended


def test_the_last_line_of_a_file_needs_no_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\none,on\ntwo,off")
    assert texts_of(open_source(DataConfig(path=str(path)))) == ["one", "two"]


def test_a_growing_file_gives_its_new_rows_once_they_are_complete(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["one"])
    source = open_source(DataConfig(path=str(path), watch=True))
    assert texts_of(source) == ["one"] and texts_of(source) == []
    with path.open("a") as file:
        file.write('{"text": "two", "la')
    assert texts_of(source) == []
    with path.open("a") as file:
        file.write('bel": "on"}\n')
    assert texts_of(source) == ["two"] and not source.ended


def test_a_watched_folder_gives_new_files_and_leaves_a_bad_one_out(tmp_path: Path) -> None:
    source = open_source(DataConfig(path=str(tmp_path), watch=True))
    assert texts_of(source) == []
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "notes.txt").write_text("no data")
    jsonl(tmp_path / ".hidden.jsonl", ["hidden"])
    jsonl(tmp_path / "b.jsonl", ["one"])
    assert texts_of(source) == ["one"]
    (tmp_path / "c.tsv").write_text("label\ttext\non\ttwo\n")
    assert texts_of(source) == ["two"] and texts_of(source) == []


def test_equal_rows_in_two_files_are_two_samples(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ["same"])
    jsonl(tmp_path / "b.jsonl", ["same"])
    samples = list(open_source(DataConfig(path=str(tmp_path))).read())
    assert len({sample.key for sample in samples}) == 2


def test_a_file_that_was_rewritten_names_its_old_rows_as_before(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["one", "one", "two"])
    source = open_source(DataConfig(path=str(path), watch=True))
    before = {sample.key for sample in source.read()}
    jsonl(tmp_path / "new", ["three", "one", "two", "one"]).replace(path)
    after = {sample.key: sample.row.text for sample in source.read()}
    assert [text for key, text in after.items() if key not in before] == ["three"]


def test_a_watched_file_may_vanish_and_come_back(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["one"])
    source = open_source(DataConfig(path=str(path), watch=True))
    texts_of(source)
    path.unlink()
    assert texts_of(source) == []
    jsonl(path, ["one", "two"])
    assert "two" in texts_of(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\n", "no usable row"),
        ("a.csv", "", "no usable row"),
        (
            "a.csv",
            "text,intent\na,b\n",
            "data.label_column: no column 'label' in .*a.csv; it has: text, intent",
        ),
        ("a.jsonl", '{"t": 1}', "data.text_column: no column 'text'"),
        ("a.txt", "hello", "neither .jsonl, .json, .csv, .tsv"),
    ],
)
def test_a_file_that_gives_nothing_is_an_error_that_says_why(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(path=str(tmp_path / name)))


def test_missing_and_empty_places_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file or folder"):
        open_source(DataConfig(path=str(tmp_path / "nothing.csv")))
    with pytest.raises(DataError, match=r"no \.jsonl, \.json, \.csv, \.tsv or \.parquet file"):
        open_source(DataConfig(path=str(tmp_path)))


def test_the_format_may_be_given_where_the_name_does_not_tell(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("label\ttext\non\tone\n")
    assert texts_of(open_source(DataConfig(path=str(path), format="tsv"))) == ["one"]


def test_without_data_there_are_no_samples() -> None:
    source = open_source(DataConfig())
    assert source.ended and texts_of(source) == [] and source.labels(one_name) == ()


# --- standard input --------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


@pytest.mark.parametrize(
    "head", ['{"text": "one", "label": "on"}\n', "text,label\none,on\n", "label\ttext\non\tone\n"]
)
def test_standard_input_is_read_as_it_comes_and_never_waited_for(pipe: tuple[int, int], head: str) -> None:
    source = StreamSource(DataConfig(path="-"), Identities(), descriptor=pipe[0])
    assert texts_of(source) == []
    os.write(pipe[1], head[:3].encode())
    assert texts_of(source) == [] and not source.ended
    os.write(pipe[1], head[3:].encode())
    assert texts_of(source) == ["one"] and not source.ended
    os.close(pipe[1])
    assert texts_of(source) == [] and source.ended


def test_labels_on_standard_input_are_listed_and_their_rows_still_read(pipe: tuple[int, int]) -> None:
    source = StreamSource(DataConfig(path="-"), Identities(), descriptor=pipe[0])
    assert source.labels(one_name) == ()
    os.write(pipe[1], b"text,label\none,on\ntwo,off\n")
    assert source.labels(one_name) == ("off", "on")
    os.write(pipe[1], b"three,dim\n")
    assert source.labels(one_name) == ("dim", "off", "on")
    assert texts_of(source) == ["one", "two", "three"]


def test_standard_input_goes_on_where_reading_broke_off(pipe: tuple[int, int]) -> None:
    source = StreamSource(DataConfig(path="-"), Identities(), descriptor=pipe[0])
    os.write(pipe[1], b"text,label\none,on\ntwo,off\nthree,on\n")
    os.close(pipe[1])
    reading = source.read()
    taken = [next(reading), next(reading)]
    del reading  # as when the agent starts over in the middle
    source.give_back(taken[1:])
    assert not source.ended
    assert texts_of(source) == ["two", "three"] and source.ended


# --- plug-ins --------------------------------------------------------------------------------------------


class _Point:
    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def load(self) -> Any:
        return self.value


def _bus(config: DataConfig) -> Iterator[Mapping[str, Any] | tuple[str, str | None]]:
    yield {config.text_column: "one", config.label_column: "on"}
    yield ("two", None)


def _broken(config: DataConfig) -> Iterator[tuple[str, str]]:
    raise ZeroDivisionError("sensor")
    yield ("", "")


def test_a_plug_in_yields_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [_Point("bus", _bus), _Point("broken", _broken)]
    monkeypatch.setattr(sources, "entry_points", lambda group: points)
    source = open_source(DataConfig(plugin="bus"))
    assert [(sample.row.text, sample.label) for sample in source.read()] == [("one", "on"), ("two", None)]
    assert source.ended
    with pytest.raises(DataError, match="plug-in 'broken': ZeroDivisionError: sensor"):
        list(open_source(DataConfig(plugin="broken")).read())
    with pytest.raises(ConfigError, match="no plug-in 'can' is installed; there are: broken, bus"):
        open_source(DataConfig(plugin="can"))


# --- evaluation ------------------------------------------------------------------------------------------


def test_devices_share_an_evaluation_file_without_overlap(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "eval.jsonl", [f"text {number}" for number in range(10)])
    config = DataConfig(evaluation_path=str(path))
    parts = [[row.text for row in read_evaluation(config, (part, 3))] for part in range(3)]
    assert sorted(text for part in parts for text in part) == sorted(f"text {number}" for number in range(10))
    capped = DataConfig(evaluation_path=str(path), evaluation_max_samples=2)
    assert len(read_evaluation(capped, (0, 1))) == 2


def test_a_missing_evaluation_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.evaluation_path: there is no file"):
        read_evaluation(DataConfig(evaluation_path=str(tmp_path / "no.csv")), (0, 1))


@pytest.mark.parametrize("part", ["", "1", "1/1", "2/1", "-1/2", "a/b", "0/0"])
def test_a_part_is_k_of_n(part: str) -> None:
    assert parse_part("2/3") == (2, 3)
    with pytest.raises(ConfigError, match=r"data\.evaluation_part"):
        parse_part(part)
