"""Publishes weights: a bundle for each tier, inline where it fits, else in chunks; all retained."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from metrics.catalogue import Content, TrainerMetrics
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.retained import Retained
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.journal.journal import Journal
from sidestream.contract.errors import BrokerError
from sidestream.contract.messages import WeightsChunk, WeightsManifest
from sidestream.contract.topics import Topics
from sidestream.contract.wire import TARGET_MESSAGE_BYTES, pack
from sidestream.host.now_and_then import NowAndThen
from sidestream.side_network.bundle import digest

_log = logging.getLogger(__name__)
CHUNK_BYTES: Final = TARGET_MESSAGE_BYTES - 1024
"""Leaves room for a manifest's or a chunk's other fields and the topic."""
_HEADERS_BYTES: Final = 1024
_LEAST_CHUNK_BYTES: Final = 256
_WARN_EVERY_S: Final = 600.0


class Place(Enum):
    """Where versions stand. A device listens to one of the two."""

    NEWEST = auto()
    """Every version, until the next one."""
    FINISHED = auto()
    """A finished one until the next one is finished; the first good one until there is one."""


ALL: Final = frozenset(Place)


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of the side-network, about to be published."""

    number: int
    """Journal records folded in."""
    bundles: Mapping[str, bytes]
    """By settled tier, what its devices get."""
    state_digest: str
    """Of all weights."""
    samples: int
    """Distinct samples in the journal."""
    final: bool
    """Whether training has gone idle with it."""


class Publisher:
    """Puts versions on the retained topics and takes old chunks off them.

    Args:
        link: The broker.
        journal: Remembers what was published.
        metrics: Counts it.
        retained: Told of everything before it is published.
        signer: Signs the manifests.
    """

    def __init__(
        self,
        link: LeaderTransport,
        journal: Journal,
        metrics: TrainerMetrics,
        retained: Retained,
        signer: TrainerSigner,
    ) -> None:
        self._link = link
        self._journal = journal
        self._metrics = metrics
        self._retained = retained
        self._signer = signer
        self._warnings = NowAndThen(_WARN_EVERY_S)
        self.sizes: Mapping[str, int] = {}
        """Bytes of the last version's bundle, by tier."""

    @property
    def chunk_bytes(self) -> int:
        """How much of a bundle one message holds, on the present connection."""
        room = self._link.max_packet_bytes - _HEADERS_BYTES
        return min(CHUNK_BYTES, max(room, _LEAST_CHUNK_BYTES))

    def publish(self, version: Version, job: str, *, places: Collection[Place] = ALL, keep: int = 0) -> bool:
        """Publish a version to every settled tier; return False if the broker could not take all of it.

        What a device adopts is whole whenever it looks: chunks go first, then the manifest that names them,
        and only then do the chunks of earlier versions disappear.

        Args:
            version: What to publish.
            job: The job's name.
            places: Where it stands from now on.
            keep: Another version, which still stands somewhere: its chunks stay.
        """
        if not self._link.active:  # the next connection asks for it
            return False
        topics = Topics(job)
        sizes, part_bytes = {name: len(bundle) for name, bundle in version.bundles.items()}, self.chunk_bytes
        if Place.NEWEST in places:
            self.sizes = sizes
        chunks = {name: _chunk_count(size, part_bytes) for name, size in sizes.items()}
        before = self._journal.published
        out = {**before, version.number: _most(chunks, before.get(version.number, {}))}
        self._journal.published = out
        try:
            for name, bundle in version.bundles.items():
                parts = _parts(bundle, part_bytes) if chunks[name] else []
                self._publish_tier(topics, name, bundle, version, parts, places)
            for old, counts in sorted(out.items()):
                if old != keep or old == version.number:
                    self._clear(topics, old, counts, chunks if old == version.number else {})
        except BrokerError as exc:
            text = "weights version %d not fully published yet: %s; it is tried again now and then"
            _log.log(self._warnings.level(), text, version.number, exc)
            return False
        if self._warnings.over():
            _log.info("weights version %d is published", version.number)
        self._journal.published = {**{old: out[old] for old in out if old == keep}, version.number: chunks}
        if Place.NEWEST in places:
            self._metrics.weights_version.set(version.number)
        if Place.FINISHED in places:
            self._metrics.weights_finished.set(version.number)
        return True

    def _clear(
        self, topics: Topics, version: int, chunks: Mapping[str, int], keep: Mapping[str, int]
    ) -> None:
        """Take a version's chunks off the broker, but for the first ones of each tier."""
        for tier, count in chunks.items():
            for index in range(keep.get(tier, 0), count):
                self._retain(topics.weights_chunk(tier, version, index), b"")

    def _publish_tier(
        self,
        topics: Topics,
        tier: str,
        bundle: bytes,
        version: Version,
        parts: Sequence[bytes],
        places: Collection[Place],
    ) -> None:
        for index, part in enumerate(parts):
            chunk = pack(WeightsChunk(run=self._journal.run, version=version.number, index=index, data=part))
            self._retain(topics.weights_chunk(tier, version.number, index), chunk)
            self._metrics.down_bytes.labels(tier, Content.WEIGHTS).inc(len(chunk))
        manifest = self._signer.manifest(
            WeightsManifest(
                run=self._journal.run,
                version=version.number,
                state_digest=version.state_digest,
                bundle_digest=digest(bundle),
                bundle_bytes=len(bundle),
                chunks=len(parts),
                bundle=b"" if parts else bundle,
                samples=version.samples,
                final=version.final,
            ),
            tier,
        )
        for place, topic in (
            (Place.NEWEST, topics.weights(tier)),
            (Place.FINISHED, topics.final_weights(tier)),
        ):
            if place in places:
                self._retain(topic, manifest)
                self._metrics.down_bytes.labels(tier, Content.WEIGHTS).inc(len(manifest))
        self._metrics.weights_published.labels(tier).inc()

    def _retain(self, topic: str, payload: bytes) -> None:
        self._retained.publishing(topic, payload)
        self._link.publish(topic, payload, retain=True)


def _chunk_count(size: int, part_bytes: int) -> int:
    """Messages that a bundle of so many bytes takes; 0 if it fits the manifest."""
    return 0 if size <= part_bytes else -(-size // part_bytes)


def _parts(bundle: bytes, part_bytes: int) -> list[bytes]:
    return [bundle[start : start + part_bytes] for start in range(0, len(bundle), part_bytes)]


def _most(counts: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
    """By tier the larger of two counts."""
    return {tier: max(counts.get(tier, 0), others.get(tier, 0)) for tier in {**others, **counts}}
