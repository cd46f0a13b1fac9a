"""Whatever is restored, copied or rolled back, and in whatever order: nothing is lost unsaid, nothing counts
twice.

The real outbox, journal and receipts, with a network between them that loses, repeats and delays, and a hand
that puts state folders back, copies them to a second board, under the same name or another, and restores
backups."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from edge_agent.store.outbox import Consumed, Outbox
from edge_agent.store.streams import Slot
from metrics.catalogue import TrainerMetrics
from side_trainer.broadcast.downlink import Downlink
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.journal.journal import FILE_NAME, Claim, Journal
from side_trainer.operator.backup import backup
from side_trainer.receive.inbox import arrived
from sidestream.contract.messages import ActivationBatch, Receipt, to_bin
from sidestream.contract.tensors import Codec, decode, encode
from sidestream.contract.topics import Topics, Uplink
from sidestream.contract.wire import pack, unpack

TOPICS = Topics("j")
TIER = "t"
ROWS = 3


def message(outbox: Outbox, rows: list[int], slot: Slot) -> bytes:
    """A batch whose activations are the numbers of its rows."""
    return pack(
        ActivationBatch(
            stream=slot.stream,
            sequence=slot.sequence,
            floor=slot.floor,
            fingerprint="f",
            labels_id="l",
            taps=(1,),
            sampling="mean",
            samples=to_bin(np.arange(slot.first_sample, slot.first_sample + len(rows)), "<u4"),
            lengths=to_bin([1] * len(rows), "<u2"),
            targets=to_bin([0] * len(rows), "<u2"),
            activations=encode(np.array(rows, np.float32).reshape(1, -1, 1), Codec.F32),
            previous=slot.previous,
            keys=b"".join(outbox.name(key(row)) for row in rows),
        )
    )


def at(device: str) -> Uplink:
    return Uplink(tier=TIER, device=device, kind="activations")


def key(row: int) -> bytes:
    return row.to_bytes(16, "big")


@dataclass
class Wire:
    """Between them: what was sent and has not arrived, in order, and the retained receipts."""

    up: list[tuple[str, bytes]] = field(default_factory=list)
    down: list[tuple[str, bytes]] = field(default_factory=list)
    retained: dict[str, bytes] = field(default_factory=dict)
    fence: int = 0

    connected = True

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, timeout_s: float = 10.0
    ) -> None:
        device = topic.split("/")[-2]
        self.down.append((device, payload))
        if retain:
            self.retained[device] = payload


class Board:
    """A device: its state folder, its name, and the rows in its file."""

    def __init__(self, folder: Path, name: str, rows: list[int], room: int) -> None:
        self.folder, self.name, self.rows, self.room = folder, name, rows, room
        folder.mkdir(exist_ok=True)
        self.outbox = self._open()

    def _open(self) -> Outbox:
        return Outbox(self.folder, job="j", device=self.name, tier=TIER, max_bytes=self.room, keep_share=0.5)

    def produce(self, random: random.Random) -> None:
        todo = [row for row in self.rows if not self.outbox.is_consumed(key(row))][: random.randint(1, ROWS)]
        if todo and self.outbox.has_room():
            taken = Consumed(keys=[key(row) for row in todo])
            self.outbox.append_all([(lambda slot: message(self.outbox, todo, slot), len(todo))], taken)

    def send(self, wire: Wire) -> None:
        for waiting in self.outbox.streams.waiting(0, 4):
            wire.up.append((self.name, waiting.payload))

    def restart(self) -> None:
        self.outbox.close()
        self.outbox = self._open()

    def save(self, to: Path) -> None:
        self.outbox.close()
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.folder, to)
        self.outbox = self._open()

    def restore(self, saved: Path) -> None:
        self.outbox.close()
        shutil.rmtree(self.folder)
        shutil.copytree(saved, self.folder)
        self.outbox = self._open()

    @property
    def done(self) -> bool:
        return not self.outbox.size()[0] and all(self.outbox.is_consumed(key(row)) for row in self.rows)


class Trainer:
    """Journal and receipts, as the ingest thread makes them."""

    def __init__(self, folder: Path, wire: Wire) -> None:
        self.folder, self._wire, self._fence = folder, wire, 0
        folder.mkdir()
        self.start({})

    def start(self, boards: dict[str, Board]) -> None:
        self._fence += 1
        self.journal = Journal(self.folder / FILE_NAME)
        metrics = TrainerMetrics(CollectorRegistry())
        metrics.set_tiers((TIER,))
        self._wire.fence = self._fence
        self.downlink = Downlink(cast(LeaderTransport, self._wire), TOPICS, self.journal, metrics)
        for board in boards.values():
            self.greet(board)

    def greet(self, board: Board) -> None:
        for stream in board.outbox.streams.earlier():
            self.downlink.receipt(at(board.name), stream, retain=False)
        self.downlink.receipt(at(board.name), board.outbox.stream)

    def take(self, name: str, payload: bytes) -> None:
        batch = unpack(ActivationBatch, payload)
        one = arrived(batch, payload, TIER, name)
        with self.journal.transaction():
            claim = self.journal.append_batch(one).claim
        forked = {"forked_sequence": batch.sequence, "forked_digest": one.content}
        about: dict[str, Any] = forked if claim is Claim.FORKED else {}
        self.downlink.receipt(at(name), batch.stream, **about)

    def restore(self, saved: Path, boards: dict[str, Board]) -> None:
        self.journal.close()
        shutil.rmtree(self.folder)
        shutil.copytree(saved, self.folder)
        self.start(boards)

    def rows(self) -> Counter[int]:
        counted: Counter[int] = Counter()
        for record in self.journal.read(0, limit=10**6):
            batch = unpack(ActivationBatch, record.payload)
            counted.update(decode(batch.activations).reshape(-1).astype(int).tolist())
        return counted


class World:
    def __init__(self, folder: Path, seed: int, room: int, any_backup: bool) -> None:
        self.random = random.Random(seed)
        self.folder, self.wire, self.room, self.any_backup = folder, Wire(), room, any_backup
        self.boards: dict[str, Board] = {}
        self.saved_boards: list[Path] = []
        self.saved_trainers: list[Path] = []
        self.trainer = Trainer(folder / "trainer", self.wire)
        self.add("a", folder / "a", list(range(40)))

    def add(self, name: str, folder: Path, rows: list[int]) -> None:
        self.boards[name] = Board(folder, name, rows, self.room)
        self.trainer.greet(self.boards[name])

    def deliver(self, lossy: bool = True) -> None:
        up, self.wire.up = self.wire.up, []
        if lossy and self.random.random() < 0.3:
            self.random.shuffle(up)
        for name, payload in up:
            for _ in range(self.random.choice((0, 1, 1, 2)) if lossy else 1):
                self.trainer.take(name, payload)
        down, self.wire.down = self.wire.down, []
        for name, payload in down:
            if name in self.boards and not (lossy and self.random.random() < 0.3):
                self.hear(name, payload)

    def hear(self, name: str, payload: bytes) -> None:
        board = self.boards[name]
        if board.outbox.streams.receipt(unpack(Receipt, payload)).forked:
            self.trainer.greet(board)  # a new stream is a new birth

    def reconnect(self, board: Board) -> None:
        """What a board finds when it comes: the retained receipt, then the answer to its birth."""
        if (retained := self.wire.retained.get(board.name)) is not None:
            self.hear(board.name, retained)
        self.trainer.greet(board)

    def step(self) -> None:
        board = self.random.choice(list(self.boards.values()))
        action = self.random.choice(
            ("produce",) * 6 + ("send",) * 4 + ("deliver",) * 5
            + ("restart", "save", "restore", "copy", "back up", "set back", "trainer restarts")
        )  # fmt: skip
        if action == "produce":
            board.produce(self.random)
        elif action == "send":
            board.send(self.wire)
        elif action == "deliver":
            self.deliver()
        elif action == "restart":
            board.restart()
            self.reconnect(board)
        elif action == "save":
            self.saved_boards.append(self.folder / f"saved-{len(self.saved_boards)}")
            board.save(self.saved_boards[-1])
        elif action == "restore" and self.saved_boards:
            board.restore(self.random.choice(self.saved_boards))
            self.reconnect(board)
        elif action == "copy" and len(self.boards) < 3:
            name, number = f"copy-{len(self.boards)}", len(self.boards)
            board.save(self.folder / name)
            self.add(name, self.folder / name, list(range(100 * number, 100 * number + 20)))
        elif action == "back up":
            self.saved_trainers.append(self.folder / f"backup-{len(self.saved_trainers)}")
            backup(self.trainer.folder, self.saved_trainers[-1])
        elif action == "set back" and self.saved_trainers:
            saved = self.random.choice(self.saved_trainers) if self.any_backup else self.saved_trainers[-1]
            self.trainer.restore(saved, self.boards)
        elif action == "trainer restarts":
            self.trainer.journal.close()
            self.trainer.start(self.boards)

    def finish(self) -> None:
        for board in self.boards.values():
            self.reconnect(board)
        for _ in range(200):
            self.deliver(lossy=False)
            for board in self.boards.values():
                board.produce(self.random)
                board.send(self.wire)
            if all(board.done for board in self.boards.values()) and not self.wire.down:
                return
        raise AssertionError("it never comes to an end")

    def close(self) -> None:
        for board in self.boards.values():
            board.outbox.close()
        self.trainer.journal.close()


def live(world: World) -> None:
    for _ in range(100):
        world.step()
    world.finish()


@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_lost_and_nothing_counts_twice(tmp_path: Path, seed: int) -> None:
    world = World(tmp_path, seed, room=10**6, any_backup=False)
    try:
        live(world)
        counted = world.trainer.rows()
        assert set(counted) == {row for board in world.boards.values() for row in board.rows}
        assert set(counted.values()) == {1}
        assert not any(board.outbox.counters()["samples_lost"] for board in world.boards.values())
    finally:
        world.close()


@pytest.mark.parametrize("seed", range(100, 120))
def test_what_an_old_backup_and_a_small_outbox_cannot_give_back_is_told(tmp_path: Path, seed: int) -> None:
    world = World(tmp_path, seed, room=2500, any_backup=True)
    told = Counter[str]()
    try:
        live(world)
        counted = world.trainer.rows()
        for board in world.boards.values():
            told[board.name] = board.outbox.counters()["samples_lost"]
        missing = {row for board in world.boards.values() for row in board.rows} - set(counted)
        assert set(counted.values()) == {1}
        assert len(missing) <= told.total()
    finally:
        world.close()
