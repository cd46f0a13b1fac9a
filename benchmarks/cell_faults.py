"""What faults cost where several cells learn together: real processes, Mosquitto and gloo.

    python benchmarks/cell_faults.py --rows rank,broker,all --rounds 20 --json faults.json

Two cells have a broker, a trainer and a device each, which goes on sending. ``rank``: SIGKILL to one cell's
trainer, another one each time; ``broker``: to its broker; ``all``: to both trainers at once. While one
cell is struck, the other one has to go on journaling and receipting. At the end every sample is accounted
for, and the journals are folded anew together.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.fault_bench import Bench
from benchmarks.program import Tell, argument_of, run_program, teller
from benchmarks.result import about_this_run, write_json
from benchmarks.table import render
from broker_config.embedded.broker import EmbeddedBroker
from side_trainer.journal.journal import FILE_NAME, Journal
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.wire import unpack
from tests.forked import Process
from tests.until import until

FAULTS: Final = ("rank", "broker", "all")
_CELLS: Final = ("north", "south")
_WAIT_S: Final = 240.0
_FED: Final = 4  # samples a device and round


@dataclass(kw_only=True)
class Outcome:
    """A row of faults."""

    row: str
    rounds: int
    samples: int
    lost: int
    twice: int
    verified: bool
    alike: bool
    """Whether all cells ended with the same weights."""
    receipts_meanwhile: int
    """Rounds in which the other cell journaled what its device sent while the fault lasted."""
    wall_s: float


class CellsBench(Bench):
    """Two cells: a broker, a trainer and a device each. A context manager."""

    def __init__(self, folder: Path, seed: int, tell: Tell) -> None:
        super().__init__(folder, seed, tell)
        self.brokers = [self.broker, EmbeddedBroker(data_dir=folder / "broker-2", kind="mosquitto")]
        self.brokers[1].start()
        self.brokers[1].wait_ready()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.trainers: list[Process] = []

    def __enter__(self) -> CellsBench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.brokers[1].stop()

    def config(self) -> Path:
        path = self.folder / "trainer.toml"
        labels = ", ".join(f'"{one}"' for one in self.labels)
        path.write_text(
            f'job = "{self.job}"\nstate_dir = "{self.trainer_state}"\nlabels = [{labels}]\n'
            "metrics_port = -1\npage = false\ncheckpoint_every_s = 0.5\nidle_after_s = 0.3\n"
            "publish_every_s = 0.2\n[learner]\npasses = 1\nleast_updates = 0\n"
            "[side_network]\nwidth = 16\ninner = 16\n[flow]\nretry_s = 1.0\n"
            f'[tiers.small]\nbackbone = "{self.backbone}"\nlayers = 2\nbatch_size = 4\n'
            + "".join(
                f'[[cells]]\nname = "{name}"\nbroker.url = "{broker.url}"\nbroker.keepalive_s = 5\n'
                for name, broker in zip(_CELLS, self.brokers, strict=True)
            )
        )
        return path

    def trainer_of(self, rank: int) -> Process:
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(_CELLS)),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._port),
        }
        return self.start(f"trainer-{rank}", "trainer", "run", str(self.config()), env=env)

    def journal_of(self, rank: int) -> Journal:
        return Journal(self.trainer_state / "cells" / _CELLS[rank] / FILE_NAME, read_only=True)

    def journaled_in(self, rank: int) -> int:
        with contextlib.suppress(Exception), contextlib.closing(self.journal_of(rank)) as journal:
            return journal.samples()
        return 0

    def await_cell(self, rank: int) -> None:
        """Wait until all that its device was fed is journaled."""
        wanted = self.fed[f"dev-{rank}"]
        until(lambda: self.journaled_in(rank) >= wanted, f"cell {rank} journals", _WAIT_S)

    def await_all(self) -> None:
        for rank in range(len(_CELLS)):
            self.await_cell(rank)

    def found(self) -> Counter[tuple[int, int]]:
        """How often each sample is in a journal, by cell and label."""
        found: Counter[tuple[int, int]] = Counter()
        for rank in range(len(_CELLS)):
            with contextlib.closing(self.journal_of(rank)) as journal:
                for offset, _ in journal.batches(journal.tail):
                    batch = unpack(ActivationBatch, journal.get(offset).payload)
                    found.update((rank, int(target)) for target in batch.read_targets())
        return found


def struck(row: str, rounds: int, seed: int, tell: Tell) -> Outcome:
    """Strike so many times, and account for every sample."""
    began, rng, meanwhile = time.monotonic(), random.Random(seed), 0
    with (
        tempfile.TemporaryDirectory(prefix="sidestream-cells-") as folder,
        CellsBench(Path(folder), seed, tell) as bench,
    ):
        bench.trainers = [bench.trainer_of(rank) for rank in range(2)]
        for rank in range(2):
            bench.device(f"dev-{rank}", url=bench.brokers[rank].url)
            bench.feed(f"dev-{rank}", _FED)
        bench.await_all()
        for number in range(rounds):
            for rank in range(2):
                bench.feed(f"dev-{rank}", _FED)
            time.sleep(rng.uniform(0, 1.5))
            back = _strike(bench, row, number % 2)
            if row != "all":
                bench.feed(f"dev-{1 - number % 2}", _FED)
                bench.await_cell(1 - number % 2)
                meanwhile += 1
            back()
            tell(f"{row}: strike {number + 1} of {rounds}")
        bench.await_all()
        return _account(bench, row, rounds, meanwhile, began)


def _strike(bench: CellsBench, row: str, victim: int) -> Any:
    """Do it; return what mends it."""
    if row == "broker":
        broker = bench.brokers[victim]
        os.kill(broker.pid, signal.SIGKILL)
        until(lambda: not broker.running, "the broker is dead")

        def up() -> None:
            broker.start()
            broker.wait_ready()

        return up
    those = range(2) if row == "all" else [victim]
    for rank in those:
        bench.kill(bench.trainers[rank])

    def back() -> None:
        for rank in those:
            bench.trainers[rank] = bench.trainer_of(rank)

    return back


def _account(bench: CellsBench, row: str, rounds: int, meanwhile: int, began: float) -> Outcome:
    states = [bench.trainer_state / "cells" / name for name in _CELLS]

    def learnt() -> bool:
        found = [_learnt(state) for state in states]
        return all(one == bench.journaled_in(rank) for rank, one in enumerate(found))

    until(learnt, "all is learnt", _WAIT_S)
    for rank, trainer in enumerate(bench.trainers):
        trainer.send_signal(signal.SIGTERM)
        bench.expect_exit(trainer, f"trainer-{rank}", 90)
    found = bench.found()
    wanted = {(rank, at) for rank in range(2) for at in range(bench.fed[f"dev-{rank}"])}
    said = bench.run("trainer", "verify", "--cells", str(bench.folder / "trainer.toml"), patience_s=900)
    digests = {line.split()[1] for line in said.splitlines() if line.startswith("checkpoint")}
    return Outcome(
        row=row,
        rounds=rounds,
        samples=len(wanted),
        lost=len(wanted - found.keys()),
        twice=sum(count - 1 for count in found.values()) + len(found.keys() - wanted),
        verified=said.count("the digest matches") == len(_CELLS),
        alike=len(digests) == 1,
        receipts_meanwhile=meanwhile,
        wall_s=time.monotonic() - began,
    )


def _learnt(state: Path) -> int:
    from side_trainer.operator.status import read_state

    with contextlib.suppress(Exception):
        return read_state(state).samples_trained_unique
    return -1


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a row."""
    headings = ("row", "strikes", "samples", "lost", "twice", "verified", "alike", "other went on", "minutes")
    lines = [
        (
            *(one.row, str(one.rounds), str(one.samples), str(one.lost), str(one.twice)),
            *("yes" if one.verified else "NO", "yes" if one.alike else "NO"),
            *(
                "-" if one.row == "all" else f"{one.receipts_meanwhile} of {one.rounds}",
                f"{one.wall_s / 60:.1f}",
            ),
        )
        for one in outcomes
    ]
    return render(headings, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    about, tell, outcomes = about_this_run(), teller(), list[Outcome]()
    for row in args.rows:
        outcomes.append(struck(row, args.rounds, args.seed, tell))
        if args.json:
            write_json(args.json, about, {"results": [asdict(one) for one in outcomes]})
    return table(outcomes)


def _rows(text: str) -> list[str]:
    rows = text.split(",")
    if unknown := set(rows) - set(FAULTS):
        raise ValueError(f"{', '.join(sorted(unknown))}: write {', '.join(FAULTS)}")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cell_faults", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rows", type=argument_of(_rows), default=",".join(FAULTS), metavar="ROW,…", help="see above")
    add("--rounds", type=int, default=20, help="strikes a row")
    add("--seed", type=int, default=0, help="of the moments")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
