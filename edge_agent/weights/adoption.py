"""New weights: checked against the plan, swapped in, saved, measured. The newest one only.

Takes short turns on the thread that computes. A bundle that fails a check is refused and logged, and the old
one stays.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from edge_agent.batches.side_tasks import NOT_DUE
from edge_agent.weights.adopted import Adopted, load_adopted, save_adopted
from edge_agent.weights.evaluation import Score
from edge_agent.weights.trust import Trust
from metrics.catalogue import AgentMetrics
from sidestream.contract.errors import DecodeError, MismatchError, StateError, StorageError, WireError
from sidestream.contract.messages import WeightsManifest
from sidestream.contract.plan import Plan
from sidestream.host.trace import Trace
from sidestream.side_network.bundle import digest

_PACE = 10  # versions other than the final one may take up a tenth of the time
_MOST_PAUSE_S = 60.0
_WAITING = 2  # offers
log = logging.getLogger(__name__)


class InUse(NamedTuple):
    """The version in use, and how it did."""

    run: str
    version: int
    bundle_digest: str
    network: Any
    """What the method's bundles are used as."""
    score: Score | None
    """None until measured."""
    final: bool = False
    """Whether it is known to be all that there is to learn."""


class Opened(NamedTuple):
    """A bundle, opened."""

    run: str
    """The journal,"""
    version: int
    """and the version that it says it is of."""
    network: Any
    """What it is used as."""


Reader = Callable[[bytes], Opened]


class Evaluation(Protocol):
    """The device's evaluation samples."""

    def extend(self) -> bool:
        """Do with some samples that are new what can be done before a version is there.

        Returns:
            Whether there were any.
        """

    def measure(self, network: Any, align: str) -> Score | None:
        """How well a version answers; None if stopped meanwhile."""


class _Offer(NamedTuple):
    manifest: WeightsManifest
    bundle: bytes


