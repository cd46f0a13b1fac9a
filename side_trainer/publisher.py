"""Publishes the side-network: one bundle a tier, inline where it fits, else in chunks. All of it retained."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from broker_config.transport import Transport
from contract.bundle import About, digest, encode_bundle
from contract.errors import BrokerError
from contract.messages import WeightsChunk, WeightsManifest
from contract.plan import Plan
from contract.side_network import align_of
from contract.tensors import Floats
from contract.topics import Topics
from contract.wire import TARGET_MESSAGE_BYTES, pack
from metrics.catalogue import Content, TrainerMetrics
from side_trainer.fold import TierRecord
from side_trainer.journal import Journal
from side_trainer.retained import Retained

_log = logging.getLogger(__name__)
CHUNK_BYTES: Final = TARGET_MESSAGE_BYTES - 4096
"""Leaves room for a manifest's or a chunk's other fields."""


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
    final: bool
    """Whether training has gone idle with it."""


class Publisher:
    """Puts versions on the retained topics and takes old chunks off them.

    Args:
        transport: The broker.
        journal: Remembers what was published.
        metrics: Counts it.
        retained: Told of everything before it is published.
        half: Send float16.
    """

    def __init__(
        self,
        transport: Transport,
        journal: Journal,
        metrics: TrainerMetrics,
        retained: Retained,
        *,
        half: bool,
    ) -> None:
        self._transport = transport
        self._journal = journal
        self._metrics = metrics
        self._retained = retained
        self._half = half

    def publish(self, version: Version, plan: Plan, tiers: Mapping[str, TierRecord]) -> bool:
        """Publish a version to every settled tier; return False if the broker could not take all of it.

        What a device adopts is whole whenever it looks: chunks go first, then the manifest that names them,
        and only then do the chunks of the version before disappear.
        """
        topics = Topics(plan.job)
        bundles = {
            align: self._bundle(version, plan, tiers, align) for align in {t.align for t in tiers.values()}
        }
        chunks = {name: _chunk_count(bundles[tier.align]) for name, tier in tiers.items()}
        out = {**self._journal.published, version.number: chunks}
        self._journal.set_published(out)
        try:
            for name, tier in tiers.items():
                self._publish_tier(topics, name, bundles[tier.align], version, plan.run, chunks[name])
            for old in sorted(out.keys() - {version.number}):
                self._clear(topics, old, out[old])
        except BrokerError as exc:
            _log.warning("weights version %d not fully published yet: %s", version.number, exc)
            return False
        self._journal.set_published({version.number: chunks})
        self._metrics.weights_version.set(version.number)
        return True

    def _clear(self, topics: Topics, version: int, chunks: Mapping[str, int]) -> None:
        """Take a version's chunks off the broker."""
        for tier, count in chunks.items():
            for index in range(count):
                self._retain(topics.weights_chunk(tier, version, index), b"")

    def _publish_tier(
        self, topics: Topics, tier: str, bundle: bytes, version: Version, run: str, chunks: int
    ) -> None:
        for index in range(chunks):
            part = bundle[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            chunk = pack(WeightsChunk(run=run, version=version.number, index=index, data=part))
            self._retain(topics.weights_chunk(tier, version.number, index), chunk)
            self._metrics.down_bytes.labels(tier, Content.WEIGHTS).inc(len(chunk))
        manifest = pack(
            WeightsManifest(
                run=run,
                version=version.number,
                state_digest=version.state_digest,
                bundle_digest=digest(bundle),
                bundle_bytes=len(bundle),
                chunks=chunks,
                bundle=b"" if chunks else bundle,
                samples=version.samples,
                final=version.final,
            )
        )
        self._retain(topics.weights(tier), manifest)
        self._metrics.down_bytes.labels(tier, Content.WEIGHTS).inc(len(manifest))
        self._metrics.weights_published.labels(tier).inc()

    def _retain(self, topic: str, payload: bytes) -> None:
        self._retained.publishing(topic, payload)
        self._transport.publish(topic, payload, retain=True)

    def _bundle(self, version: Version, plan: Plan, tiers: Mapping[str, TierRecord], align: str) -> bytes:
        members = {name: tier for name, tier in tiers.items() if tier.align == align}
        about = About(
            job=plan.job,
            run=plan.run,
            version=version.number,
            labels=plan.labels,
            side_network=plan.side_network,
            aligns={align: next(iter(members.values())).width},
            tiers=dict.fromkeys(members, align),
        )
        tensors = {name: a for name, a in version.weights.items() if align_of(name) in (None, align)}
        return encode_bundle(about, tensors, half=self._half)


def _chunk_count(bundle: bytes) -> int:
    """Messages that a bundle takes; 0 if it fits the manifest."""
    return 0 if len(bundle) <= CHUNK_BYTES else -(-len(bundle) // CHUNK_BYTES)
