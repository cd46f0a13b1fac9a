"""A fleet on images beside one device that has them all: accuracy, bytes, and what came of every sample.

Both are the demo, with all its processes: the same network, trainer and recipe. One device holds all layers
of the backbone and every sample, which is the centralised side-network; a fleet's are dealt out by
Dirichlet(alpha), and two thirds of it have the first layers only.

    python -m benchmarks.images --seeds 0 1 2 --samples 96
    python -m benchmarks.images --train photos/train --eval photos/test --json images.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.program import run_program
from benchmarks.result import about_this_run
from sidestream.contract.tasks import Task
from sidestream.demo.files import DemoSettings
from sidestream.demo.report import Report
from sidestream.demo.run import Demo


def run_once(settings: DemoSettings) -> Report:
    """A fleet, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="sidestream-images-") as folder:
        return Demo(settings, Path(folder), lambda line: None).run(threading.Event())


def row(name: str, seed: int, report: Report) -> dict[str, Any]:
    """What is shown of a run."""
    return {
        "name": name,
        "seed": seed,
        "accuracy": report.fleet.quality["accuracy"],
        "by_tier": {tier: one.quality["accuracy"] for tier, one in report.tiers.items()},
        "lost": report.lost,
        "twice": report.duplicated,
    }


def main(argv: list[str] | None = None) -> int:
    """Read the arguments, and run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--devices", type=int, default=6, metavar="N", help="of the fleet (default: 6)")
    add("--alpha", type=float, default=0.5, help="label skew of the fleet (default: 0.5)")
    add("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="of the deal and the learner")
    add("--samples", type=int, default=0, metavar="N", help="train on so many only (default: all)")
    add("--train", default="", metavar="DIR", help="folder of images, or list of them (default: generated)")
    add("--eval", default="", metavar="DIR", help="the same, to measure with")
    add("--json", type=Path, metavar="FILE", help="write the rows, with commit and machine")
    return run_program(parser, measured, argv)


def measured(args: argparse.Namespace) -> str:
    """Run both for each seed, telling how each went; return what they come to."""
    about, rows = about_this_run(), list[dict[str, Any]]()
    for seed in args.seeds:
        for name, devices, alpha in (("fleet", args.devices, args.alpha), ("central", 1, 1000.0)):
            settings = DemoSettings(
                devices=devices,
                train=args.train,
                evaluation=args.eval,
                task=Task.IMAGE_CLASSIFICATION,
                alpha=alpha,
                seed=seed,
                max_samples=args.samples,
            )
            rows.append(row(name, seed, run_once(settings)))
            tiers = "  ".join(f"{tier} {value:.3f}" for tier, value in rows[-1]["by_tier"].items())
            lost = f"lost {rows[-1]['lost']}, twice {rows[-1]['twice']}"
            print(f"{name:>7}  seed {seed}  accuracy {rows[-1]['accuracy']:.3f}  {tiers}  {lost}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    fleet, central = (
        mean(one["accuracy"] for one in rows if one["name"] == name) for name in ("fleet", "central")
    )
    return f"  fleet / central: {fleet:.3f} / {central:.3f} = {fleet / central:.3f}"


if __name__ == "__main__":
    raise SystemExit(main())
