"""Cells within one process: a thread for each, that meet as ranks do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from broker_config.settings import BrokerSettings
from side_trainer.cells.group import CellLost
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.journal.records import RecordKind
from side_trainer.settings.cells import CellConfig
from side_trainer.settings.schema import TrainerConfig
from side_trainer.side_tuning.in_cells import SideTuningInCells
from side_trainer.together import Together
from tests.trainer.conftest import FakeDevice, append, config, devices

PATIENCE_S = 20.0
T = TypeVar("T")


class Meeting:
    """Where the ranks meet: each puts something down, and takes what all have put down."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE_S)
        self.on_table: list[object] = [None] * size

    def exchange(self, rank: int, value: object) -> list[object]:
        try:
            self.on_table[rank] = value
            self.barrier.wait()
            found = list(self.on_table)
            self.barrier.wait()
        except threading.BrokenBarrierError:
            raise CellLost("a rank is gone") from None
        return found


class ThreadGroup:
    """One rank; ``fails_at`` its n-th act from now the rank is gone, and the others notice."""

    def __init__(self, rank: int, meetings: Callable[[], Meeting], size: int) -> None:
        self.rank, self.size, self.formed = rank, size, False
        self.fails_at = 0
        self._meetings, self._meeting = meetings, meetings()

    def form(self, wait_s: float = 0.0) -> bool:
        self._meeting = self._meetings()
        self.formed = not self._meeting.barrier.broken
        return self.formed

    def leave(self) -> None:
        self.formed = False
        self._meeting.barrier.abort()

    def _act(self, what: object, value: object) -> list[object]:
        if not self.formed:
            raise CellLost("not formed")
        self.fails_at -= 1
        if self.fails_at == 0:
            self.leave()
            raise CellLost("this one is struck")
        try:
            found = self._meeting.exchange(self.rank, (what, value))
        except CellLost:
            self.formed = False
            raise
        names, values = zip(*found, strict=True)
        assert set(names) == {what}, names
        return list(values)

    def gather(self, what: str, data: bytes) -> list[bytes]:
        return self._act(what, data)  # type: ignore[return-value]

    def add(self, values: torch.Tensor) -> None:
        found = self._act("add", values.clone())
        values.copy_(torch.stack(found).sum(dim=0))  # type: ignore[arg-type]


class Cell:
    """One cell: its journal, its fold, and what keeps it in step."""

    def __init__(
        self, folder: Path, settings: TrainerConfig, group: ThreadGroup, fleet: list[FakeDevice]
    ) -> None:
        self.settings, self.group, self.fleet = settings, group, fleet
        self.journal = Journal(folder / FILE_NAME)
        self.job = Job(settings, self.journal)
        self.fold = self.fresh()

    def fresh(self) -> Fold:
        """A fold from the first record on, in the place of the one before: as after a restart."""
        self.fold = Fold(self.journal, group=self.group)
        names = [cell.name for cell in self.settings.cells]
        self.together = Together(self.group, names, self.journal, self.fold, self.job.offer)  # type: ignore[arg-type]
        return self.fold

    @property
    def method(self) -> SideTuningInCells:
        assert isinstance(self.fold.method, SideTuningInCells)
        return self.fold.method

    def send(self, device: FakeDevice, batches: int = 1, rows: int = 8) -> None:
        for _ in range(batches):
            assert append(self.journal, device, device.batch(self.job.plan, rows=rows))

    def plain(self) -> None:
        """Fold what takes no other cell."""
        for record in self.journal.read(self.fold.offset, limit=10_000):
            if record.kind == RecordKind.STEP.value:
                return
            self.fold.apply(record)

    def round(self) -> bool:
        """What a learner does in a round: fold what there is, then the next step; whether there was any."""
        self.job.tick(0.0)
        self.plain()
        if not self.together.meet():
            raise CellLost("not all are there and agree")
        while records := self.journal.read(self.fold.offset, limit=1):
            self.fold.apply(records[0])
        return self.together.next_step(self.settings.learner, quiet=True)

    def learn(self) -> None:
        """Until nothing is left to do, or not all are there."""
        try:
            while self.round():
                pass
        except CellLost:
            pass


class Cells:
    """Some of them."""

    def __init__(self, cells: list[Cell], renew: Callable[[], None]) -> None:
        self.all = cells
        self._renew = renew
        self._pool = ThreadPoolExecutor(len(cells))

    def do(self, act: Callable[[Cell], T]) -> list[T]:
        """On all at once."""
        return [future.result(PATIENCE_S) for future in [self._pool.submit(act, cell) for cell in self.all]]

    def learn(self) -> None:
        """Meet anew, and go on until nothing is left."""
        self._renew()
        for cell in self.all:
            cell.group.formed = False
        self.do(Cell.learn)

    @property
    def digests(self) -> set[str]:
        return {cell.fold.digest() for cell in self.all}


def cell_settings(folder: Path, size: int = 2, **changes: object) -> TrainerConfig:
    cells = tuple(
        CellConfig(name=f"cell-{rank}", broker=BrokerSettings(url=f"mqtt://127.0.0.1:{1884 + rank}"))
        for rank in range(size)
    )
    made = config(folder, cells=cells, **changes)
    return msgspec.structs.replace(made, learner=msgspec.structs.replace(made.learner, dropout=0.0)).checked()


@contextmanager
def cells_of(folder: Path, size: int = 2, **changes: object) -> Iterator[Cells]:
    """Cells with the usual devices each, all tiers settled in all; dropout is a matter of whole processes."""
    settings = cell_settings(folder, size, **changes)
    meetings = [Meeting(size)]
    made = []
    with ExitStack() as stack:
        for rank in range(size):
            (folder / f"cell-{rank}").mkdir(parents=True)
            fleet = [
                FakeDevice(name=one.name, tier=one.tier, stream=f"{16 * rank + at:032x}", seed=16 * rank + at)
                for at, one in enumerate(devices())
            ]
            group = ThreadGroup(rank, lambda: meetings[-1], size)
            made.append(Cell(folder / f"cell-{rank}", settings, group, fleet))
            stack.callback(made[-1].journal.close)
            for device in fleet:
                made[-1].job.on_birth(device.tier, device.name, device.birth(), 0.0)
            made[
                -1
            ].plain()  # networks are made here: threads would share the generator of their first weights
        yield Cells(made, lambda: meetings.append(Meeting(size)))
