"""Messages of a language-model job: windows through the decoder, and rows cut so that each fits a message.

Every sampled token is a vector with a target of its own, and the side-network looks at each alone. So a row
that is too long for a message is cut anywhere without losing anything; its parts are numbered as rows are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from edge_agent.batches.batch_maker import BatchMaker, Ready
from edge_agent.batches.targets import Unusable
from edge_agent.samples.sample import Row, Sample
from sidestream.backbone.backbone import Backbone, Choose
from sidestream.backbone.language_model import LanguageModel
from sidestream.backbone.sampled import Sampled, starts_of
from sidestream.backbone.windows import Window
from sidestream.contract.plan import Plan
from sidestream.contract.sampling import EVERY_TOKEN, Rung
from sidestream.contract.tasks import TASKS, write_tokens

_TARGET_BYTES = 3


class TokenMaker(BatchMaker):
    """As :class:`edge_agent.batches.batch_maker.BatchMaker`, for a language model."""

    def __init__(
        self, model: LanguageModel, plan: Plan, tier: str, max_message_bytes: int, rung: Rung | None = None
    ) -> None:
        super().__init__(model, plan, tier, max_message_bytes, rung)
        self.model = model
        """The decoder."""
        self._most_vectors = self._fitting()

    def ready(self, sample: Sample) -> list[Ready]:
        """A long text's windows each have a key of their own: they are consumed one by one."""
        windows = self.windows(sample.row)
        if len(windows) == 1:
            return [Ready(sample, sample.key, windows[0], len(windows[0].inputs))]
        return [
            Ready(sample, _key(sample.key, number), window, len(window.inputs))
            for number, window in enumerate(windows)
        ]

    def windows(self, row: Row) -> list[Window]:
        """What of a row goes through the model.

        Raises:
            Unusable: nothing of it is to be predicted.
        """
        if not (row.pair if row.pair is not None else row.text).strip():
            raise Unusable("a sample has no text", "skipped_empty")
        windows = self.model.windows(row.text, row.pair, self._tier.max_tokens)
        if not windows:
            raise Unusable("a sample has a single token, and so none to predict", "skipped_empty")
        return windows

    def every(self, windows: Sequence[Window]) -> Sampled:
        """All tokens with a target, for evaluation."""
        return self.model.forward_windows(windows, self._tier.taps, lambda lengths: EVERY_TOKEN)

    def compute(self, batch: Sequence[Ready], choose: Choose, max_tokens: int = 0) -> Sampled:
        """As the base's; windows are as long as the plan says, for their keys hang on that."""
        windows = [one.target for one in batch]
        sampled = self.model.forward_windows(windows, self._tier.taps, choose)
        return cut_rows(sampled, self._most_vectors)

    def body_bytes(self, lengths: npt.NDArray[np.int64]) -> float:
        return self._size(len(lengths), int(self.sampling.counts(lengths).sum()))

    def _written(self, targets: Sequence[Any], chosen: Sampled) -> bytes:
        assert chosen.targets is not None
        return write_tokens(chosen.targets, self.model.vocabulary)

    def _size(self, rows: int, vectors: int) -> int:
        return super()._size(rows, vectors) + _TARGET_BYTES * vectors

    def _fitting(self) -> int:
        """The most vectors that fit a message as one row, one at least."""
        most = max(1, self._most_bytes * 1024 // self._size(1, 1024))
        while most > 1 and self._size(1, most) > self._most_bytes:
            most -= 1
        return most


def maker_of(
    backbone: Backbone, plan: Plan, tier: str, max_message_bytes: int, rung: Rung | None = None
) -> BatchMaker:
    """What makes a job's messages; a language model's job has a language model for a backbone."""
    if TASKS[plan.task].generates:
        return TokenMaker(cast(LanguageModel, backbone), plan, tier, max_message_bytes, rung)
    return BatchMaker(backbone, plan, tier, max_message_bytes, rung)


def cut_rows(sampled: Sampled, most: int) -> Sampled:
    """Cut rows of more than ``most`` vectors into nearly equal parts; ``owners`` says whose each one is."""
    parts = -(-sampled.lengths // most)
    owners = np.repeat(np.arange(len(parts)), parts)
    number = np.arange(len(owners)) - np.repeat(starts_of(parts), parts)
    whole, parts = sampled.lengths[owners], parts[owners]
    return replace(sampled, lengths=(number + 1) * whole // parts - number * whole // parts, owners=owners)


def _key(sample: bytes, window: int) -> bytes:
    return hashlib.blake2b(sample + window.to_bytes(8, "little"), digest_size=16, person=b"window").digest()
