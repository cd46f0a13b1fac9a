"""How long an answer of ``sidestream agent serve`` takes beside the bare predictor's, in turns within a run.

    python benchmarks/serving.py --state-dir ~/.local/state/sidestream/agent/JOB --rounds 200

Processor time counts client and server together. It is what an answer costs on a machine that others use too;
the time on the clock then tells more of the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Final
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.program import run_program
from benchmarks.table import render
from edge_agent.answers.predictor import load
from edge_agent.serving.http import PredictionServer
from edge_agent.serving.predictions import Predictions

BARE: Final = "bare"
_WARM: Final = 5
_HEADINGS: Final = ("asked", "p50 ms", "of bare", "processor ms", "of bare")


@contextmanager
def ways(
    predictions: Predictions, server: PredictionServer, text: str
) -> Iterator[dict[str, Callable[[], object]]]:
    """Ways to ask, by name: the predictor itself, within the process, and over HTTP."""
    place = urlsplit(server.url)
    kept, body = HTTPConnection(place.netloc), json.dumps({"texts": [text]})

    def over(connection: HTTPConnection) -> bytes:
        connection.request("POST", "/predict", body)
        return connection.getresponse().read()

    def fresh() -> bytes:
        with closing(HTTPConnection(place.netloc)) as connection:
            return over(connection)

    with closing(kept):
        yield {
            BARE: lambda: predictions.predictor.predict([text]),
            "through the queue": lambda: predictions.ask([text]),
            "over HTTP, connection kept": lambda: over(kept),
            "over HTTP, a new connection": fresh,
        }


def measure(asks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """By way, seconds on the clock and of the processor, each the median over rounds."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in asks}
    for number in range(_WARM + rounds):
        for name, ask in asks.items():
            clock, processor = time.perf_counter(), time.process_time()
            ask()
            if number >= _WARM:
                took[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return {
        name: (median(one[0] for one in some), median(one[1] for one in some)) for name, some in took.items()
    }


def table(found: Mapping[str, tuple[float, float]]) -> str:
    """The medians, and their ratios to the bare predictor's."""
    bare = found[BARE]
    rows = [
        [name, f"{1e3 * clock:.2f}", f"{clock / bare[0]:.2f}", f"{1e3 * own:.2f}", f"{own / bare[1]:.2f}"]
        for name, (clock, own) in found.items()
    ]
    return render(_HEADINGS, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state-dir", type=Path, required=True, help="of an agent that has adopted weights")
    parser.add_argument("--rounds", type=int, default=200, help="of one question each way (default: 200)")
    parser.add_argument("--text", default="dim the lights in the hall", help="the question")
    return run_program(parser, _run, arguments)


def _run(args: argparse.Namespace) -> str:
    with (
        Predictions(args.state_dir, load) as predictions,
        PredictionServer(predictions, 0) as server,
        ways(predictions, server, args.text) as asks,
    ):
        return table(measure(asks, max(1, args.rounds)))


if __name__ == "__main__":
    sys.exit(main())
