"""What thousands of devices cost the trainer: births, telemetry, its page, its metrics, and a storm.

    python benchmarks/thousands.py --sizes 1000 3000 10000 12000 --storm 2000 --json thousands.json

A real trainer and Mosquitto; devices that are a socket each (benchmarks/wire_devices.py), all in this
process. The fleet grows from size to size, and what is said of a size is of the devices that were added last,
or of all that are there. Processor time is the trainer's, less what it takes in as many seconds while nothing
arrives. At the end every device sends a batch, and then some of them lose their connection at one moment and
come back at once, while others send batches and telemetry.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

import numpy as np

from benchmarks.fault_bench import Bench, resident_mib
from benchmarks.fault_rows_fleet import any_batch
from benchmarks.poll import fetch, fetch_view
from benchmarks.program import Tell, run_program, teller
from benchmarks.result import about_this_run, write_json
from benchmarks.table import render
from benchmarks.wire_devices import WireDevice
from side_trainer.operator.status import read_state
from sidestream.contract.topics import Topics
from tests.forked import Process
from tests.until import until

_LABELS: Final = 8
_AT_ONCE: Final = 200
_SENDERS: Final = 32
_ENOUGH: Final = 0.5  # of telemetry has to be heard for a figure of one
_WAIT_S: Final = 600.0
_STORM_S: Final = 60.0
_HEADINGS: Final = (
    *("devices", "MiB", "quiet, CPU", "a birth, µs", "telemetry, µs", "heard", "page, first"),
    *("page, after that", "/metrics", "of online"),
)


class Fleet:
    """The trainer, and devices that grow in number.

    Args:
        bench: Its trainer has settled the tier.
        trainer: That trainer.
        every_s: How often each device reports.
        quiet_s: For how long it is seen what the trainer takes while nothing arrives.
    """

    def __init__(self, bench: Bench, trainer: Process, every_s: float, quiet_s: float) -> None:
        self.devices: list[WireDevice] = []
        self._bench = bench
        self._found(trainer)
        self._every_s = every_s
        self._quiet_s = quiet_s
        self._sent = 0
        self._port = int(bench.url.rpartition(":")[2])
        self._topics = Topics(bench.job)
        self._model = any_batch(bench.trainer_state)
        self._labels = bench.labels
        self._run = read_state(bench.trainer_state).run

    async def grow(self, size: int, seconds: float) -> dict[str, float]:
        """Let it become so large; what was seen."""
        new = [
            WireDevice(self._port, self._topics, number, self._model, self._labels, self._run)
            for number in range(len(self.devices), size)
        ]
        quiet = await self._quiet()
        births_s = await self._cost(_few_at_once(device.come for device in new), quiet)
        self.devices += new
        await self._reports(len(self.devices) / 1000)  # once each
        quiet = await self._quiet()
        mib = resident_mib(self._pid)
        before, sent = self._count("telemetry"), self._sent
        telemetry_s = await self._cost(self._reports(seconds), quiet)
        told, sent = self._count("telemetry") - before, self._sent - sent
        latency = await self._while_polled(self._reports(seconds), seconds)
        return {
            "devices": size,
            "rss_mib": mib,
            "quiet_share": quiet,
            "birth_us": 1e6 * births_s / len(new),
            "telemetry_us": 1e6 * telemetry_s / max(1, told),
            "telemetry_heard": told / sent,
            **latency,
            "unanswered": sum(one.unanswered for one in new),
            "online": self.online(),
        }

    def _found(self, trainer: Process) -> None:
        """Go on with a trainer that has just been started."""
        log = self._bench.folder / "trainer.log"
        until(lambda: "Ctrl-C stops it" in log.read_text(), "it runs")
        said = log.read_text()
        self._trainer_process, self._pid = trainer, trainer.pid
        self._page = said.rpartition("page: ")[2].split()[0]
        self._metrics = said.rpartition("metrics: ")[2].split(";")[0]

    async def rest(self, samples: int = 1) -> None:
        """Wait until so many samples are there, and learnt."""

        def learnt() -> bool:
            shown = self._trainer()
            return bool(shown.get("samples", 0) >= samples and shown.get("final"))

        await _until(learnt, "all is learnt")

    async def batches(self) -> dict[str, float]:
        """Have every device send one; what was seen."""
        began_s, samples = time.monotonic(), self._trainer()["samples"]
        await _few_at_once(device.send for device in self.devices)
        took_s = time.monotonic() - began_s
        await self.rest(samples + len(self.devices) * len(self._model.sample_ids))
        learnt_s, used_s = time.monotonic() - began_s, time.process_time()
        read_state(self._bench.trainer_state)
        return {
            "batches_s": took_s,
            "learnt_s": learnt_s,
            "rss_mib": resident_mib(self._pid),
            "status_cpu_s": time.process_time() - used_s,
        }

    async def storm(self, many: int, seconds: float) -> dict[str, float]:
        """Drop so many at one moment, and have them come back; what was seen."""
        senders, struck = self.devices[:_SENDERS], self.devices[_SENDERS : _SENDERS + many]
        spared = [*senders, *self.devices[_SENDERS + many :]]
        before = _receipts(senders)
        await asyncio.gather(self._sending(senders, seconds), self._reports(seconds, spared))
        calm = _receipts(senders)[len(before) :]
        statuses, dropped = self._count("status"), self._trainer().get("inbox_dropped", 0)
        connections = self._figure("sidestream_broker_reconnects_total")
        sending = asyncio.gather(self._sending(senders, seconds), self._reports(seconds, spared))
        online, began_s = self.online(), time.monotonic()
        for device in struck:
            device.unanswered = 0
            device.drop()
        await asyncio.gather(*(device.come() for device in struck))
        answered_s = time.monotonic() - began_s
        with contextlib.suppress(AssertionError):  # how many are missing is told
            await _until(lambda: self.online() >= online, "all are online again", _STORM_S)
        back_s = time.monotonic() - began_s
        await sending
        stormy = _receipts(senders)[len(before) + len(calm) :]
        return {
            "struck": len(struck),
            "statuses": self._count("status") - statuses,
            "answered_s": answered_s,
            "online_again_s": back_s,
            "missing": online - self.online(),
            "unanswered": sum(one.unanswered for one in struck),
            "inbox_dropped": self._trainer().get("inbox_dropped", 0) - dropped,
            "reconnects_of_trainer": self._figure("sidestream_broker_reconnects_total") - connections,
            "receipts": len(stormy),
            "calm_p95_s": float(np.percentile(calm, 95)),
            "storm_p95_s": float(np.percentile(stormy, 95)),
            "storm_max_s": max(stormy),
        }

    async def restart(self) -> dict[str, float]:
        """Stop the trainer and start it again; what was seen until it has everybody again."""
        online = self.online()
        self._bench.stop(self._trainer_process, "trainer")
        (self._bench.folder / "trainer.log").write_text("")
        began_s = time.monotonic()
        self._found(self._bench.trainer())
        up_s = time.monotonic() - began_s
        with contextlib.suppress(AssertionError):  # how many are missing is told
            await _until(lambda: self.online() >= online, "all are online again", _STORM_S)
        return {
            "online": self.online(),
            "up_s": up_s,
            "all_online_s": time.monotonic() - began_s,
            "cpu_s": _cpu_s(self._pid),
            "inbox_dropped": self._trainer().get("inbox_dropped", 0),
        }

    def online(self) -> int:
        """Devices that the page shows to be there."""
        return int(fetch_view(self._page)["fleet"].get("online", 0))

    def _trainer(self) -> dict[str, Any]:
        found: dict[str, Any] = fetch_view(self._page)["trainer"]
        return found

    def _count(self, kind: str) -> int:
        """Messages of a kind that the trainer has handled."""
        return self._figure(f'sidestream_messages_received_total{{kind="{kind}"}}')

    def _figure(self, wanted: str) -> int:
        """What one of the trainer's metrics stands at."""
        lines = fetch(self._metrics)[1].decode().splitlines()
        return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(wanted)))

    async def _quiet(self) -> float:
        """Seconds of processor time a second, while nothing arrives."""
        await asyncio.sleep(1.0)
        began_s, used_s = time.monotonic(), _cpu_s(self._pid)
        await asyncio.sleep(self._quiet_s)
        return (_cpu_s(self._pid) - used_s) / (time.monotonic() - began_s)

    async def _cost(self, doing: Awaitable[None], quiet: float) -> float:
        """Processor seconds of the trainer that something takes, beyond what it takes in that time anyway."""
        began_s, used_s = time.monotonic(), _cpu_s(self._pid)
        await doing
        await asyncio.sleep(1.0)
        return _cpu_s(self._pid) - used_s - quiet * (time.monotonic() - began_s)

    async def _reports(self, seconds: float, devices: Sequence[WireDevice] = ()) -> None:
        """Have devices report in turn, as often as they do; in less time than that, once each."""
        devices = devices or self.devices
        most = len(devices) * (1 if seconds < self._every_s else seconds / self._every_s)
        began_s = time.monotonic()
        for number in range(round(most)):
            devices[number % len(devices)].report(0.5 + number % 100 / 250)
            self._sent += 1
            await asyncio.sleep(max(0.0, began_s + seconds * number / most - time.monotonic()))

    async def _while_polled(self, doing: Awaitable[None], seconds: float) -> dict[str, float]:
        """Latencies of page and metrics in milliseconds while something is done."""
        command = ("-m", "benchmarks.poll", self._page, self._metrics, str(seconds))
        asking = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE
        )
        (said, _), _ = await asyncio.gather(asking.communicate(), doing)
        return {
            f"{name}_p{share}_ms": 1e3 * float(np.percentile(took, share))
            for name, took in json.loads(said).items()
            for share in (50, 95)
        }

    async def _sending(self, senders: Sequence[WireDevice], seconds: float) -> None:
        """Have some send a batch a second each for a while."""

        async def one(sender: WireDevice, wait_s: float) -> None:
            await asyncio.sleep(wait_s)
            for _ in range(max(1, round(seconds))):
                began_s = time.monotonic()
                await sender.send()
                await asyncio.sleep(max(0.0, began_s + 1.0 - time.monotonic()))

        await asyncio.gather(*(one(sender, place / len(senders)) for place, sender in enumerate(senders)))


