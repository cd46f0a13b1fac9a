"""The faults: each sets up a fleet, strikes so many times, and hands over the account."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.fault_bench import Bench, Outcome, Row
from benchmarks.fault_links import BadLink, Faults
from benchmarks.fault_machine import small_disk
from tests.until import until

_BATCHES: Final = 4
"""Fed to each device a round."""
_SAMPLES: Final = 4 * _BATCHES
_DARK_S: Final = 30.0
_DAY_S: Final = 86_400


def _feed_all(bench: Bench, rounds: int = 1) -> None:
    """A round's samples; fewer where there are many rounds, for a device has only so many labels."""
    samples = _SAMPLES if rounds <= 20 else _SAMPLES // 2
    for device in ("dev-a", "dev-b"):
        bench.feed(device, samples)


def trainer_killed(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
    """The trainer at random moments while batches come in."""
    agents = [bench.device(name) for name in ("dev-a", "dev-b")]
    for index in range(rounds):
        trainer = bench.trainer()
        _feed_all(bench, rounds)
        before = bench.journaled()
        bench.await_samples(min(before + bench.rng.randint(0, _SAMPLES), sum(bench.fed.values())))
        time.sleep(bench.rng.uniform(0.0, 0.3))
        bench.kill(trainer)
        bench.tell(f"{index + 1} of {rounds}")
    trainer = bench.trainer()
    bench.await_samples()
    assert all(agent.poll() is None for agent in agents)
    return bench.settle(row, seed, rounds, trainer)


def _trainer_at(*points: str, power_cut: bool = False) -> Row:
    def run(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
        for name in ("dev-a", "dev-b"):
            bench.device(name)
        bench.notes["cut_bytes"] = 0
        for index in range(rounds):
            point = points[index % len(points)]
            trainer = bench.trainer(point=f"{point}:{bench.rng.randint(1, 3)}")
            _feed_all(bench, rounds)
            bench.dies(trainer, "trainer")
            if power_cut:
                bench.notes["cut_bytes"] += bench.cut_power("trainer")
            bench.tell(f"{index + 1} of {rounds}: {point}")
        trainer = bench.trainer()
        bench.await_samples()
        return bench.settle(row, seed, rounds, trainer)

    return run


def agent_killed(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
    """An agent at random moments while it computes and sends."""
    trainer = bench.trainer()
    bench.device("dev-b")
    for index in range(rounds):
        _feed_all(bench, rounds)
        agent = bench.device("dev-a")
        before = bench.journaled()
        bench.await_samples(min(before + bench.rng.randint(0, _SAMPLES), sum(bench.fed.values())))
        time.sleep(bench.rng.uniform(0.0, 0.3))
        bench.kill(agent)
        bench.tell(f"{index + 1} of {rounds}")
    bench.device("dev-a")
    bench.await_samples()
    return bench.settle(row, seed, rounds, trainer)


def _agent_at(*points: str, power_cut: bool = False) -> Row:
    def run(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
        trainer = bench.trainer()
        bench.device("dev-b")
        bench.notes["cut_bytes"] = 0
        for index in range(rounds):
            point = points[index % len(points)]
            _feed_all(bench, rounds)
            agent = bench.device("dev-a", point=f"{point}:{bench.rng.randint(1, 3)}")
            bench.dies(agent, "dev-a")
            if power_cut:
                bench.notes["cut_bytes"] += bench.cut_power("dev-a")
            bench.tell(f"{index + 1} of {rounds}: {point}")
        bench.device("dev-a")
        bench.await_samples()
        return bench.settle(row, seed, rounds, trainer)

    return run


def _broker_killed(*, forget: bool) -> Row:
    def run(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
        trainer = bench.trainer()
        for name in ("dev-a", "dev-b"):
            bench.device(name)
        for index in range(rounds):
            _feed_all(bench, rounds)
            before = bench.journaled()
            bench.await_samples(min(before + bench.rng.randint(0, _SAMPLES), sum(bench.fed.values())))
            time.sleep(bench.rng.uniform(0.0, 0.2))
            bench.kill_broker(forget=forget, down_s=bench.rng.uniform(0.0, 0.5))
            bench.tell(f"{index + 1} of {rounds}")
        bench.await_samples()
        return bench.settle(row, seed, rounds, trainer)

    return run


def _link(**faults: float) -> Row:
    """Both devices, and the weights' way down, behind a link with these faults."""

    def run(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
        trainer = bench.trainer()
        with BadLink(bench.broker.port, seed) as link:
            link.faults = Faults(**faults)  # type: ignore[arg-type]
            for name in ("dev-a", "dev-b"):
                bench.device(name, url=link.url)
            for _ in range(rounds):
                _feed_all(bench)
                bench.await_samples()
            return bench.settle(row, seed, rounds, trainer)

    return run


def link_blackouts(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
    """Thirty seconds in which nothing passes and nobody is told, then good again."""
    trainer = bench.trainer()
    with BadLink(bench.broker.port, seed) as link:
        for name in ("dev-a", "dev-b"):
            bench.device(name, url=link.url)
        for index in range(rounds):
            _feed_all(bench)
            bench.await_samples(sum(bench.fed.values()) - bench.rng.randint(1, 2 * _SAMPLES))
            link.faults.dark = True
            _feed_all(bench)
            time.sleep(_DARK_S)
            link.faults.dark = False
            bench.await_samples()
            bench.tell(f"{index + 1} of {rounds}")
        return bench.settle(row, seed, rounds, trainer)


def link_half_open(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
    """The connections of the moment never carry a byte again and are never closed; new ones work."""
    trainer = bench.trainer()
    with BadLink(bench.broker.port, seed) as link:
        for name in ("dev-a", "dev-b"):
            bench.device(name, url=link.url)
        for index in range(rounds):
            _feed_all(bench)
            bench.await_samples(sum(bench.fed.values()) - bench.rng.randint(1, 2 * _SAMPLES))
            link.forsake()
            _feed_all(bench)
            bench.await_samples()
            bench.tell(f"{index + 1} of {rounds}")
        bench.notes["half_open"] = link.forsaken
        return bench.settle(row, seed, rounds, trainer)


def _full(bench: Bench, folder: Path) -> None:
    """Fill what is left of a small disk."""
    with contextlib.suppress(OSError), (folder / "ballast").open("ab", buffering=0) as file:
        for size in (2**20, 4096, 512, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)


def _disk_full(where: str) -> Row:
    """The state directory's disk fills up, and has room again after a while."""

    def run(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
        name = "trainer" if where == "trainer" else "dev-a"
        folder = bench.folder / name
        with small_disk(folder):
            trainer = bench.trainer()
            agents = [bench.device(device) for device in ("dev-a", "dev-b")]
            for index in range(rounds):
                _feed_all(bench)
                bench.await_samples(sum(bench.fed.values()) - bench.rng.randint(1, 2 * _SAMPLES))
                _full(bench, folder)
                _feed_all(bench)
                until(lambda: bench.complains(name), f"{name} says that it cannot write")
                time.sleep(bench.rng.uniform(0.0, 2.0))
                (folder / "ballast").unlink()
                bench.await_samples()
                bench.tell(f"{index + 1} of {rounds}")
            bench.notes["restarts"] = sum(process.poll() is not None for process in (trainer, *agents))
            return bench.settle(row, seed, rounds, trainer)

    return run


def _read_only(where: str) -> Row:
    """A process comes back to a state directory that is read-only: it says so, and nothing is lost."""

    def run(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
        name = "trainer" if where == "trainer" else "dev-a"
        with small_disk(bench.folder / name) as disk:
            processes = {"trainer": bench.trainer(), "dev-a": bench.device("dev-a")}
            bench.device("dev-b")
            for index in range(rounds):
                _feed_all(bench)
                bench.await_samples(sum(bench.fed.values()) - bench.rng.randint(1, 2 * _SAMPLES))
                bench.kill(processes[name])
                disk.read_only()
                refused = bench.trainer() if where == "trainer" else bench.device(name)
                assert refused.wait(60) == 1 and "cannot be written to" in bench.log(name)
                disk.writable()
                processes[name] = bench.trainer() if where == "trainer" else bench.device(name)
                bench.await_samples()
                bench.tell(f"{index + 1} of {rounds}")
            return bench.settle(row, seed, rounds, processes["trainer"])

    return run


def journal_page(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
    """A page of the journal changes on the disk: the trainer refuses to start; a backup brings it back."""
    trainer = bench.trainer()
    for name in ("dev-a", "dev-b"):
        bench.device(name)
    refused = 0
    for index in range(rounds):
        _feed_all(bench)
        bench.await_samples()
        bench.stop(trainer, "trainer")
        backup = bench.folder / f"backup-{index}"
        bench.run("trainer", "backup", "--state-dir", str(bench.trainer_state), "--out", str(backup))
        bench.damage(bench.trainer_state / "journal.db")
        trainer = bench.trainer()
        refused += trainer.wait(60) == 1
        assert "backup" in bench.log("trainer") and "Traceback" not in bench.log("trainer")
        shutil.rmtree(bench.trainer_state)
        shutil.copytree(backup, bench.trainer_state)
        trainer = bench.trainer()
        bench.tell(f"{index + 1} of {rounds}")
    assert refused == rounds
    _feed_all(bench)
    bench.await_samples()
    return bench.settle(row, seed, rounds, trainer)


def checkpoint_damaged(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
    """The newest checkpoint is damaged, and each other time both: the fold goes on from what is whole."""
    trainer = bench.trainer()
    for name in ("dev-a", "dev-b"):
        bench.device(name)
    for index in range(rounds):
        _feed_all(bench)
        bench.await_samples()
        until(lambda: bench.learnt() == bench.journaled(), "a checkpoint has it all")
        bench.kill(trainer)
        newest = sorted(bench.trainer_state.glob("checkpoint-*.safetensors"), reverse=True)
        for path in newest[: 1 + index % 2]:
            bench.damage(path)
        trainer = bench.trainer()
        until(lambda: "cannot be used" in bench.log("trainer"), "the damage is noticed")
        bench.tell(f"{index + 1} of {rounds}")
    _feed_all(bench)
    bench.await_samples()
    return bench.settle(row, seed, rounds, trainer)


def clock_jumps(bench: Bench, row: str, seed: int, rounds: int) -> Outcome:
    """Wall clocks of the trainer and of one device jump by a day, there and back."""
    clock = bench.folder / "clock"
    clock.write_text("0 1")
    trainer = bench.trainer(clock=clock)
    bench.device("dev-a", clock=clock)
    bench.device("dev-b")
    for index in range(rounds):
        _feed_all(bench)
        bench.await_samples(sum(bench.fed.values()) - bench.rng.randint(1, 2 * _SAMPLES))
        clock.write_text((f"{_DAY_S} 1", f"-{_DAY_S} 1", "0 1")[index % 3])
        _feed_all(bench)
        bench.await_samples()
        bench.tell(f"{index + 1} of {rounds}")
    return bench.settle(row, seed, rounds, trainer)


ROWS: Final[Mapping[str, Row]] = {
    "trainer-killed": trainer_killed,
    "trainer-killed-at-points": _trainer_at(
        "journaled", "checkpoint-written", "publishing", "checkpoint-named", "journal-commit"
    ),
    "trainer-power-cut": _trainer_at("journal-commit", power_cut=True),
    "agent-killed": agent_killed,
    "agent-killed-at-points": _agent_at("appended", "sent", "receipted", "outbox-commit"),
    "agent-power-cut": _agent_at("outbox-commit", power_cut=True),
    "broker-killed": _broker_killed(forget=False),
    "broker-forgets": _broker_killed(forget=True),
    "link-64kbit": _link(bits_per_s=64_000),
    "link-300ms": _link(delay_s=0.3),
    "link-5%-loss": _link(loss=0.05, delay_s=0.02),
    "link-blackouts": link_blackouts,
    "link-half-open": link_half_open,
    "device-disk-full": _disk_full("device"),
    "trainer-disk-full": _disk_full("trainer"),
    "device-read-only": _read_only("device"),
    "trainer-read-only": _read_only("trainer"),
    "journal-page-damaged": journal_page,
    "checkpoint-damaged": checkpoint_damaged,
    "clock-jumps": clock_jumps,
}
"""By the name that the command line takes."""
