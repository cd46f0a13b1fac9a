"""The traces of several processes as one timeline in Chrome's trace format, which Perfetto shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_spans(path: Path) -> list[dict[str, Any]]:
    """The spans of a file as :mod:`sidestream.host.trace` wrote it; a last line cut off does not count."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def timeline(traces: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Spans by process name -> events: a process each, a thread a lane, microseconds from the first span on.

    Complete events (``X``) by start, after the names (``M``) of processes and threads.
    """
    origin = min((span["ts"] for spans in traces.values() for span in spans), default=0)
    names: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for process, (name, spans) in enumerate(traces.items(), start=1):
        names.append(_name("process_name", process, 0, name))
        lanes = {
            lane: number for number, lane in enumerate(sorted({span["lane"] for span in spans}), start=1)
        }
        names += [_name("thread_name", process, number, lane) for lane, number in lanes.items()]
        events += [
            {
                "name": span["name"],
                "cat": span["lane"],
                "ph": "X",
                "ts": span["ts"] - origin,
                "dur": span["dur"],
                "pid": process,
                "tid": lanes[span["lane"]],
                "args": span["about"],
            }
            for span in spans
        ]
    return names + sorted(events, key=lambda event: int(event["ts"]))


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
