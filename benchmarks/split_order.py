"""What the order of service is worth in split LoRA, and a window of two: counted, and in real time.

    python benchmarks/split_order.py --json benchmarks/out/split_order.json

First a discrete-event simulation of the paper's fleet (six devices of .47 to 3.53 TFLOPS, BERT-base, 16 × 128
tokens, links drawn from 20 to 200 Mbit/s) by the trainer's speed: what longest remaining tail and workload
take off the time of a round served in order of arrival. Then the real rooms of both sides on threads, slowed
to the times of one such fleet by sleep, one run after another for each order and window.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.fleet import FleetDevice
from benchmarks.program import Tell, run_program, teller
from benchmarks.result import about_this_run, write_json
from benchmarks.shapes import save_backbone
from benchmarks.split_fleet import split_config
from benchmarks.split_paced import PacedFleet
from benchmarks.split_queue import Device, devices, gains, serving_s
from benchmarks.table import render
from sidestream.demo.shards import Example

PAPER: Final = (1, 1, 2, 3, 4, 6)
_CASES: Final = (("cuts 1 1 2 3 4 6", PAPER), ("all cut 3", (3,)))
_ROUNDS: Final = ((1, 1, 0), (4, 1, 1), (4, 2, 1), (16, 1, 1), (16, 2, 1))  # batches, window, rounds before
_RUNS: Final = (("fifo", 1), ("longest-tail", 1), ("fifo", 2), ("longest-tail", 2))
_HEADINGS: Final = (
    *("case", "batches", "window", "trainer TFLOPS"),
    *("longest tail", "worst draw", "workload", "worst draw"),
)
_LABELS: Final = ("cold", "warm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    torch.set_num_threads(1)
    about, tell = about_this_run(), teller()
    counted = _counted(args, tell)
    real = [_real(args, turn, tell) for turn in range(args.repeats)]
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        write_json(args.json, about, {"settings": settings, "counted": counted, "real": real})
    return f"{_counted_table(counted)}\n\n{_real_table(real)}" if real else _counted_table(counted)


def _counted(args: argparse.Namespace, tell: Tell) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, cuts in _CASES:
        for batches, window, rounds in _ROUNDS:
            for tflops in args.tflops:
                how = {"batches": batches, "window": window, "rounds": rounds}
                tail = gains("longest-tail", cuts, tflops, draws=args.draws, **how)
                work = gains("workload", cuts, tflops, draws=args.draws, **how)
                entry = {"case": name, "tflops": tflops, "batches": batches, "window": window}
                found.append(
                    {
                        **entry,
                        "gain": mean(tail),
                        "worst": min(tail),
                        "workload": mean(work),
                        "workload_worst": min(work),
                    }
                )
            tell(f"{name}, {batches} batches a round, window {window}: counted")
    return found


def _real(args: argparse.Namespace, turn: int, tell: Tell) -> dict[str, float]:
    """Seconds by order and window."""
    paces = devices(random.Random(args.seed), PAPER)
    taken = {}
    for policy, window in _RUNS:
        with tempfile.TemporaryDirectory(prefix="sidestream-order-") as folder:
            taken[f"{policy}, window {window}"] = took_s = _paced(args, paces, policy, window, Path(folder))
        tell(f"run {turn + 1}, {policy}, window {window}: {took_s:.1f} s")
    return taken


def _paced(
    args: argparse.Namespace, paces: Sequence[Device], policy: str, window: int, folder: Path
) -> float:
    backbone = save_backbone("tiny-deep", folder / "backbone")
    rng = random.Random(args.seed)
    fleet = [
        FleetDevice(name=f"device-{number}", tier=f"cut{pace.cut}", examples=_examples(rng, args.batches))
        for number, pace in enumerate(paces, start=1)
    ]
    config = split_config(
        folder / "trainer",
        {f"cut{cut}": cut for cut in sorted(set(PAPER))},
        str(backbone),
        labels=list(_LABELS),
        tier={"batch_size": 1},
        split={"passes": 1, "window": window},
        learner={"schedule": policy},
    )
    serve_s = {cut: serving_s(cut, args.trainer_tflops) for cut in set(PAPER)}
    return PacedFleet(config, fleet, paces, serve_s, folder, args.scale).run()


def _examples(rng: random.Random, count: int) -> list[Example]:
    return [
        Example(" ".join(f"w{rng.randrange(900)}" for _ in range(4)), rng.choice(_LABELS))
        for _ in range(count)
    ]


def _counted_table(counted: Sequence[dict[str, Any]]) -> str:
    header = (
        "case",
        "batches",
        "window",
        "trainer TFLOPS",
        "longest tail",
        "worst draw",
        "workload",
        "worst draw",
    )
    return render(
        header,
        [
            [
                one["case"],
                str(one["batches"]),
                str(one["window"]),
                f"{one['tflops']:g}",
                *(f"{100 * one[name]:+.1f} %" for name in ("gain", "worst", "workload", "workload_worst")),
            ]
            for one in counted
        ],
    )


def _real_table(real: Sequence[dict[str, float]]) -> str:
    means = {name: mean(one[name] for one in real) for name in real[0]}
    rows = [
        [name, f"{took_s:.1f}", f"{100 * (1 - took_s / means['fifo, window ' + name[-1]]):+.1f} %"]
        for name, took_s in means.items()
    ]
    saved = 1 - means["longest-tail, window 2"] / means["longest-tail, window 1"]
    text = render(("throttled fleet", "seconds", "less than fifo"), rows)
    return f"{text}\n\nwindow 2 instead of 1: {100 * saved:.1f} % less time"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="split_order", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--tflops", type=float, nargs="+", default=[1, 3, 6, 12, 25, 52], help="of the trainer, counted")
    add("--draws", type=int, default=100, help="of links")
    add("--repeats", type=int, default=2, help="of the runs in real time; 0 for none")
    add("--trainer-tflops", type=float, default=12.0, help="of the trainer, in real time")
    add("--batches", type=int, default=16, help="of each device, in real time")
    add("--scale", type=float, default=1.0, help="times the paper's fleet's times")
    add("--seed", type=int, default=3, help="of the links")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
