"""Faults of a fleet: two trainers, two devices of one name, a storm, a slow trainer, a day without a link."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.fault_bench import Bench, Outcome, Row, resident_mib
from benchmarks.fault_links import BadLink
from benchmarks.light_fleet import LightDevice
from side_trainer.journal.journal import FILE_NAME, Journal
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.wire import unpack
from tests.until import until

_STORM: Final = 500
_DAY_S: Final = 86_400
_SPEED: Final = 960


def two_trainers(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
    """A second trainer is refused; started with --take-over, it deposes the first. Devices follow it."""
    trainer = bench.trainer()
    for name in ("dev-a", "dev-b"):
        bench.device(name)
    for index in range(rounds):
        for name in ("dev-a", "dev-b"):
            bench.feed(name, 16)
        bench.await_samples(sum(bench.fed.values()) - bench.rng.randint(0, 16))
        first, second = bench.trainer_state, bench.folder / f"trainer-{index}"
        log = len((bench.folder / "trainer.log").read_text())
        bench.trainer_state = second
        refused = bench.trainer()
        assert refused.wait(60) == 1, bench.log("trainer")
        said = (bench.folder / "trainer.log").read_text()[log:]
        assert "another trainer of this job is running" in said and trainer.poll() is None, said
        bench.trainer_state = first
        bench.await_samples()
        bench.trainer_state = second
        deposed, trainer = trainer, bench.trainer("--take-over")
        assert deposed.wait(60) == 1 and "has taken over" in bench.log("trainer")
        bench.await_samples()
        bench.tell(f"{index + 1} of {rounds}")
    return bench.settle(row, seed, rounds, trainer)


def _same_name(protocol: str) -> Row:
    def run(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
        bench.protocol = protocol
        bench.names["twin"], bench.first["twin"] = "dev-a", 500
        trainer = bench.trainer()
        twins = {name: bench.device(name) for name in ("dev-a", "twin")}
        for index in range(rounds):
            for name in twins:
                bench.feed(name, 16)
            until(lambda: any(bench.says(name, "has taken over") for name in twins), "one gives way", 120)
            loser = next(name for name in twins if bench.says(name, "has taken over"))
            winner = next(name for name in twins if name != loser)
            before = sum(bench.fed.values()) - 32
            bench.await_samples(before + 16)
            bench.stop(twins[winner], winner)
            bench.await_samples()
            (bench.folder / f"{loser}.log").write_text("")
            twins[winner] = bench.device(winner)
            bench.tell(f"{index + 1} of {rounds}: {loser} gave way, and came back once {winner} had left")
        return bench.settle(row, seed, rounds, trainer)

    return run


def storm(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
    """Five hundred devices (light ones) lose their broker at one moment, and all come back with a batch."""
    trainer = bench.trainer()
    bench.device("dev-a")
    bench.feed("dev-a", 4)
    bench.await_samples()
    model = any_batch(bench.trainer_state)
    fleet = [
        LightDevice(bench.folder / "light" / f"{index}", bench.url, bench.job, f"light-{index}", model)
        for index in range(_STORM)
    ]
    try:
        for device in fleet:
            device.start()
        until(lambda: all(device.connections for device in fleet), "all are connected", 120)
        for index in range(rounds):
            bench.kill_broker(forget=True)
            started_s = time.monotonic()
            for device in fleet:
                bench.fed[device.name] += device.add()
            bench.await_samples()
            until(lambda: all(device.waiting == 0 for device in fleet), "all is receipted", 120)
            bench.notes[f"storm_{index}_s"] = round(time.monotonic() - started_s, 1)
            bench.notes["trainer_mib"] = round(resident_mib(trainer.pid))
            bench.tell(f"{index + 1} of {rounds}")
    finally:
        for device in fleet:
            device.close()
    return bench.settle(row, seed, rounds, trainer)


def slow_trainer(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
    """Learning takes far longer than sending: the devices are paused, and nothing grows."""
    bench.learner_settings |= {"replay": "32", "replay_rows": "1024"}
    bench.settings |= {"max_backlog": "4", "idle_after_s": "60"}
    trainer = bench.trainer()
    agents = [bench.device(name) for name in ("dev-a", "dev-b")]
    most: dict[str, float] = {"backlog": 0, "trainer_mib": 0, "agent_mib": 0}
    for name in ("dev-a", "dev-b"):
        bench.feed(name, 24 * rounds)
    while bench.journaled() < sum(bench.fed.values()):
        most["trainer_mib"] = max(most["trainer_mib"], resident_mib(trainer.pid))
        most["agent_mib"] = max(most["agent_mib"], *(resident_mib(agent.pid) for agent in agents))
        most["backlog"] = max(most["backlog"], bench.backlog())
        time.sleep(0.2)
    assert bench.says("dev-a", "paused"), "back-pressure never reached a device"
    bench.notes |= {name: round(value) for name, value in most.items()}
    return bench.settle(row, seed, rounds, trainer)


def day_offline(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
    """A device is cut off for a day (of a clock that runs 960 times as fast) and its outbox is at its cap."""
    bench.tier_settings |= {"sampling": '"all"', "codec": '"f32"'}
    bench.settings["metrics_port"] = "0"
    clock = bench.folder / "clock"
    clock.write_text("0 1")
    bench.agent_settings |= {"outbox_max_mib": "1", "when_full": '"drop_oldest"'}
    trainer = bench.trainer()
    with BadLink(bench.broker.port, seed) as link:
        bench.device("dev-a", url=link.url, clock=clock)
        bench.feed("dev-a", 40)
        bench.await_samples()
        link.faults.dark = True
        link.forsake()
        clock.write_text(f"0 {_SPEED}")
        bench.feed("dev-a", 960)
        time.sleep(_DAY_S / _SPEED)
        clock.write_text("0 1")
        link.faults.dark = False
        until(
            lambda: bench.journaled() + bench.reported_drops() >= bench.fed["dev-a"], "it is all there", 240
        )
        time.sleep(2.0)
        bench.dropped = bench.reported_drops()
        bench.notes["dropped_and_reported"] = bench.dropped
        assert bench.dropped > 0, "nothing was dropped: the row shows nothing"
        return bench.settle(row, seed, 1, trainer)


def any_batch(state: Path) -> ActivationBatch:
    """Some batch of a journal."""
    with contextlib.closing(Journal(state / FILE_NAME, read_only=True)) as journal:
        return unpack(ActivationBatch, journal.get(journal.batches(journal.tail)[0][0]).payload)


ROWS: Final[Mapping[str, Row]] = {
    "two-trainers": two_trainers,
    "same-name-mqtt5": _same_name("5"),
    "same-name-mqtt3": _same_name("3.1.1"),
    "storm-of-500": storm,
    "slow-trainer": slow_trainer,
    "day-offline": day_offline,
}