async def _few_at_once(doing: Iterable[Callable[[], Awaitable[None]]]) -> None:
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(do: Callable[[], Awaitable[None]]) -> None:
        async with room:
            await do()

    await asyncio.gather(*map(one, doing))


async def _until(condition: Callable[[], bool], what: str, most_s: float = _WAIT_S) -> None:
    deadline_s = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain: {what}"
        await asyncio.sleep(0.2)


def _receipts(devices: Iterable[WireDevice]) -> list[float]:
    return [one for device in devices for one in device.receipt_s]


def _cpu_s(pid: int) -> float:
    """Processor time of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(
    sizes: Sequence[int], storm: int, seconds: float, every_s: float, quiet_s: float, tell: Tell
) -> dict[str, Any]:
    """Everything that is seen."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the broker inherits it
    with (
        tempfile.TemporaryDirectory(prefix="sidestream-thousands-") as folder,
        Bench(Path(folder), 0, lambda text: None) as bench,
    ):
        bench.labels = bench.labels[:_LABELS]
        bench.settings |= {"metrics_port": "0", "page": "true", "page_port": "0"}
        bench.settings |= {"checkpoint_every_s": "30", "publish_every_s": "60"}
        bench.retry_s = 10.0  # as it is where nobody says otherwise
        bench.settings["idle_after_s"] = str(quiet_s)
        trainer = bench.trainer()
        bench.device("dev-a")
        bench.feed("dev-a", 1)
        bench.await_samples()
        fleet = Fleet(bench, trainer, every_s, quiet_s)
        return asyncio.run(_all(fleet, sizes, storm, seconds, tell))


