"""Verify what several cells have learnt together: their journals are folded in step, a process for each."""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Final

import msgspec
from torch.distributed import FileStore  # type: ignore[attr-defined, unused-ignore]

from side_trainer.cells.group import CellLost
from side_trainer.cells.torch_group import TorchGroup
from side_trainer.fold.checkpoint import Checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.fold.processors import set_threads
from side_trainer.fold.retention import begin
from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import RecordKind
from side_trainer.operator.audit import Verdict, judged, newest_of, placement_for
from side_trainer.operator.status import open_journal
from side_trainer.side_tuning.in_cells import STEP_KEY, SideTuningInCells
from side_trainer.together import Together
from sidestream.contract.errors import SidestreamError, StateError

_log = logging.getLogger(__name__)
_TELL_EVERY_S: Final = 2.0
_MEETS_S: Final = 60.0


def verify_cells(
    names: Sequence[str],
    state_dirs: Sequence[Path],
    *,
    threads: int = 1,
    tell: Callable[[str], None] = _log.info,
) -> list[Verdict]:
    """Fold the cells' journals together, and compare each with its newest checkpoint.

    Args:
        names: The cells', by rank.
        state_dirs: Likewise.
        threads: As the trainers' setting.
        tell: Given a line of progress every two seconds.

    Raises:
        StateError: a journal or a checkpoint is missing or damaged, or the journals do not go together.
    """
    for directory in state_dirs:
        with closing(open_journal(directory)) as journal:
            newest_of(directory, journal)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        ends = [context.Pipe(duplex=False) for _ in names]
        workers = [
            context.Process(
                target=_fold,
                args=(rank, list(names), directory, str(Path(meeting) / "store"), threads, ends[rank][1]),
                daemon=True,
            )
            for rank, directory in enumerate(state_dirs)
        ]
        for worker, (_, sends) in zip(workers, ends, strict=True):
            worker.start()
            sends.close()
        try:
            return _heard([hears for hears, _ in ends], names, tell)
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()


def _heard(ends: list[Connection], names: Sequence[str], tell: Callable[[str], None]) -> list[Verdict]:
    """What the workers say at last; lines of progress before that."""
    found: dict[int, Verdict] = {}
    while len(found) < len(ends):
        for end in wait([one for at, one in enumerate(ends) if at not in found]):
            assert isinstance(end, Connection)
            rank = ends.index(end)
            try:
                kind, _, text = end.recv_bytes().partition(b" ")
            except EOFError:
                raise StateError(f"the process that folded cell {names[rank]} is gone") from None
            if kind == b"told":
                tell(f"{names[rank]}: {text.decode()}")
            elif kind == b"wrong":
                raise StateError(f"cell {names[rank]}: {text.decode()}")
            else:
                found[rank] = msgspec.json.decode(text, type=Verdict)
    return [found[rank] for rank in range(len(ends))]


def _fold(rank: int, names: list[str], directory: Path, store: str, threads: int, says: Connection) -> None:
    """Fold one cell's journal, in a process of its own."""
    set_threads(threads)
    try:
        with closing(open_journal(directory)) as journal:
            group = TorchGroup(rank, len(names), lambda: FileStore(store, -1))
            verdict = _Folding(group, names, journal, newest_of(directory, journal), says).run()
            says.send_bytes(b"verdict " + msgspec.json.encode(verdict))
    except CellLost as exc:
        says.send_bytes(b"wrong " + f"the journals do not go together: {exc}".encode())
    except SidestreamError as exc:
        says.send_bytes(b"wrong " + str(exc).encode())


class _Folding:
    def __init__(
        self, group: TorchGroup, names: list[str], journal: Journal, checkpoint: Checkpoint, says: Connection
    ) -> None:
        self._group, self._journal, self._checkpoint, self._says = group, journal, checkpoint, says
        placement, self._elsewhere = placement_for(journal, checkpoint.about.offset)
        self._fold = Fold(journal, placement=placement, group=group)
        self._together = Together(group, names, journal, self._fold)
        self._told = time.monotonic()

    def run(self) -> Verdict:
        """Go on until every cell's checkpoint has been reached: the others take part till then."""
        about, verdict = self._checkpoint.about, None
        begun_at = begin(self._fold, self._journal)
        steps = int(self._checkpoint.arrays[STEP_KEY][0]) if STEP_KEY in self._checkpoint.arrays else 0
        while (record := self._next()) is not None and record.kind != RecordKind.STEP.value:
            self._fold.apply(record)
        self._meet()
        target = max(int(one) for one in self._group.gather("steps", str(steps).encode()))
        while self._fold.offset < about.offset or self._step < target:
            if self._fold.offset == about.offset:
                verdict = self._judged(begun_at)
            record = self._next()
            if record is None:
                raise StateError(f"its journal ends before step {target}, which another cell has learnt")
            self._fold.apply(record)
            self._tell(about.offset)
        return verdict or self._judged(begun_at)

    def _judged(self, begun_at: int) -> Verdict:
        return judged(self._fold, self._journal, self._checkpoint, begun_at, self._elsewhere)

    def _next(self) -> Record | None:
        return next(iter(self._journal.read(self._fold.offset, limit=1)), None)

    @property
    def _step(self) -> int:
        if not self._fold.begun:
            return 0
        assert isinstance(self._fold.method, SideTuningInCells)
        return self._fold.method.step

    def _meet(self) -> None:
        deadline_s = time.monotonic() + _MEETS_S
        while not self._together.meet():
            if time.monotonic() > deadline_s:
                raise StateError("the journals do not go together: settings or tiers differ")

    def _tell(self, of: int) -> None:
        if time.monotonic() - self._told > _TELL_EVERY_S:
            self._told = time.monotonic()
            self._says.send_bytes(f"told folded {self._fold.offset} of {of} records".encode())
