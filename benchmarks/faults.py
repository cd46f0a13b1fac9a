"""What Sidestream survives: real processes, Mosquitto, and one kind of fault after another.

    python benchmarks/faults.py --rows trainer-killed broker-forgets --rounds 50 --seed 7 --json faults.json

Every row feeds two devices, strikes, lets the fleet finish, and accounts for each sample by its content: none
may be missing, none may count twice, and re-folding the journal must give the trainer's weights. Exits 1 if
that does not hold in some row.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.fault_bench import Bench, Outcome
from benchmarks.fault_rows import ROWS as ONE_PROCESS
from benchmarks.fault_rows_fleet import ROWS as FLEET
from benchmarks.result import about_this_run, write_json
from benchmarks.table import render

ROWS: Final = {**ONE_PROCESS, **FLEET}
_HEADINGS: Final = ("fault", "strikes", "samples", "lost", "counted twice", "digest", "s", "seen")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    args = _parser().parse_args(arguments)
    about, outcomes = about_this_run(), []
    for seed in args.seed:
        for row in args.rows:
            outcomes.append(run_row(row, seed, args.rounds))
    print(table(outcomes))
    if args.json:
        write_json(args.json, about, {"rows": [dataclasses.asdict(outcome) for outcome in outcomes]})
    return 0 if all(outcome.good for outcome in outcomes) else 1


def run_row(row: str, seed: int, rounds: int) -> Outcome:
    """One fault, on a fresh fleet."""
    started_s = time.monotonic()

    def tell(text: str) -> None:
        print(
            f"{row}, seed {seed}, {time.monotonic() - started_s:.0f} s: {text}", file=sys.stderr, flush=True
        )

    with (
        tempfile.TemporaryDirectory(prefix="sidestream-faults-") as folder,
        Bench(Path(folder), seed, tell) as bench,
    ):
        try:
            outcome = ROWS[row](bench, row, seed, rounds)
        except BaseException:
            for log in sorted(bench.folder.glob("*.log")):
                tell(f"{log.name} ends: {log.read_text()[-1500:]}")
            raise
    outcome.wall_s = time.monotonic() - started_s
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown."""
    return render(_HEADINGS, [_line(outcome) for outcome in outcomes])


def _line(outcome: Outcome) -> list[str]:
    notes = ", ".join(f"{name} {value}" for name, value in outcome.notes.items())
    counts = (outcome.rounds, outcome.samples, outcome.lost, outcome.twice)
    matches = "matches" if outcome.verified else "DIFFERS"
    return [outcome.row, *map(str, counts), matches, f"{outcome.wall_s:.0f}", notes]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help="faults"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each fault strikes (default: 5)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of the moments (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
