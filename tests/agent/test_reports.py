"""How often a device reports: while something changes, and now and then while nothing does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from edge_agent.session.mailbox import Mailbox
from edge_agent.session.telemetry import TelemetryReport
from edge_agent.store.outbox import Outbox
from edge_agent.uplink.in_flight import InFlight
from edge_agent.uplink.link_state import LinkState
from metrics.catalogue import AgentMetrics
from metrics.fleet_page.fleet import SILENT_AFTER_S
from sidestream.contract.messages import Telemetry
from sidestream.contract.wire import pack, unpack
from sidestream.host.trace import Trace

EVERY_S = 5.0


class Reporting:
    """A device that does nothing, on a clock of its own."""

    def __init__(self, outbox: Outbox, every_s: float = EVERY_S) -> None:
        metrics = AgentMetrics(CollectorRegistry())
        context: Any = SimpleNamespace(
            config=SimpleNamespace(telemetry_every_s=every_s), outbox=outbox, metrics=metrics, budget=None
        )
        in_flight = InFlight(LinkState(), metrics=metrics, trace=Trace())
        self.outbox = outbox
        self.report = TelemetryReport(context, "telemetry", Mailbox(), in_flight)
        self.now = 0.0
        self.told: list[tuple[float, Telemetry]] = []

    def run(self, seconds: float) -> list[float]:
        """Let time pass; return when it reported."""
        until, heard = self.now + seconds, len(self.told)
        while self.now < until:
            if self.report.is_due(self.now):
                word = self.report.take(self.now, None, source_ended=False)
                if word is not None:
                    self.outbox.count("bytes_up", len(word.payload))
                    self.told.append((self.now, unpack(Telemetry, word.payload)))
            self.now += 0.5
        return [at for at, _ in self.told[heard:]]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Reporting]:
    with Outbox(tmp_path, job="lights", device="pi-1", tier="small", max_bytes=10**6) as outbox:
        yield Reporting(outbox)


def test_reports_are_rare_while_nothing_changes(device: Reporting) -> None:
    times = device.run(600)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps[0] == EVERY_S, "what is news is said twice"
    assert set(gaps[1:]) == {60} and 2 * max(gaps) <= SILENT_AFTER_S, "one that is lost makes nobody silent"


def test_what_changes_is_told_when_it_would_have_been_anyway(device: Reporting) -> None:
    device.run(600)
    device.outbox.count("samples_forwarded", 16)
    begun, times = device.now, device.run(50)
    assert len(times) == 2 and times[0] - begun <= EVERY_S and times[1] == times[0] + EVERY_S
    assert device.told[-1][1].samples_forwarded == 16


def test_news_and_a_trainer_that_has_come_are_told_of_what_has_not_changed(device: Reporting) -> None:
    device.run(600)
    device.report.due = True
    assert device.run(0.5), "at once"
    device.run(600)
    device.report.tell_anew()
    assert device.run(EVERY_S + 0.5)


def test_a_pause_that_is_long_already_is_kept(tmp_path: Path) -> None:
    with Outbox(tmp_path, job="lights", device="pi-1", tier="small", max_bytes=10**6) as outbox:
        times = Reporting(outbox, every_s=300).run(1501)
    assert times == [0, 300, 600, 900, 1200, 1500]


def test_what_is_at_its_default_does_not_travel(device: Reporting) -> None:
    device.run(1)
    told = device.told[0][1]
    assert b"samples_lost" not in pack(told) and unpack(Telemetry, pack(told)) == told
    assert len(pack(told)) < 400
