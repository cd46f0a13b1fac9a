"""When the weights become a version that devices get: one that is worth its bytes, and the final one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final

from side_trainer.broadcast.pace import Pace
from side_trainer.broadcast.publisher import ALL, Place, Publisher, Version
from side_trainer.fold.fold import Fold
from side_trainer.fold.progress import Progress
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.tensors import Floats
from sidestream.host.trace import Trace
from sidestream.side_network.bundle import state_digest

_log = logging.getLogger(__name__)
_RETRY_S: Final = 1.0
_RETRY_MOST_S: Final = 60.0


class Releases:
    """Belongs to the learner's thread, :meth:`again` apart.

    Args:
        config: Cadences.
        fold: Has the weights.
        progress: How far they are.
        run: The journal's id.
        publisher: Where versions go.
        online: How many devices are online, by tier.
        trace: Told what is done when.
    """

    def __init__(
        self,
        config: TrainerConfig,
        fold: Fold,
        progress: Progress,
        run: str,
        publisher: Publisher,
        *,
        online: Callable[[], Mapping[str, int]],
        trace: Trace,
    ) -> None:
        self.config = config
        """May be changed by any thread."""
        self._fold = fold
        self._progress = progress
        self._run = run
        self._publisher = publisher
        self._online = online
        self._trace = trace
        self._pace = Pace(fold, online)
        self._last = -1  # the version that is out,
        self._last_final = False  # whether it was all that there is to learn,
        self._last_weights: Mapping[str, Floats] = {}  # what it was made of,
        self._last_tiers: Collection[str] = ()  # and who has it
        self._out: Version | None = None  # that version, and the one
        self._finished: Version | None = None  # that those have who want finished ones
        self._tried_at = 0.0
        self._published_at = 0.0
        self._again = False
        self._retry_s = 0.0  # after a version that could not be published: until it is tried again
        self._pending: tuple[Version, Mapping[str, Floats]] | None = None  # made, and not out yet

    def again(self) -> None:
        """There is a fresh connection, which needs the weights again; for any thread."""
        self._again, self._retry_s = True, 0.0

    def heard(self, size: int) -> None:
        """A device's message of so many bytes was folded."""
        self._pace.heard(size)

    def unchanged(self) -> None:
        """The record that was folded last changed no weights: a version that was up to date still is."""
        if self._last == self._progress.version - 1:
            self._last += 1

    def publish_if_due(self) -> None:
        """Publish what is worth it, at most every ``publish_every_s``, and the final version.

        None but a repeat before the last one can be everywhere.
        """
        version, now = self._progress.version, time.monotonic()
        if not self._fold.has_weights or version < self._progress.published:
            return
        if now - self._tried_at < self._retry_s:
            return
        again = self._is_known and (self._again or self._lacks_tiers)
        newer = version > self._last
        final = self._progress.final and (newer or not self._last_final)
        wait_s = _RETRY_S if again else self.config.publish_every_s
        if not final and now - self._tried_at < wait_s:
            return
        if not again and now - self._published_at < self._spreading_s():
            return
        if again or newer or final:
            self._publish(again=again, final=final)

    def _spreading_s(self) -> float:
        """How long the last version takes to reach the devices that are online now, at the rate allowed."""
        rate = self.config.max_down_mib_s * 2**20
        online = self._online()
        total = sum(size * online.get(tier, 0) for tier, size in self._publisher.sizes.items())
        return total / rate if rate else 0.0

    def _publish(self, *, again: bool, final: bool) -> None:
        weights, pending = self._fold.weights(), self._pending
        self._tried_at = time.monotonic()
        if pending is not None and not final:
            self._put(*pending)
        elif final or self._lacks_tiers or self._is_worth(weights):
            self._put(self._made_version(weights), weights)
        elif again and self._out is not None:  # what is out is out still, but perhaps no more on the broker
            self._put(self._out, self._last_weights)

    @property
    def _is_known(self) -> bool:
        """Whether devices may have a version of this journal."""
        return self._out is not None or self._progress.published > 0

    @property
    def _lacks_tiers(self) -> bool:
        """Whether a tier was settled since the last version, or it is not known what that was."""
        return self._is_known and self._fold.facts.tiers.keys() != self._last_tiers

    def _is_worth(self, weights: Mapping[str, Floats]) -> bool:
        newer = self._progress.version > self._last
        return newer and self._pace.is_worth(self.config, self._last_weights, weights)

    def _put(self, version: Version, weights: Mapping[str, Floats]) -> None:
        """Have devices get a version, and after a fresh connection what else stood on the broker."""
        repeated, self._again = self._again, False  # a connection that comes up meanwhile asks for it again
        self._published_at = self._tried_at
        began = self._trace.now()
        done = self._out_with(version, repeated=repeated)
        self._trace.add("publish", "learner", began, version=version.number, final=version.final)
        if not done:
            self._again = True
            self._retry_s = min(max(_RETRY_S, 2 * self._retry_s), _RETRY_MOST_S)
            return
        self._pending, self._retry_s = None, 0.0
        if version is self._out:
            return
        self._pace.published()
        self._out = version
        self._last, self._last_weights, self._last_tiers = version.number, weights, version.bundles.keys()
        self._last_final = version.final
        if version.final:
            _log.info("version %d is final: %d samples learnt", version.number, version.samples)

    def _out_with(self, version: Version, *, repeated: bool) -> bool:
        finished, job = self._finished, self.config.job
        if version.final or finished is None or finished.bundles.keys() != version.bundles.keys():
            finished = version
        places = ALL if finished is version else {Place.NEWEST}
        if not self._publisher.publish(version, job, places=places, keep=finished.number):
            return False
        self._finished = finished
        if repeated and finished is not version:
            return self._publisher.publish(finished, job, places={Place.FINISHED}, keep=version.number)
        return True

    def _made_version(self, weights: Mapping[str, Floats]) -> Version:
        """Today's version; the one that could not be published yet, as long as nothing has changed."""
        number, final = self._progress.version, self._progress.final
        if self._pending is not None and (self._pending[0].number, self._pending[0].final) == (number, final):
            return self._pending[0]
        version = Version(
            number=number,
            bundles=self._fold.method.bundles(self._run, number, self.config.weights_codec, final=final),
            state_digest=state_digest(weights),
            samples=self._fold.samples,
            final=final,
        )
        self._pending = version, weights
        return version
