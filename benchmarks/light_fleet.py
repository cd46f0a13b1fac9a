"""Light devices: real outbox, sender and connection, and batches copied from one that an agent made.

They stand in for agents where it takes hundreds: no backbone, no samples, one process.
"""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry

from broker_config.connection.connection import Connection
from broker_config.settings import BrokerSettings
from broker_config.transport import Connected, Disconnected, Event, Received
from edge_agent.session.mailbox import Mailbox
from edge_agent.store.outbox import Consumed, Outbox
from edge_agent.store.streams import Slot
from edge_agent.uplink.in_flight import InFlight
from edge_agent.uplink.link_state import LinkState
from edge_agent.uplink.sender import Sender
from metrics.catalogue import AgentMetrics
from sidestream.contract.messages import ActivationBatch, Receipt, to_bin
from sidestream.contract.plan import FlowPlan
from sidestream.contract.topics import Topics
from sidestream.contract.wire import pack, unpack
from sidestream.host.trace import Trace

_LABELS: Final = 1000


class LightDevice:
    """One of them.

    Args:
        folder: For its outbox.
        url: The broker's.
        job: The job's name.
        name: Its name.
        model: A batch to copy, of as many rows as it shall have.
        labels: How many the job has.
    """

    def __init__(
        self, folder: Path, url: str, job: str, name: str, model: ActivationBatch, labels: int = _LABELS
    ) -> None:
        self._labels = labels
        folder.mkdir(parents=True)
        self.name = name
        self.connections = 0
        """How often it was connected."""
        self.receipt_s: list[float] = []
        """Of each batch that was receipted, the seconds since it was added."""
        self._added_s: dict[int, float] = {}
        self._topics = Topics(job)
        self._model = model
        self._sent = 0
        self._outbox = Outbox(folder, job=job, device=name, tier="small", max_bytes=2**30)
        self._mailbox = Mailbox()
        self._transport = Connection(BrokerSettings(url=url), client_id=f"sidestream-{job}-{name}")
        self._link = LinkState(self._mailbox.wake)
        self._link.begin(FlowPlan(window=4, retry_s=5.0))
        self._in_flight = InFlight(self._link, metrics=AgentMetrics(CollectorRegistry()), trace=Trace())
        self._sender = Sender(
            self._outbox,
            self._transport,
            self._topics.activations("small", name),
            self._topics.adapter("small", name),
            link=self._link,
            in_flight=self._in_flight,
            trace=Trace(),
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def start(self) -> None:
        """Connect, and send whatever is in the outbox."""
        self._transport.subscribe(self._topics.receipt("small", self.name))
        self._transport.start(self._mailbox.put)
        self._thread.start()

    def add(self) -> int:
        """Put one more batch into the outbox; return its rows."""
        rows = len(self._model.sample_ids)

        def packed(slot: Slot) -> bytes:
            targets = [(self._sent + row) % self._labels for row in range(rows)]
            samples = range(slot.first_sample, slot.first_sample + rows)
            keys = [hashlib.sha256(f"{slot.stream} {one}".encode()).digest()[:8] for one in samples]
            return pack(
                msgspec.structs.replace(
                    self._model,
                    stream=slot.stream,
                    sequence=slot.sequence,
                    floor=slot.floor,
                    previous=slot.previous,
                    samples=to_bin(list(samples), "<u4"),
                    targets=to_bin(targets, "<u2"),
                    keys=b"".join(keys),
                )
            )

        added_s = time.monotonic()
        (sequence,) = self._outbox.append_all([(packed, rows)], Consumed())
        self._added_s[sequence] = added_s
        self._sent += rows
        self._link.wake()
        return rows

    @property
    def waiting(self) -> int:
        """Batches without a receipt."""
        return self._outbox.size()[0]

    def close(self) -> None:
        self._stop.set()
        self._mailbox.wake()
        self._thread.join(10.0)
        self._transport.close()
        self._outbox.close()

    def _live(self) -> None:
        while not self._stop.is_set():
            for event in self._mailbox.take(0.5):
                self._on_event(event)
            while self._sender.send_next():
                pass

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Received):
            receipt = unpack(Receipt, event.payload)
            sequences, now_s = self._outbox.streams.receipt(receipt).sequences, time.monotonic()
            self.receipt_s += [now_s - self._added_s.pop(one, now_s) for one in sequences]
            self._in_flight.receipted(sequences)
        elif isinstance(event, Connected | Disconnected):
            self.connections += isinstance(event, Connected)
            self._link.connection(isinstance(event, Connected))