class Adopter:
    """Adopts offered weights.

    :meth:`turn` and :meth:`evaluate_with` belong to one thread; the rest may be called from any.

    Args:
        state_dir: Where the weights in use are kept.
        plan: The job, ready for the tier.
        tier: This device's tier.
        backbone: Where this device has its backbone, for ``predict``.
        read: Opens a bundle; raises a WireError where it is not the plan's.
        on_change: Called after each adoption and each measurement.
        on_refused: Called after each version that failed a check.
        metrics: Counts them.
        trace: Told what is done when.
        trust: Told which version is in use.
        wake: Called when there is something to do.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        state_dir: Path,
        plan: Plan,
        tier: str,
        *,
        backbone: str,
        read: Reader,
        on_change: Callable[[], None],
        on_refused: Callable[[], None],
        metrics: AgentMetrics,
        trace: Trace,
        trust: Trust,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state_dir = state_dir
        self._plan = plan
        self._about = Adopted(
            run=plan.run,
            version=0,
            bundle_digest="",
            state_digest="",
            tier=tier,
            tier_plan=plan.tiers[tier],
            backbone=backbone,
            method=plan.method,
        )
        self._read = read
        self._on_change = on_change
        self._on_refused = on_refused
        self._metrics = metrics
        self._trace = trace
        self._trust = trust
        self._in_use: InUse | None = None
        self._evaluation: Evaluation | None = None
        self._offers: list[_Offer] = []
        self._wake = wake
        self._clock = clock
        self._earliest_s = 0.0
        self._cost_s = 0.0  # of the version in use
        self._lock = threading.Lock()
        self._restore()

    @property
    def in_use(self) -> InUse | None:
        """The version in use, if any was ever adopted."""
        return self._in_use

    def wants(self, manifest: WeightsManifest) -> bool:
        """Whether a version is newer than the one in use."""
        in_use = self._in_use
        if in_use is None or manifest.version > in_use.version:
            return True
        # What was not final may be so now, with nothing learnt in between.
        changed = manifest.bundle_digest != in_use.bundle_digest
        return manifest.final and not in_use.final and manifest.version == in_use.version and changed

    def offer(self, manifest: WeightsManifest, bundle: bytes) -> None:
        """Offer a version of the plan's run; of those that wait the two newest stay."""
        with self._lock:
            # Two, for the newest may be forged, and refused. The last offered need not be the newest: a
            # finished version stands on its topic for long.
            waiting = [*self._offers, _Offer(manifest, bundle)]
            self._offers = sorted(waiting, key=lambda one: one.manifest.version)[-_WAITING:]
        self._wake()

    def evaluate_with(self, evaluation: Evaluation) -> None:
        """The backbone is there: measure the version in use, and all later ones."""
        self._evaluation = evaluation

    def turn(self) -> float:
        """Adopt, prepare measuring or measure, whichever is next.

        Returns:
            The seconds until there is more to do.
        """
        started = self._clock()
        offer, left_s = self._due_offer()
        if offer is not None:
            self._consider(offer)
            self._cost_s = 0.0
        elif self._evaluation is None or not self._unmeasured():
            return left_s
        elif self._evaluation.extend():  # each sample once: no cost of a version
            return 0.0
        else:
            self._measure()
        self._cost_s += self._clock() - started
        self._earliest_s = self._clock() + min(_PACE * self._cost_s, _MOST_PAUSE_S)
        return 0.0

    def _due_offer(self) -> tuple[_Offer | None, float]:
        """An offer whose time has come, if there is one; or the seconds until then."""
        with self._lock:
            if not self._offers:
                return None, NOT_DUE
            offer = self._offers[-1]
            left_s = 0.0 if offer.manifest.final else self._earliest_s - self._clock()
            if left_s > 0:
                return None, left_s
            self._offers.pop()
            return offer, 0.0

    def _unmeasured(self) -> bool:
        return self._in_use is not None and self._in_use.score is None

    def _consider(self, offer: _Offer) -> None:
        manifest, data = offer
        if not self.wants(manifest):
            return
        started = self._trace.now()
        try:
            network = _opened(manifest, data, self._read)
        except WireError as exc:
            log.error("weights version %d refused: %s", manifest.version, exc)
            self._on_refused()
            return
        before = self._in_use
        try:
            save_adopted(self._state_dir, self._adopted(manifest), data)
        except StorageError as exc:
            log.error("version %d is used, but a restart will not find it: %s", manifest.version, exc)
        self._trust.adopted_weights(manifest.run, manifest.version)
        self._in_use = InUse(
            manifest.run, manifest.version, manifest.bundle_digest, network, None, manifest.final
        )
        self._metrics.weights_adopted.inc()
        self._trace.add("adopt", "weights", started, version=manifest.version, bytes=len(data))
        log.info(
            "adopted weights version %d (%s, %d bytes, before: %s)",
            *(manifest.version, manifest.bundle_digest[:12], len(data)),
            before.version if before else "none",
        )
        self._on_change()

    def _measure(self) -> None:
        evaluation, in_use = self._evaluation, self._in_use
        assert evaluation is not None and in_use is not None
        started = self._trace.now()
        with self._metrics.evaluation_seconds.time():
            score = evaluation.measure(in_use.network, self._about.tier_plan.align)
        self._trace.add("evaluate", "weights", started, version=in_use.version)
        if score is not None:
            self._in_use = in_use._replace(score=score)
            self._on_change()

    def _adopted(self, manifest: WeightsManifest) -> Adopted:
        return msgspec.structs.replace(
            self._about,
            run=manifest.run,
            version=manifest.version,
            bundle_digest=manifest.bundle_digest,
            state_digest=manifest.state_digest,
        )

    def _restore(self) -> None:
        """Go on with what was adopted before a restart, if the plan still fits it."""
        try:
            kept = load_adopted(self._state_dir)
            if kept is None:
                return
            if kept.adopted.run != self._plan.run:
                log.info("the weights adopted before are of another run of the trainer; waiting for new ones")
                return
            network = self._read(kept.data).network
        except (StateError, WireError) as exc:
            log.warning("the weights adopted before cannot be used: %s", exc)
            return
        self._in_use = InUse(
            kept.adopted.run, kept.adopted.version, kept.adopted.bundle_digest, network, None
        )


def _opened(manifest: WeightsManifest, data: bytes, read: Reader) -> Any:
    """What a bundle is used as, if it is the one that the manifest announces."""
    if len(data) != manifest.bundle_bytes or digest(data) != manifest.bundle_digest:
        raise DecodeError("the bundle is not the one that the manifest announces")
    opened = read(data)
    if (opened.run, opened.version) != (manifest.run, manifest.version):
        raise MismatchError(f"the bundle is version {opened.version} of run {opened.run[:8]}")
    return opened.network
