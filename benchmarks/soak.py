"""Full rate for half an hour: memory and open files of trainer, agents and broker, as a plot.

    python benchmarks/soak.py --minutes 30 --plot soak.png --json soak.json

Real processes on a tiny random backbone, so that messages come as fast as the trainer takes them. A feeder
keeps the devices' files ahead of them. What grows shows as a slope over the second half: the trainer's rows
are kept on disk, and its cache of decoded ones is full long before that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.drawing import drawing
from benchmarks.fault_bench import Bench, resident_mib
from benchmarks.result import about_this_run, write_json
from benchmarks.table import render
from tests.until import until

_LABELS: Final = ("cold", "dark", "loud")
_AHEAD: Final = 400
_STYLES: Final = ("C0-", "C1-.", "C2-", "C3--")
_HEADINGS: Final = (
    "process",
    "MiB after a minute",
    "MiB at the end",
    "MiB/h, second half",
    "files",
    "files at the end",
)


class Soak:
    """Feeds, and samples what the processes hold."""

    def __init__(self, bench: Bench, devices: Sequence[str]) -> None:
        self._bench = bench
        self._devices = devices
        self._rng = random.Random(0)
        self._fed = 0
        self.samples: list[dict[str, float]] = []
        """By process: MiB and open files, and seconds since the start."""

    def run(self, minutes: float, every_s: float) -> int:
        """Run, and return how many samples were journaled."""
        bench = self._bench
        bench.labels = _LABELS
        bench.settings |= {"cache_mib": "16", "checkpoint_every_s": "10", "idle_after_s": "3600"}
        bench.tier_settings["batch_size"] = "16"
        processes = {"trainer": bench.trainer().pid, "broker": bench.broker.pid}
        processes |= {name: bench.device(name).pid for name in self._devices}
        self._feed(_AHEAD)
        until(lambda: bench.journaled() > 0, "the first batch", 300)
        started_s = time.monotonic()
        while (now_s := time.monotonic() - started_s) < 60 * minutes:
            journaled = bench.journaled()
            if self._fed - journaled < _AHEAD * len(self._devices):
                self._feed(_AHEAD)
            self.samples.append({"s": round(now_s, 1), "journaled": journaled, **_look(processes)})
            bench.tell(f"{now_s / 60:.1f} minutes, {journaled} samples")
            time.sleep(every_s)
        return bench.journaled()

    def _feed(self, samples: int) -> None:
        for name in self._devices:
            with (self._bench.folder / f"{name}.jsonl").open("a") as file:
                for index in range(samples):
                    label = self._rng.choice(_LABELS)
                    text = f"turn the {label} light {self._fed + index}"
                    file.write(json.dumps({"text": text, "label": label}) + "\n")
            self._fed += samples


def _look(processes: dict[str, int]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, pid in processes.items():
        found[f"{name} MiB"] = round(resident_mib(pid), 2)
        found[f"{name} files"] = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return found


def summary(samples: list[dict[str, float]]) -> list[list[str]]:
    """A row for each process."""
    names = [key.removesuffix(" MiB") for key in samples[0] if key.endswith(" MiB")]
    later = [one for one in samples if one["s"] >= samples[-1]["s"] / 2]
    early = next((one for one in samples if one["s"] >= 60), samples[0])
    rows = []
    for name in names:
        hours = np.array([one["s"] for one in later]) / 3600
        slope = np.polyfit(hours, [one[f"{name} MiB"] for one in later], 1)[0] if len(later) > 2 else 0.0
        rows.append(
            [
                *(name, f"{early[f'{name} MiB']:.0f}", f"{samples[-1][f'{name} MiB']:.0f}", f"{slope:+.1f}"),
                *(f"{early[f'{name} files']:.0f}", f"{samples[-1][f'{name} files']:.0f}"),
            ]
        )
    return rows


def plot(samples: list[dict[str, float]], path: Path) -> None:
    """Memory above, open files below, over minutes."""
    minutes = [one["s"] / 60 for one in samples]
    with drawing(path, panels=2) as axes:
        for axis, unit in zip(axes, ("MiB", "files"), strict=True):
            keys = [key for key in samples[0] if key.endswith(f" {unit}")]
            for key, how in zip(keys, itertools.cycle(_STYLES)):  # those on top of each other show both
                axis.plot(minutes, [one[key] for one in samples], how, label=key.removesuffix(f" {unit}"))
            axis.set_ylim(bottom=0)
            axis.set_ylabel("resident memory, MiB" if unit == "MiB" else "open files")
        axes[0].legend(loc="center right", handlelength=4)
        axes[0].set_title(f"{samples[-1]['journaled']:,.0f} samples in {minutes[-1]:.0f} minutes")
        axes[1].set_xlabel("minutes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: 30)")
    parser.add_argument(
        "--every", type=float, default=5.0, metavar="S", help="between two looks (default: 5)"
    )
    parser.add_argument("--devices", type=int, default=2, help="agents (default: 2)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw this PNG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    args = parser.parse_args(arguments)
    about: dict[str, Any] = about_this_run()

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with (
        tempfile.TemporaryDirectory(prefix="sidestream-soak-") as folder,
        Bench(Path(folder), 0, tell, fresh=True) as bench,
    ):
        soak = Soak(bench, [f"dev-{index}" for index in range(args.devices)])
        journaled = soak.run(args.minutes, args.every)
    rows = summary(soak.samples)
    print(f"{journaled} samples journaled in {args.minutes:g} minutes")
    print(render(_HEADINGS, rows))
    if args.json:
        write_json(args.json, about, {"samples": soak.samples})
    if args.plot:
        plot(soak.samples, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
