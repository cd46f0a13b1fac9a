"""From a batch on its way up to its receipt, and to weights that have learnt from it; and the update itself.

    python benchmarks/latency.py --batches 100

A real trainer and Mosquitto; one light device, whose batches are copies of one that an agent made, sends one
at a time and listens to receipts and weights. Nothing holds versions back: publish_every_s, publish_change,
publish_share, publish_gain and max_down_mib_s are 0. What an update took is told by the trainer's own trace.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

import numpy as np

from benchmarks.fault_bench import Bench
from benchmarks.fault_rows_fleet import any_batch
from benchmarks.light_fleet import LightDevice
from benchmarks.program import run_program, teller
from benchmarks.result import about_this_run, write_json
from benchmarks.table import render
from broker_config.connection.connection import Connection
from broker_config.settings import BrokerSettings
from broker_config.transport import Event, Received
from sidestream.contract.topics import Topics
from tests.until import until

_HEADINGS: Final = ("milliseconds", "p50", "p95")
_AT_ONCE: Final = ("publish_every_s", "publish_change", "publish_share", "publish_gain", "max_down_mib_s")
_LABELS: Final = 8
_PAUSE_S: Final = 0.15


class Weights:
    """Hears every version, with the time at which it came."""

    def __init__(self, url: str, job: str) -> None:
        self.came_s: list[float] = []
        self._news = threading.Event()
        self._transport = Connection(BrokerSettings(url=url), client_id="sidestream-latency")
        self._transport.subscribe(Topics(job).weights("small"))
        self._transport.start(self._hear)
        assert self._transport.wait_connected(20.0)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Received) and event.payload:
            self.came_s.append(time.monotonic())
            self._news.set()

    def after(self, moment_s: float) -> float:
        """When the first version after a moment came."""
        until(lambda: bool(self.came_s) and self.came_s[-1] > moment_s, "weights", 60.0, every_s=0.0005)
        return next(at for at in self.came_s if at > moment_s)

    def close(self) -> None:
        self._transport.close()


def measure(batches: int, backbone: str, codec: str, tell: Any) -> dict[str, list[float]]:
    """Seconds, by what is measured."""
    found: dict[str, list[float]] = {"receipt": [], "weights": []}
    with (
        tempfile.TemporaryDirectory(prefix="sidestream-latency-") as folder,
        Bench(Path(folder), 0, lambda text: None) as bench,
    ):
        trace = bench.folder / "trace.jsonl"
        if backbone:
            bench.backbone, bench.side_network = Path(backbone), {}
        bench.labels = bench.labels[:_LABELS]
        bench.settings |= dict.fromkeys(_AT_ONCE, "0")
        bench.settings |= {"weights_codec": json.dumps(codec)}
        bench.settings |= {"trace_path": json.dumps(str(trace)), "idle_after_s": "3600"}
        bench.settings["checkpoint_every_s"] = "10"
        bench.trainer()
        bench.device("dev-a")
        bench.feed("dev-a", 4)
        bench.await_samples()
        model = any_batch(bench.trainer_state)
        device = LightDevice(bench.folder / "light", bench.url, bench.job, "light", model, _LABELS)
        heard = Weights(bench.url, bench.job)
        try:
            device.start()
            until(lambda: device.connections > 0, "it is connected", 60)
            for number in range(batches):
                time.sleep(_PAUSE_S)
                began = time.monotonic()
                device.add()
                found["weights"].append(heard.after(began) - began)
                if number % 20 == 19:
                    tell(f"{number + 1} of {batches} batches")
            until(lambda: device.waiting == 0, "all is receipted", 60)
            found["receipt"] = list(device.receipt_s)
        finally:
            device.close()
            heard.close()
        spans = [json.loads(line) for line in trace.read_text().splitlines()]
    took = [span["dur"] / 1e6 for span in spans if span["name"] == "update"]
    found["update"] = took[-batches:]
    found["ready to publish"] = _between(spans, "update", "publish")[-batches:]
    found["publish"] = [span["dur"] / 1e6 for span in spans if span["name"] == "publish"][-batches:]
    beyond = np.array(found["weights"]) - np.array(found["update"][-len(found["weights"]) :])
    return {**found, "weights beyond the update": beyond.tolist()}


def _between(spans: list[dict[str, Any]], before: str, after: str) -> list[float]:
    """Seconds from the end of each span to the next one of another name."""
    found, ended = [], None
    for span in sorted(spans, key=lambda one: one["ts"]):
        if span["name"] == before:
            ended = span["ts"] + span["dur"]
        elif span["name"] == after and ended is not None:
            found.append((span["ts"] - ended) / 1e6)
            ended = None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    about, found = about_this_run(), measure(args.batches, args.backbone, args.codec, teller())
    if args.json:
        write_json(args.json, about, {"seconds": found})
    rows = [
        (name, f"{1e3 * np.percentile(took, 50):.1f}", f"{1e3 * np.percentile(took, 95):.1f}")
        for name, took in found.items()
    ]
    return render(_HEADINGS, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="latency", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", type=int, default=100, help="one after another")
    parser.add_argument(
        "--backbone", default="", help="a folder; default: a tiny random one, and a tiny side-network"
    )
    parser.add_argument("--codec", default="packed", help="how weights travel (default: packed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
