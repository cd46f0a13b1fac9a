"""How long a trainer needs to be where its checkpoint is, by the number of records in its journal.

    python benchmarks/restart.py --records 1000,100000,1000000

The journal is written without a broker: batches of two small rows of twelve devices, of which the last few
are not learnt from yet. What is timed is the opening of the journal and the fold's return to the checkpoint,
in a process that has done neither before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.program import Tell, argument_of, run_program, teller
from benchmarks.table import render
from side_trainer.fold.checkpoint import resume, write_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.file import digest_of
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.settings.schema import TrainerConfig
from side_trainer.settings.tier import TierConfig
from sidestream.contract.messages import ActivationBatch, Status, to_bin
from sidestream.contract.plan import labels_id
from sidestream.contract.tensors import Codec, encode
from sidestream.contract.wire import pack

_DEVICES: Final = 12
_WIDTH: Final = 64
_LABELS: Final = ("no", "yes")
_AT_ONCE: Final = 10_000


def write_journal(folder: Path, records: int, tell: Tell) -> None:
    """A journal of so many batches, and a checkpoint after all but the last few."""
    config = TrainerConfig(
        job="restart", state_dir=str(folder), labels=_LABELS, tiers={"tier": TierConfig(backbone="m")}
    )
    with contextlib.closing(Journal(folder / FILE_NAME)) as journal:
        job = Job(config, journal)
        first = Status(state="online", birth=1, stream="0" * 32, fingerprint="f", depth=6, width=_WIDTH)
        job.on_birth("tier", "device-0", first, 0.0)
        plan, rng = job.plan, np.random.default_rng(0)
        taps = plan.tiers["tier"].taps
        batch = ActivationBatch(
            stream="0" * 32,
            sequence=1,
            floor=1,
            fingerprint="f",
            labels_id=labels_id(_LABELS),
            taps=taps,
            sampling="mean",
            samples=to_bin([0, 1], "<u4"),
            lengths=to_bin([1, 1], "<u2"),
            targets=to_bin([0, 1], "<u2"),
            activations=encode(rng.standard_normal((len(taps), 2, _WIDTH)), Codec.INT2),
        )
        payload = pack(batch)
        start, digest = journal.tail, digest_of(payload)
        with journal.transaction():
            for device in range(_DEVICES):
                journal.db.execute(
                    "INSERT INTO streams (stream, device) VALUES (?, ?)",
                    (f"{device:032x}", f"device-{device}"),
                )
        for done in range(0, records, _AT_ONCE):
            rows = [
                (
                    start + 1 + at,
                    "batch",
                    "tier",
                    f"{at % _DEVICES:032x}",
                    at // _DEVICES + 1,
                    2,
                    payload,
                    digest,
                )
                for at in range(done, min(records, done + _AT_ONCE))
            ]
            with journal.transaction():
                journal.db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            tell(f"{done + len(rows)} of {records} records written")
    with contextlib.closing(Journal(folder / FILE_NAME)) as journal:
        fold = Fold(journal)
        while batches := journal.read(fold.offset, limit=1000):
            for record in batches:
                fold.apply(record)
        write_checkpoint(folder, fold, journal.run)


def restart(folder: Path) -> None:
    """Print how many seconds it takes, and how many rows there are then."""
    began = time.perf_counter()
    with contextlib.closing(Journal(folder / FILE_NAME)) as journal:
        fold = Fold(journal)
        assert resume(folder, fold, journal.run, journal.tail) is not None
        print(json.dumps([time.perf_counter() - began, fold.samples]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    if args.folder is not None:
        restart(args.folder)
        return ""
    tell, rows = teller(), []
    for records in args.records:
        with tempfile.TemporaryDirectory(prefix="sidestream-restart-") as folder:
            write_journal(Path(folder), records, tell)
            command = [sys.executable, __file__, "--folder", folder]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seconds, samples = json.loads(found.strip().splitlines()[-1])
            size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
            rows.append((f"{records:,}", f"{samples:,}", f"{size:,.0f}", f"{seconds:.2f}"))
    return render(("records", "samples", "MiB", "seconds to the checkpoint"), rows)


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="restart", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--records", type=argument_of(_numbers), default="1000,100000,1000000", metavar="N,…")
    add("--folder", type=Path, help="time this one, as the benchmark does in a process of its own")
    return parser


if __name__ == "__main__":
    sys.exit(main())
