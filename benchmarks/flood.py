"""What one device's junk costs the others: receipts before a flood and during it.

    python benchmarks/flood.py --qos 0 1 --seconds 30 --json flood.json

Real processes and Mosquitto: a trainer, honest devices (light ones: real outbox, sender and connection),
each sending a batch every so often, and one that publishes 256 KiB of junk on its own topic as fast as it
can. Exits 1 if the 95th percentile of the time to a receipt in the flood is over three times the quiet one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

import numpy as np

from benchmarks.fault_bench import Bench
from benchmarks.fault_rows_fleet import any_batch
from benchmarks.light_fleet import LightDevice
from benchmarks.result import about_this_run, write_json
from benchmarks.table import render
from sidestream.contract.topics import Topics
from tests.forked import Process
from tests.until import until

MOST: Final = 3.0
"""Times the quiet percentile."""
_DEVICES: Final = 4
_EVERY_S: Final = 0.1
_HEADINGS: Final = ("flood", "quiet p95", "p95 in the flood", "ratio", "slowest", "receipts", "junk sent")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    args = _parser().parse_args(arguments)
    about, rows = about_this_run(), [run(qos, args.seconds, args.kib) for qos in args.qos]
    print(render(_HEADINGS, [_line(row) for row in rows]))
    if args.json:
        write_json(args.json, about, {"rows": rows})
    return 0 if all(row["ratio"] <= MOST for row in rows) else 1


def run(qos: int, seconds: float, kib: int) -> dict[str, Any]:
    """Quiet, then flooded, for so long each; what was seen."""
    with (
        tempfile.TemporaryDirectory(prefix="sidestream-flood-") as folder,
        Bench(Path(folder), 0, lambda text: None) as bench,
    ):
        bench.trainer()
        bench.device("dev-a")
        bench.feed("dev-a", 4)
        bench.await_samples()
        model = any_batch(bench.trainer_state)
        fleet = [
            LightDevice(bench.folder / "light" / f"{index}", bench.url, bench.job, f"light-{index}", model)
            for index in range(_DEVICES)
        ]
        try:
            for device in fleet:
                device.start()
            until(lambda: all(device.connections for device in fleet), "all are connected", 120)
            quiet = _measure(fleet, seconds)
            note = bench.folder / "flood.sent"
            flood = _flood(bench, qos, kib, seconds, note)
            until(note.exists, "the flood has begun")
            flooded = _measure(fleet, seconds)
            flood.wait(60)
            sent = int(note.read_text())
        finally:
            for device in fleet:
                device.close()
    before, during = (float(np.percentile(times, 95)) for times in (quiet, flooded))
    return {
        "qos": qos,
        "kib": kib,
        "quiet_p95_s": round(before, 4),
        "flood_p95_s": round(during, 4),
        "ratio": round(during / before, 2),
        "slowest_s": round(max(flooded), 2),
        "receipts": [len(quiet), len(flooded)],
        "junk_messages": sent,
    }


def _measure(fleet: Sequence[LightDevice], seconds: float) -> list[float]:
    """Have every device send now and then; the time from a batch to its receipt, of every one."""
    seen = [len(device.receipt_s) for device in fleet]
    end_s = time.monotonic() + seconds
    sent = 0
    while time.monotonic() < end_s:
        for device in fleet:
            device.add()
        sent += len(fleet)
        time.sleep(_EVERY_S)
    until(lambda: all(device.waiting == 0 for device in fleet), "all is receipted", 600)
    times = [one for device, before in zip(fleet, seen, strict=True) for one in device.receipt_s[before:]]
    assert len(times) == sent, (len(times), sent)
    return times


def _flood(bench: Bench, qos: int, kib: int, seconds: float, note: Path) -> Process:
    topic = Topics(bench.job).activations("small", "vandal")
    arguments = (bench.url, topic, str(qos), str(kib), str(seconds), str(note))
    return bench.start("flood", *arguments, module="benchmarks.flooder", fresh=True)


def _line(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['kib']} KiB, QoS {row['qos']}",
        f"{1000 * row['quiet_p95_s']:.0f} ms",
        f"{1000 * row['flood_p95_s']:.0f} ms",
        f"{row['ratio']:.2f}",
        f"{row['slowest_s']:.2f} s",
        " + ".join(map(str, row["receipts"])),
        f"{row['junk_messages']} messages",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qos", nargs="+", type=int, choices=[0, 1], default=[0, 1], help="of the junk")
    parser.add_argument("--kib", type=int, default=256, help="of one junk message (default: 256)")
    parser.add_argument("--seconds", type=float, default=30.0, help="quiet, and flooded (default: 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
