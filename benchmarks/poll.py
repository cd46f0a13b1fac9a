"""Asks the trainer for page and metrics now and then, as browser and scraper do, in a process of its own.

    python -m benchmarks.poll PAGE METRICS SECONDS

prints, as JSON, how many seconds each answer took: the page's first one, one with what is new since half a
second, and the metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.program import run_program

_EVERY_S: Final = 1.0
_LATER_S: Final = 0.5


def fetch(url: str) -> tuple[float, bytes]:
    """Seconds that an answer took, and its body."""
    parts = urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(parts.netloc, timeout=60)) as connection:
        began_s = time.monotonic()
        connection.request("GET", f"{parts.path}?{parts.query}", headers={"Accept-Encoding": "gzip"})
        answer = connection.getresponse()
        body = answer.read()
        took_s = time.monotonic() - began_s
    assert answer.status == 200, (url, answer.status)
    return took_s, gzip.decompress(body) if answer.headers["Content-Encoding"] == "gzip" else body


def fetch_view(page: str) -> Any:
    """The whole fleet, as the page has it."""
    return json.loads(fetch(page + "api/fleet")[1])


def poll(page: str, metrics: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of each answer, by what was asked for."""
    found: dict[str, list[float]] = {"first": [], "live": [], "metrics": []}
    began_s = asked_s = time.monotonic()
    while not found["first"] or asked_s < began_s + seconds:
        took_s, body = fetch(page + "api/fleet")
        found["first"].append(took_s)
        view = json.loads(body)
        time.sleep(_LATER_S)
        since = f"api/fleet?board={view['board']}&since={view['revision']}"
        found["live"].append(fetch(page + since)[0])
        found["metrics"].append(fetch(metrics)[0])
        time.sleep(max(0.0, asked_s + _EVERY_S - time.monotonic()))
        asked_s = time.monotonic()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    return json.dumps(poll(args.page, args.metrics, args.seconds))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="poll", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", help="the fleet page's address")
    parser.add_argument("metrics", help="the metrics' address")
    parser.add_argument("seconds", type=float, help="for so long")
    return parser


if __name__ == "__main__":
    sys.exit(main())
