"""The ways in which a device may send a batch, and which of them its budgets pay for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_agent.batches import coded
from edge_agent.batches.assigned import Assigned
from edge_agent.batches.batch_maker import Ready
from edge_agent.batches.token_maker import maker_of
from edge_agent.samples.sample import Sample
from edge_agent.store.streams import Slot
from edge_agent.uplink.budget import Ladder, LinkBudget, SampleBudget
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.sampled import Sampled
from sidestream.contract.plan import Plan
from sidestream.contract.sampling import Rung, Sampling
from sidestream.contract.tasks import TASKS


class Rungs:
    """Makes batches by the rung that is chosen for each. Belongs to one thread.

    Args:
        backbone: The frozen transformer.
        plan: The job, ready for the tier.
        tier: This device's tier.
        max_message_bytes: Larger batches are split.
        assigned: What the trainer assigned to this device: no batch takes more than by that way to send.
        bytes_per_sample: The device's budget for samples; 0 for none.
        link: Its budget for the link, if it has one.
        backlog: Bytes that wait to be sent.
    """

    def __init__(
        self,
        backbone: Backbone,
        plan: Plan,
        tier: str,
        max_message_bytes: int,
        *,
        assigned: Assigned | None = None,
        bytes_per_sample: int = 0,
        link: LinkBudget | None = None,
        backlog: Callable[[], int] = lambda: 0,
    ) -> None:
        self.backbone = backbone
        """The frozen transformer."""
        self._assigned = assigned or Assigned(plan, tier)
        self.needs_labels = not TASKS[plan.task].generates
        """Whether a sample is of no use until it has one."""
        self.made_by = coded.made_by(plan.tiers[tier], plan.task)
        """What activations that wait for a label hang on."""
        rungs: tuple[Rung | None, ...] = (None,)
        if bytes_per_sample or link is not None:
            rungs = plan.tiers[tier].rungs(plan.task)
        self._makers = [maker_of(backbone, plan, tier, max_message_bytes, rung) for rung in rungs]
        self.maker = self._makers[0]
        """Of the batch in hand."""
        bounds = self._assigned.bounds
        self._assignable = {
            rung: maker_of(backbone, plan, tier, max_message_bytes, rung)
            for rung in (bounds.rungs if bounds is not None else ())
        }
        self._ladder = Ladder(
            len(rungs),
            sample=SampleBudget(bytes_per_sample) if bytes_per_sample else None,
            link=link,
            backlog=backlog,
        )

    @property
    def batch_size(self) -> int:
        """Samples in the next batch."""
        return self._assigned.way.batch_size

    def ready(self, sample: Sample) -> Sequence[Ready]:
        """What of a sample is to be computed.

        Raises:
            Unusable: the job can do nothing with it.
        """
        return self.maker.ready(sample)

    def compute(self, batch: Sequence[Ready]) -> Sampled:
        """The one forward pass of a batch; what is known of its length chooses the rung before it is made."""
        way = self._assigned.way
        return self._makers[0].compute(batch, partial(self._choose, way.rung), way.max_tokens)

    def usable(self, sampled: Sampled) -> npt.NDArray[np.bool_]:
        """[K]: rows that are finite, and fit a message."""
        return sampled.usable_rows() & self.maker.fits(sampled)

    def _choose(self, assigned: Rung | None, lengths: npt.NDArray[np.int64]) -> Sampling:
        costs = [one.body_bytes(lengths) for one in self._makers]
        chosen = self._ladder.choose(costs, len(lengths))
        self.maker = self._makers[chosen]
        if assigned is not None:
            maker = self._assignable[assigned]
            most = costs[chosen] if len(self._makers) > 1 else math.inf  # a budget may pay for less
            if maker.body_bytes(lengths) < most:  # infinite where a row would fit no message
                self.maker = maker
        return self.maker.sampling

    def keep(self, sampled: Sampled, rows: npt.NDArray[np.int64]) -> list[bytes]:
        """Quantise rows whose labels may come later; they count as sent."""
        self._ladder.set_aside(self._body_bytes(sampled, rows), len(rows))
        return [self.maker.keep(sampled, row) for row in rows.tolist()]

    def packers(
        self, sampled: Sampled, targets: Sequence[Any], rows: npt.NDArray[np.int64], keys: Sequence[bytes]
    ) -> list[tuple[Callable[[Slot], bytes], int]]:
        """What makes each message that rows are cut into, for its place in the stream, and its rows.

        Args:
            sampled: The batch.
            targets: Of each row of it.
            rows: Those to be sent.
            keys: By what the trainer knows each row of the batch again.
        """
        return [
            (self._counted(sampled, targets, part, keys), len(part))
            for part in self.maker.split(sampled, rows)
        ]

    def _counted(
        self, sampled: Sampled, targets: Sequence[Any], part: npt.NDArray[np.int64], keys: Sequence[bytes]
    ) -> Callable[[Slot], bytes]:
        """As the maker's, and the ladder is told what the message took."""
        packed = self.maker.packer(sampled, targets, part, [keys[row] for row in part.tolist()])
        body = self._body_bytes(sampled, part)

        def counted(slot: Slot) -> bytes:
            payload = packed(slot)
            self._ladder.spent(len(payload), body, len(part))
            return payload

        return counted

    def _body_bytes(self, sampled: Sampled, rows: npt.NDArray[np.int64]) -> float:
        return self.maker.body_bytes(sampled.lengths[rows])
