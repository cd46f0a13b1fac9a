"""The agent process: opens what it needs, stays in the job session after session, closes in order."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry

from broker_config.connection.connection import Connection
from broker_config.transport import Transport, Will
from edge_agent.config import AgentConfig, parse_part
from edge_agent.context import AgentContext, Connect, LoadBackbone
from edge_agent.samples.sources import open_source, read_evaluation
from edge_agent.session.duplicate_device import await_departure
from edge_agent.session.machine import detect_tier, device_name, keep_name, unique_name
from edge_agent.session.outcome import Outcome
from edge_agent.session.session import Session
from edge_agent.store.outbox import Outbox
from edge_agent.uplink.budget import LinkBudget
from edge_agent.weights.trust import Trust, read_trusted
from metrics.catalogue import AgentMetrics
from metrics.server import serve
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.runtimes import runtime_of, set_device, set_threads, shared_backbone
from sidestream.contract.plan import Precision
from sidestream.contract.tasks import Task
from sidestream.contract.topics import MAX_NAME_CHARS, Topics
from sidestream.host.secret_id import secret_id
from sidestream.host.state_dir import locked, prepare
from sidestream.host.trace import open_trace

log = logging.getLogger(__name__)
_MIB = 1024 * 1024


def connect_mqtt(config: AgentConfig, client_id: str, will: Will | None) -> Transport:
    """The real broker connection."""
    return Connection(config.broker, client_id=client_id, will=will)


class Agent:
    """An agent. Several may run in one process, each on a thread of its own; they share loaded backbones.

    Args:
        config: Its settings.
        stop: Set by a signal handler, or by :meth:`stop`.
        connect: Makes the transport; tests give the in-process one.
        load_backbone: Loads the frozen transformer; if not given, the runtime that the settings name does.
        started: Told once it is connected, with the metrics' URL, empty if they are not served.
        clock: Seconds, by which it waits, repeats and gives up; tests move it.
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        stop: threading.Event | None = None,
        connect: Connect = connect_mqtt,
        load_backbone: LoadBackbone | None = None,
        started: Callable[[str], None] = lambda metrics_url: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = config.device or device_name(config.state_path)
        """The device's name in the fleet."""
        self.tier = config.tier or detect_tier()
        """Its hardware tier."""
        self._given_name = bool(config.device)
        self._config = msgspec.structs.replace(config, device=self.name, tier=self.tier)
        self._stop = stop or threading.Event()
        self._connect = connect
        self._load_backbone = load_backbone or partial(shared_backbone, runtime=config.runtime)
        self._started = started
        self._clock = clock

    def stop(self) -> None:
        """Make :meth:`run` take leave and return soon."""
        self._stop.set()

    def run(self) -> int:
        """Take part in the job until stopped, or done where the settings ask for that.

        Returns:
            0.

        Raises:
            SidestreamError: something that the user has to mend.
        """
        patience_s = self._config.broker_wait_s
        while self._stay(patience_s):
            patience_s = 0.0
        return 0

    def _stay(self, patience_s: float) -> bool:
        """Take part under one name; whether to go on under another."""
        config = self._config
        with ExitStack() as stack:
            folder = prepare(config.state_path)
            stack.enter_context(locked(folder, "an agent"))
            if not self._given_name:
                keep_name(folder, self.name)
            context = self._open(folder, stack)
            url = ""
            if config.metrics_port >= 0:
                served = serve(context.metrics.registry, config.metrics_port, config.metrics_host)
                url = stack.enter_context(served).url
            outcome = Session(context).run(patience_s=patience_s, started=lambda: self._started(url))
            while outcome in (Outcome.NEW_PLAN, Outcome.DUPLICATE, Outcome.SET_BACK):
                if outcome is Outcome.DUPLICATE and self._rename(folder):
                    return True
                if outcome is Outcome.DUPLICATE:
                    self._await_departure()
                outcome = Session(context).run(patience_s=0.0, started=lambda: None)
        return False

    def _rename(self, folder: Path) -> bool:
        """Take a name of its own, where its host's is another device's too; whether that was done."""
        name = unique_name(self.name, folder)
        if self._given_name or len(name) > MAX_NAME_CHARS or name.endswith(self.name[-7:]):
            return False
        log.warning("another device is called %s too: this one goes by %s from now on", self.name, name)
        keep_name(folder, name)
        self.name = name
        self._config = msgspec.structs.replace(self._config, device=name)
        return True

    def _open(self, folder: Path, stack: ExitStack) -> AgentContext:
        """What all sessions work with; the stack closes it."""
        config, data = self._config, self._config.data
        trusted = read_trusted(config.trusted_keys_file)
        outbox = Outbox(
            folder,
            job=config.job,
            device=self.name,
            tier=self.tier,
            max_bytes=config.outbox_max_mib * _MIB,
            when_full=config.when_full,
            unlabelled_max_bytes=config.unlabelled_max_mib * _MIB,
            keep_share=config.keep_receipted_share,
        )
        stack.callback(outbox.close)
        rows = read_evaluation(data, parse_part(data.evaluation_part)) if data.evaluation_path else None
        stream = open_source(data, folder) if data.path == "-" else None
        if stream is not None:
            stack.callback(stream.close)
        return AgentContext(
            config=config,
            instance=secrets.token_hex(16),
            client_id=f"sidestream-{self.name}-{secret_id(folder)}",
            outbox=outbox,
            evaluation_rows=rows,
            stream=stream,
            connect=self._connect,
            load_backbone=self._load,
            metrics=AgentMetrics(CollectorRegistry()),
            stop=self._stop,
            trace=stack.enter_context(open_trace(config.trace_path)),
            trust=Trust(folder, job=config.job, tier=self.tier, given=trusted),
            clock=self._clock,
            budget=LinkBudget(config.max_kib_per_minute) if config.max_kib_per_minute else None,
        )

    def _load(self, reference: str, layers: int, precision: Precision, task: Task) -> Backbone:
        """On the producer's thread: importing a runtime takes longer than adopting retained weights."""
        config = self._config
        runtime = runtime_of(reference, config.runtime)
        if config.threads:
            set_threads(config.threads, runtime)
        set_device(config.compute_device, runtime)
        return self._load_backbone(reference, layers, precision, task)

    def _await_departure(self) -> None:
        """Keep away while another agent has this device's name."""
        config = self._config
        status = Topics(config.job).status(self.tier, self.name)
        client_id = f"sidestream-look-{secrets.token_hex(16)}"
        await_departure(lambda: self._connect(config, client_id, None), status, self._stop)
