"""Publishes the side-network: a bundle for each tier, inline where it fits, else in chunks; all retained.

A tier gets what it needs and no more: its own alignment map, and the blocks up to its last tap.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from metrics.catalogue import Content, TrainerMetrics
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.retained import Retained
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import TierRecord
from sidestream.contract.errors import BrokerError
from sidestream.contract.messages import WeightsChunk, WeightsManifest
from sidestream.contract.plan import Plan
from sidestream.contract.tasks import Scale
from sidestream.contract.tensors import Floats
from sidestream.contract.topics import Topics
from sidestream.contract.wire import TARGET_MESSAGE_BYTES, pack
from sidestream.host.now_and_then import NowAndThen
from sidestream.side_network.bundle import About, WeightsCodec, digest, encode_bundle
from sidestream.side_network.form import align_of, first_blocks

_log = logging.getLogger(__name__)
CHUNK_BYTES: Final = TARGET_MESSAGE_BYTES - 1024
"""Leaves room for a manifest's or a chunk's other fields and the topic."""
_HEADERS_BYTES: Final = 1024
_LEAST_CHUNK_BYTES: Final = 256
_WARN_EVERY_S: Final = 600.0


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of the side-network, about to be published."""

    number: int
    """Journal records folded in."""
    weights: Mapping[str, Floats]
    """Every parameter."""
    state_digest: str
    """Of all of them."""
    samples: int
    """Distinct samples in the journal."""
    scale: Scale
    """What answers are measured in."""
    final: bool
    """Whether training has gone idle with it."""


class Publisher:
    """Puts versions on the retained topics and takes old chunks off them.

    Args:
        transport: The broker.
        journal: Remembers what was published.
        metrics: Counts it.
        retained: Told of everything before it is published.
        signer: Signs the manifests.
        codec: How weights are written.
    """

    def __init__(
        self,
        transport: LeaderTransport,
        journal: Journal,
        metrics: TrainerMetrics,
        retained: Retained,
        signer: TrainerSigner,
        *,
        codec: WeightsCodec,
    ) -> None:
        self._transport = transport
        self._journal = journal
        self._metrics = metrics
        self._retained = retained
        self._signer = signer
        self._codec: WeightsCodec = codec
        self._made: tuple[tuple[int, str, frozenset[str]], Mapping[tuple[str, int], bytes]] | None = None
        self._warnings = NowAndThen(_WARN_EVERY_S)
        self.sizes: Mapping[str, int] = {}
        """Bytes of the last version's bundle, by tier."""

    @property
    def chunk_bytes(self) -> int:
        """How much of a bundle one message holds, on the present connection."""
        room = self._transport.max_packet_bytes - _HEADERS_BYTES
        return min(CHUNK_BYTES, max(room, _LEAST_CHUNK_BYTES))

    def publish(self, version: Version, plan: Plan, tiers: Mapping[str, TierRecord]) -> bool:
        """Publish a version to every settled tier; return False if the broker could not take all of it.

        What a device adopts is whole whenever it looks: chunks go first, then the manifest that names them,
        and only then do the chunks of the version before disappear.
        """
        if not self._transport.active:  # the next connection asks for it
            return False
        topics = Topics(plan.job)
        bundles = self._bundles(version, plan, tiers)
        self.sizes = {name: len(bundles[_key(tier)]) for name, tier in tiers.items()}
        part_bytes = self.chunk_bytes
        chunks = {name: _chunk_count(size, part_bytes) for name, size in self.sizes.items()}
        before = self._journal.published
        out = {**before, version.number: _most(chunks, before.get(version.number, {}))}
        self._journal.set_published(out)
        try:
            for name, tier in tiers.items():
                parts = _parts(bundles[_key(tier)], part_bytes) if chunks[name] else []
                self._publish_tier(topics, name, bundles[_key(tier)], version, plan.run, parts)
            for old, counts in sorted(out.items()):
                self._clear(topics, old, counts, chunks if old == version.number else {})
        except BrokerError as exc:
            text = "weights version %d not fully published yet: %s; it is tried again now and then"
            _log.log(self._warnings.level(), text, version.number, exc)
            return False
        if self._warnings.over():
            _log.info("weights version %d is published", version.number)
        self._journal.set_published({version.number: chunks})
        self._metrics.weights_version.set(version.number)
        return True

    def _bundles(
        self, version: Version, plan: Plan, tiers: Mapping[str, TierRecord]
    ) -> Mapping[tuple[str, int], bytes]:
        """A version's bundles; the last one's are kept, for what could not be published is tried again."""
        what = version.number, plan.run, frozenset(tiers)
        if self._made is None or self._made[0] != what:
            keys = set(map(_key, tiers.values()))
            self._made = what, {key: self._bundle(version, plan, tiers, *key) for key in keys}
        return self._made[1]

    def _clear(
        self, topics: Topics, version: int, chunks: Mapping[str, int], keep: Mapping[str, int]
    ) -> None:
        """Take a version's chunks off the broker, but for the first ones of each tier."""
        for tier, count in chunks.items():
            for index in range(keep.get(tier, 0), count):
                self._retain(topics.weights_chunk(tier, version, index), b"")

    def _publish_tier(
        self, topics: Topics, tier: str, bundle: bytes, version: Version, run: str, parts: Sequence[bytes]
    ) -> None:
        for index, part in enumerate(parts):
            chunk = pack(WeightsChunk(run=run, version=version.number, index=index, data=part))
            self._retain(topics.weights_chunk(tier, version.number, index), chunk)
            self._metrics.down_bytes.labels(tier, Content.WEIGHTS).inc(len(chunk))
        manifest = self._signer.manifest(
            WeightsManifest(
                run=run,
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
        self._retain(topics.weights(tier), manifest)
        self._metrics.down_bytes.labels(tier, Content.WEIGHTS).inc(len(manifest))
        self._metrics.weights_published.labels(tier).inc()

    def _retain(self, topic: str, payload: bytes) -> None:
        self._retained.publishing(topic, payload)
        self._transport.publish(topic, payload, retain=True)

    def _bundle(
        self, version: Version, plan: Plan, tiers: Mapping[str, TierRecord], align: str, blocks: int
    ) -> bytes:
        """What the tiers with an alignment map and a number of taps share."""
        members = {name: tier for name, tier in tiers.items() if _key(tier) == (align, blocks)}
        about = About(
            job=plan.job,
            run=plan.run,
            version=version.number,
            labels=plan.labels,
            task=plan.task,
            scale=version.scale,
            side_network=msgspec.structs.replace(plan.side_network, blocks=blocks),
            aligns={align: next(iter(members.values())).width},
            tiers=dict.fromkeys(members, align),
        )
        tensors = {name: a for name, a in version.weights.items() if align_of(name) in (None, align)}
        return encode_bundle(about, first_blocks(tensors, blocks), codec=self._codec)


def _key(tier: TierRecord) -> tuple[str, int]:
    """Tiers with the same one get the same bundle."""
    return tier.align, len(tier.taps)


def _chunk_count(size: int, part_bytes: int) -> int:
    """Messages that a bundle of so many bytes takes; 0 if it fits the manifest."""
    return 0 if size <= part_bytes else -(-size // part_bytes)


def _parts(bundle: bytes, part_bytes: int) -> list[bytes]:
    return [bundle[start : start + part_bytes] for start in range(0, len(bundle), part_bytes)]


def _most(counts: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
    """By tier the larger of two counts."""
    return {tier: max(counts.get(tier, 0), others.get(tier, 0)) for tier in {**others, **counts}}
