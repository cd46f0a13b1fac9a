"""The demo: a broker, a trainer and a fleet of real agents on this machine, as processes of their own.

Nothing here takes a short cut: settings files, MQTT topics, the metrics endpoint and the state directories
are all that it uses of trainer and agents, as an operator would.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from broker_config.embedded.broker import EmbeddedBroker
from broker_config.settings import BrokerSettings, masked_url
from side_trainer.operator.status import read_state
from sidestream.contract.quality import HEADLINE
from sidestream.demo.children import Children
from sidestream.demo.files import DemoSettings, FleetFiles
from sidestream.demo.report import Report, TierReport, summarise
from sidestream.demo.timeline import read_spans, timeline
from sidestream.top.watch import FleetWatch

_TELL_EVERY_S: Final = 2.0


class Demo:
    """One run, in a folder of its own.

    Args:
        settings: What to run.
        folder: For settings files, data, state and logs.
        tell: Given lines of progress.

    Raises:
        SidestreamError: if settings or data cannot be used.
    """

    def __init__(self, settings: DemoSettings, folder: Path, tell: Callable[[str], None]) -> None:
        self._settings = settings
        self._tell = tell
        self._files = FleetFiles(settings, folder)
        self._children = Children(folder)
        self._job = f"demo-{secrets.token_hex(4)}" if settings.broker else "demo"

    def run(self, stop: threading.Event) -> Report:
        """Run until every device has adopted and measured the final weights.

        Raises:
            SidestreamError: if the broker or a process fails.
            KeyboardInterrupt: if ``stop`` was set.
        """
        self._describe()
        started = time.monotonic()
        files, children = self._files, self._children
        with contextlib.ExitStack() as stack:
            broker, url = self._start_broker(stack)
            files.write(self._job, url)
            watch = FleetWatch(BrokerSettings(url=url), self._job, list(files.devices))
            stack.callback(watch.close)
            if self._settings.broker:
                stack.callback(watch.clear)  # somebody else's broker is left as it was found
            stack.callback(children.close)
            metrics_url = self._start_trainer(stop)
            self._start_agents()
            self._follow(watch, metrics_url, started, stop)
            wall_s = time.monotonic() - started
            figures = _scrape(metrics_url)
            trainer_peak = children.peak_rss_bytes("trainer")
            children.close()
            return Report(
                fleet=summarise(watch.devices(), self._settings.task),
                tiers=self._by_tier(watch),
                state=read_state(files.trainer_state),
                messages_received=int(figures.get("sidestream_messages_received_total{activations}", 0)),
                messages_rejected=int(figures.get("sidestream_messages_rejected_total", 0)),
                versions_published=int(
                    figures.get("sidestream_weights_published_total", 0) / len(files.devices)
                ),
                trainer_peak_rss_bytes=trainer_peak,
                left_out=tuple(files.left_out),
                wall_s=round(wall_s, 1),
                broker=broker,
            )

    def timeline(self) -> list[dict[str, Any]]:
        """What happened when, once it has run with ``settings.trace``: events in Chrome's trace format."""
        return timeline({name: read_spans(path) for name, path in self._files.traces.items()})

    def _describe(self) -> None:
        files = self._files
        self._tell(
            f"data      {len(files.train)} samples to train, {len(files.evaluation)} to evaluate; "
            + (f"{len(files.labels)} labels" if files.labels else self._settings.task.value)
        )
        for line in files.left_out:
            self._tell(f"          {line}")
        if strange := files.strange():
            self._tell(f"          {strange} of the evaluation samples have labels that are never trained")
        sizes = ", ".join(f"{len(devices)} {tier}" for tier, devices in files.devices.items())
        self._tell(
            f"fleet     {self._settings.devices} devices ({sizes}), Dirichlet alpha {self._settings.alpha:g}"
            if self._settings.devices > 1
            else f"device    one ({sizes}), method {self._settings.method}"
        )

    def _by_tier(self, watch: FleetWatch) -> dict[str, TierReport]:
        said = watch.devices()
        task = self._settings.task
        return {
            tier: summarise([one for one in said if one.tier == tier], task) for tier in self._files.devices
        }

    # --- processes -----------------------------------------------------------------------------------

    def _start_broker(self, stack: contextlib.ExitStack) -> tuple[str, str]:
        """What to call it, and its URL."""
        if self._settings.broker:
            shown = masked_url(self._settings.broker)
            self._tell(f"broker    {shown}, job {self._job}")
            return shown, self._settings.broker
        broker = stack.enter_context(EmbeddedBroker(data_dir=self._files.folder / "broker"))
        self._tell(f"broker    {broker.why}; {broker.url}")
        return broker.kind, broker.url

    def _start_trainer(self, stop: threading.Event) -> str:
        """Start it, wait until it runs; return its metrics' URL."""
        self._children.start("trainer", "sidestream.cli", "trainer", "run", str(self._files.trainer_toml))
        while (said := self._children.said("trainer", "metrics: ")) is None:
            self._pause(stop)
            self._children.check()
        url = said.partition(";")[0]
        page = self._children.said("trainer", "page: ")
        self._tell(f"trainer   fleet page at {page}, metrics at {url} while it runs")
        return url

    def _start_agents(self) -> None:
        for tier, devices in self._files.devices.items():
            paths = [str(self._files.agent_toml(device)) for device in devices]
            self._children.start(f"agents-{tier}", "sidestream.demo.crew", *paths)

    def _follow(self, watch: FleetWatch, metrics_url: str, started: float, stop: threading.Event) -> None:
        """Tell how it goes until all agents have finished."""
        crews = [f"agents-{tier}" for tier in self._files.devices]
        told_s, messages_before = time.monotonic(), 0.0
        while not all(self._children.ended(crew) for crew in crews):
            self._pause(stop)
            self._children.check(may_end=crews)
            now = time.monotonic()
            if now - told_s >= _TELL_EVERY_S:
                figures = _scrape(metrics_url)
                messages = figures.get("sidestream_messages_received_total{activations}", 0.0)
                rate = (messages - messages_before) / (now - told_s)
                told_s, messages_before = now, messages
                self._tell(self._progress(now - started, figures, watch, rate))
        self._children.check(may_end=crews)

    def _pause(self, stop: threading.Event) -> None:
        if stop.wait(0.1):
            raise KeyboardInterrupt

    def _progress(
        self, elapsed_s: float, figures: Mapping[str, float], watch: FleetWatch, rate: float
    ) -> str:
        headline = HEADLINE[self._settings.task]
        named = headline.replace("_", " ")
        quality = "  ".join(
            f"{name} {_ratio(tier.quality.get(headline))}" for name, tier in self._by_tier(watch).items()
        )
        losses = [value for name, value in figures.items() if name.startswith("sidestream_training_loss{")]
        losses = [value for value in losses if np.isfinite(value)]
        return (
            f"{elapsed_s:5.0f} s"
            f"   samples {figures.get('sidestream_samples_journaled_total', 0):.0f}/{len(self._files.train)}"
            f"   {rate:.1f} messages/s"
            f"   up {figures.get('sidestream_up_bytes_total', 0) / 2**20:.1f} MiB"
            f"   version {figures.get('sidestream_weights_version', 0):.0f}"
            f"   loss {_ratio(float(np.mean(losses)) if losses else None)}   {named} {quality}"
        )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _scrape(url: str) -> dict[str, float]:
    """Figures by metric name, summed over series; also by ``name{value}`` for each label value."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    figures: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for key in (sample.name, *(f"{sample.name}{{{value}}}" for value in sample.labels.values())):
                figures[key] = figures.get(key, 0.0) + sample.value
    return figures
