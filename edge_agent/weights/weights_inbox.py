"""From the weights topics to the adopter: which version is wanted, and its chunks where it has any."""

from __future__ import annotations

import logging
import time

from broker_config.transport import Transport
from edge_agent.weights.adoption import Adopter
from edge_agent.weights.choice import VersionChoice
from edge_agent.weights.chunks import Assembly
from sidestream.contract.messages import WeightsChunk, WeightsManifest

_PATIENCE_S = 15.0  # chunks that are still missing after so long are asked for again
log = logging.getLogger(__name__)


class WeightsInbox:
    """Hears of versions; belongs to one thread.

    Args:
        transport: Where versions and chunks are asked for.
        topic: Where the tier's versions stand, every one; chunks are below it.
        final_topic: Where the finished ones stand.
        choice: Which of the two is listened to.
    """

    def __init__(self, transport: Transport, topic: str, final_topic: str, choice: VersionChoice) -> None:
        self.newest: WeightsManifest | None = None
        """The run's last manifest that is not older than what is in use; before :meth:`begin`, any last."""
        self._transport = transport
        self._topic = topic
        self._final_topic = final_topic
        self._choice = choice
        self._versions = ""  # the topic that is listened to
        self._filter = ""
        self._run = ""
        self._adopter: Adopter | None = None
        self._assembly: Assembly | None = None
        self._asked_s = 0.0

    @property
    def final_only(self) -> bool:
        """Whether finished versions only are listened for."""
        return not self._choice.every

    @property
    def version(self) -> int:
        """Its version; 0 for none."""
        return self.newest.version if self.newest is not None else 0

    def listen(self) -> None:
        """Subscribe to the versions that are wanted now, and to no others."""
        wanted, before = self._topic if self._choice.every else self._final_topic, self._versions
        if wanted == before:
            return
        self._versions = wanted
        self._transport.subscribe(wanted)
        if before:
            why = "the budget for weights is used up" if self._choice.overspent else "the method needs them"
            log.info("from now on %s: %s", "every version" if self._choice.every else "final versions", why)
            self._transport.unsubscribe(before)

    def begin(self, run: str, adopter: Adopter, *, every: bool = False) -> None:
        """The plan is there: from now on, versions of its run go to the adopter.

        Args:
            run: The plan's.
            adopter: Whose they are.
            every: The plan's method cannot do without passing versions.
        """
        self._choice.needs_every = every
        self.listen()
        self._run, self._adopter = run, adopter
        heard, self.newest = self.newest, None
        if heard is not None:
            self.on_manifest(heard)

    def received(self, size: int) -> None:
        """So many bytes of weights have come."""
        self._choice.received(size)
        self.listen()

    def on_manifest(self, manifest: WeightsManifest) -> None:
        """A version was published.

        Raises:
            MismatchError: it is larger than a device takes.
        """
        if self._adopter is None:
            self.newest = manifest
        elif manifest.run != self._run:
            log.warning("ignored weights of run %s: the plan is of run %s", manifest.run[:8], self._run[:8])
        elif manifest.version < self._in_use(self._adopter):
            # Only what was checked and adopted raises the bar: a forged manifest may claim any version.
            in_use = self._in_use(self._adopter)
            log.warning("ignored weights version %d: %d is in use", manifest.version, in_use)
        else:
            self.newest = manifest
            self._get(manifest, self._adopter)

    @staticmethod
    def _in_use(adopter: Adopter) -> int:
        return adopter.in_use.version if adopter.in_use is not None else 0

    def on_chunk(self, chunk: WeightsChunk) -> None:
        """A part of a version came.

        Raises:
            DecodeError: the parts hold more than was announced.
        """
        if self._assembly is None or self._adopter is None:
            return
        bundle = self._assembly.add(chunk)
        if bundle is not None:
            self._adopter.offer(self._assembly.manifest, bundle)
            self._assembly = None
            self._listen_to("")

    def tick(self) -> None:
        """Ask again for chunks that do not come."""
        if self._assembly is not None and time.monotonic() - self._asked_s > _PATIENCE_S:
            self._ask(self._assembly.manifest)

    def _get(self, manifest: WeightsManifest, adopter: Adopter) -> None:
        if not adopter.wants(manifest):
            return
        if not manifest.chunks:
            adopter.offer(manifest, manifest.bundle)
        elif self._assembly is None or self._assembly.manifest != manifest:
            self._ask(manifest)

    def _ask(self, manifest: WeightsManifest) -> None:
        """A new subscription makes the broker send every chunk of the version that it retains."""
        self._assembly, self._asked_s = Assembly(manifest), time.monotonic()
        chunks = f"{self._topic}/{manifest.version}/"
        # The same filter a second time is no new subscription: ask by its other name.
        self._listen_to(chunks + ("#" if self._filter == chunks + "+" else "+"))

    def _listen_to(self, chunks: str) -> None:
        before, self._filter = self._filter, chunks
        if chunks:
            self._transport.subscribe(chunks)
        if before:
            self._transport.unsubscribe(before)