async def _all(fleet: Fleet, sizes: Sequence[int], storm: int, seconds: float, tell: Tell) -> dict[str, Any]:
    try:
        return await _seen(fleet, sizes, storm, seconds, tell)
    finally:
        for device in fleet.devices:
            device.drop()
        await asyncio.sleep(0.1)  # for sockets to be closed


async def _seen(fleet: Fleet, sizes: Sequence[int], storm: int, seconds: float, tell: Tell) -> dict[str, Any]:
    rows = []
    await fleet.rest()
    for size in sizes:
        rows.append(await fleet.grow(size, seconds))
        tell(json.dumps({name: round(value, 3) for name, value in rows[-1].items()}))
    seen: dict[str, Any] = {"rows": rows, "restart": await fleet.restart(), "batches": await fleet.batches()}
    tell(json.dumps(seen["restart"] | seen["batches"]))
    return {**seen, "storm": await fleet.storm(storm, seconds) if storm else {}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    about = about_this_run()
    seen = measure(args.sizes, args.storm, args.seconds, args.every_s, args.quiet_s, teller())
    if args.json:
        write_json(args.json, about, seen)
    first, last = seen["rows"][0], seen["rows"][-1]
    text = render(_HEADINGS, [_line(row) for row in seen["rows"]])
    if last["devices"] > first["devices"]:
        grown = (last["rss_mib"] - first["rss_mib"]) * 1024 / (last["devices"] - first["devices"])
        text += f"\n\n{grown:.1f} KiB a device"
    for name in ("restart", "batches", "storm"):
        text += f"\n{name}: " + ", ".join(f"{key} {round(value, 2)}" for key, value in seen[name].items())
    return text


def _line(row: dict[str, float]) -> list[str]:
    def both(name: str) -> str:
        return f"{row[f'{name}_p50_ms']:.0f}, {row[f'{name}_p95_ms']:.0f} ms"

    return [
        f"{row['devices']:,.0f}",
        f"{row['rss_mib']:.0f}",
        f"{100 * row['quiet_share']:.1f} %",
        f"{row['birth_us']:.0f}",
        f"{row['telemetry_us']:.0f}" if row["telemetry_heard"] > _ENOUGH else "-",
        f"{100 * row['telemetry_heard']:.0f} %",
        *map(both, ("first", "live", "metrics")),
        f"{row['online']:,.0f}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        *("--sizes", "-n"), nargs="+", type=int, default=[1000, 3000, 10_000, 12_000], help="of the fleet"
    )
    parser.add_argument("--storm", type=int, default=2000, help="devices that are dropped; 0 for none")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default: 20)")
    parser.add_argument(
        "--every-s", type=float, default=5.0, help="a device reports so often (default: 5, as agents do)"
    )
    parser.add_argument("--quiet-s", type=float, default=5.0, help="seconds of what it takes anyway")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
