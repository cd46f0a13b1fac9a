"""A timeline has every process's spans on one axis, in the format that trace viewers load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sidestream.contract.errors import ConfigError
from sidestream.demo.timeline import read_spans, timeline
from sidestream.host.trace import Trace, TraceFile, open_trace


def test_spans_come_back_and_a_line_that_was_cut_off_does_not(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with open_trace(str(path)) as trace:
        start = trace.now()
        trace.add("forward", "compute", start, start + 5, batches=[1, 2])
        trace.add("publish", "send", start, start - 9)
    trace.add("too late", "send", start)
    with path.open("a") as file:
        file.write('{"name": "ki')
    assert read_spans(path) == [
        {"name": "forward", "lane": "compute", "ts": start, "dur": 5, "about": {"batches": [1, 2]}},
        {"name": "publish", "lane": "send", "ts": start, "dur": 0, "about": {}},
    ]
    assert read_spans(tmp_path / "never written") == []


def test_no_path_is_no_trace_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    with open_trace("") as trace:
        assert type(trace) is Trace and trace.now() == 0
        trace.add("forward", "compute", 0)
    with pytest.raises(ConfigError) as caught, open_trace(str(tmp_path / "no" / "folder")):
        pass
    assert caught.value.field == "trace_path"


def test_a_timeline_is_complete_events_by_start_on_one_axis(tmp_path: Path) -> None:
    def spans(name: str, *starts: int) -> list[dict[str, object]]:
        trace = TraceFile(tmp_path / name)
        for number, start in enumerate(starts):
            trace.add("work", f"lane {number % 2}", start, start + 10, number=number)
        trace.close()
        return read_spans(tmp_path / name)

    events = timeline(
        {"trainer": spans("t", 1_000, 1_030), "pi": spans("p", 1_005, 1_020, 1_050), "mute": []}
    )
    json.dumps(events)
    complete = [event for event in events if event["ph"] == "X"]
    assert [(one["pid"], one["tid"], one["ts"], one["dur"]) for one in complete] == [
        (1, 1, 0, 10),
        (2, 1, 5, 10),
        (2, 2, 20, 10),
        (1, 2, 30, 10),
        (2, 1, 50, 10),
    ]
    named = {(one["pid"], one["tid"]): one["args"]["name"] for one in events if one["ph"] == "M"}
    assert named[1, 0] == "trainer" and named[2, 0] == "pi" and named[2, 2] == "lane 1"
    assert timeline({}) == []
