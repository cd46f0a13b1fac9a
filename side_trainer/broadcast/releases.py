"""When the weights become a version that devices get: the first, one that has moved enough, the final one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final

from side_trainer.broadcast.publisher import Publisher, Version
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
        self._last = -1  # the version that is out,
        self._last_final = False  # whether it was all that there is to learn,
        self._last_weights: Mapping[str, Floats] = {}  # what it was made of,
        self._last_tiers: Collection[str] = ()  # and who has it
        self._tried_at = 0.0
        self._published_at = 0.0
        self._again = False
        self._retry_s = 0.0  # after a version that could not be published: until it is tried again
        self._pending: Version | None = None

    def again(self) -> None:
        """There is a fresh connection, which needs the weights again; for any thread."""
        self._again, self._retry_s = True, 0.0

    def publish_if_due(self) -> None:
        """Publish the first version, a changed one at most every ``publish_every_s``, and the final one.

        None but a repeat before the last one can be everywhere.
        """
        version, now = self._progress.version, time.monotonic()
        if not self._fold.has_weights or version < self._progress.published:
            return
        if now - self._tried_at < self._retry_s:
            return
        again = self._again or self._fold.facts.tiers.keys() != self._last_tiers
        newer = version > self._last
        final = self._progress.final and (newer or not self._last_final)
        wait_s = _RETRY_S if again else self.config.publish_every_s
        if not final and now - self._tried_at < wait_s:
            return
        if not again and now - self._published_at < self._spreading_s():
            return
        if again or newer or final:
            self._publish(forced=again or final)

    def _spreading_s(self) -> float:
        """How long the last version takes to reach the devices that are online now, at the rate allowed."""
        rate = self.config.max_down_mib_s * 2**20
        online = self._online()
        total = sum(size * online.get(tier, 0) for tier, size in self._publisher.sizes.items())
        return total / rate if rate else 0.0

    def _publish(self, *, forced: bool) -> None:
        weights = self._fold.weights()
        self._tried_at = time.monotonic()
        if not forced and not self._changed(weights):
            return
        version = self._made_version(weights)
        self._published_at = self._tried_at
        self._again = False  # before publishing: a connection that comes up meanwhile asks for it again
        began = self._trace.now()
        done = self._publisher.publish(version, self.config.job)
        self._trace.add("publish", "learner", began, version=version.number, final=version.final)
        if not done:
            self._again = True
            self._retry_s = min(max(_RETRY_S, 2 * self._retry_s), _RETRY_MOST_S)
            return
        self._pending, self._retry_s = None, 0.0
        self._last, self._last_weights, self._last_tiers = version.number, weights, version.bundles.keys()
        self._last_final = version.final
        if version.final:
            _log.info("version %d is final: %d samples learnt", version.number, version.samples)

    def _made_version(self, weights: Mapping[str, Floats]) -> Version:
        """Today's version; the one that could not be published yet, as long as nothing has changed."""
        pending, number, final = self._pending, self._progress.version, self._progress.final
        if pending is None or (pending.number, pending.final) != (number, final):
            self._pending = pending = Version(
                number=number,
                bundles=self._fold.method.bundles(self._run, number, self.config.weights_codec, final=final),
                state_digest=state_digest(weights),
                samples=self._fold.samples,
                final=final,
            )
        return pending

    def _changed(self, weights: Mapping[str, Floats]) -> bool:
        """Whether the weights moved enough since the last version to be worth every device's downlink."""
        before = self._last_weights
        if weights.keys() != before.keys():
            return True
        return self._fold.method.moved_by(before, weights) >= self.config.publish_change
