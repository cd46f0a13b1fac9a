"""A job's messages: samples made ready, forwarded, sampled, quantised and cut to what a message may hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_agent.batches import coded as kept
from edge_agent.batches.message import HEADER_BYTES, ROW_BYTES, Letterhead
from edge_agent.batches.targets import Targets, Unusable, targets_of
from edge_agent.samples.sample import Sample
from edge_agent.store.streams import Slot
from sidestream.backbone.backbone import Backbone, Choose
from sidestream.backbone.inputs import Input
from sidestream.backbone.sampled import Sampled
from sidestream.contract.plan import Plan, TierPlan
from sidestream.contract.privacy import parse_privacy
from sidestream.contract.sampling import Rung, parse_sampling
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats, Tensor, encode, encoded_sizes


class Ready(NamedTuple):
    """A sample, or a piece of one, that can be computed."""

    sample: Sample
    """Where it is from."""
    key: bytes
    """What it is consumed by."""
    target: Any
    """What the maker needs to know of it beside the input; None if its label has yet to come."""
    length: int
    """How long it is: similar ones are computed together."""

    @property
    def waits(self) -> bool:
        """Whether its label has yet to come."""
        return self.target is None


class BatchMaker:
    """Everything about a message but its place in the stream, as the plan asks for it.

    Args:
        backbone: The frozen transformer.
        plan: The job, ready for the tier.
        tier: This device's tier.
        max_message_bytes: No message is larger.
        rung: Sample and quantise by this, and not as the tier does.
    """

    def __init__(
        self, backbone: Backbone, plan: Plan, tier: str, max_message_bytes: int, rung: Rung | None = None
    ) -> None:
        self._backbone = backbone
        self._tier: TierPlan = plan.tiers[tier]
        self._rung = rung or Rung(sampling=self._tier.sampling, codec=self._tier.codec)
        self.sampling = parse_sampling(self._rung.sampling)
        """Which tokens travel."""
        self._privacy = parse_privacy(self._tier.privacy)
        self._letterhead = Letterhead.of(plan, tier)
        self._words = plan.task is Task.TOKEN_CLASSIFICATION
        self._task, self._labels = plan.task, plan.labels
        self._most_bytes = max_message_bytes - HEADER_BYTES

    @cached_property
    def targets(self) -> Targets:
        """What samples are to be answered with; a language model's truth is the text itself."""
        return targets_of(self._task, self._labels)

    def ready(self, sample: Sample) -> Sequence[Ready]:
        """What of a sample is to be computed.

        Raises:
            Unusable: the job can do nothing with it.
        """
        if sample.row.is_blank:
            raise Unusable("a sample has no text", "skipped_empty")
        if sample.label is None:
            raise Unusable("a sample has no label", "skipped_unlabelled")
        target = self.targets.read(sample.label, sample.row.text)
        return [Ready(sample, sample.key, target, sample.row.size)]

    def compute(self, batch: Sequence[Ready], choose: Choose, max_tokens: int = 0) -> Sampled:
        """The one forward pass of a batch, sampled as ``choose`` says by its lengths in vectors.

        Args:
            batch: The samples.
            choose: The policy for them.
            max_tokens: Cut longer ones; 0: where the plan says.
        """
        return self.run([one.sample.input for one in batch], choose, max_tokens)

    def forward(self, inputs: Sequence[Input]) -> Sampled:
        """The one forward pass of these inputs, sampled as the rung says."""
        return self.run(inputs, lambda lengths: self.sampling)

    def run(self, inputs: Sequence[Input], choose: Choose, max_tokens: int = 0) -> Sampled:
        """The one forward pass of these inputs, sampled as ``choose`` says by their lengths in vectors."""
        tier = self._tier
        most = max_tokens or tier.max_tokens
        sampled = self._backbone.forward(inputs, tier.taps, most, choose, words=self._words)
        return replace(sampled, vectors=self._privacy.project(sampled.vectors))

    def body_bytes(self, lengths: npt.NDArray[np.int64]) -> float:
        """What the arrays of rows with so many tokens take; infinite if one row alone fits no message."""
        vectors = self.sampling.counts(lengths)
        if self._size(1, int(vectors.max())) > self._most_bytes:
            return math.inf
        return self._size(len(lengths), int(vectors.sum()))

    def fits(self, sampled: Sampled) -> npt.NDArray[np.bool_]:
        """[K]: rows that fit a message on their own."""
        return np.array([self._size(1, length) <= self._most_bytes for length in sampled.lengths.tolist()])

    def split(self, sampled: Sampled, rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        """Cut rows into runs that fit a message, by halves."""
        vectors = int(sampled.lengths[rows].sum())
        if len(rows) == 1 or self._size(len(rows), vectors) <= self._most_bytes:
            yield rows
            return
        middle = len(rows) // 2
        yield from self.split(sampled, rows[:middle])
        yield from self.split(sampled, rows[middle:])

    def packer(
        self, sampled: Sampled, targets: Sequence[Any], rows: npt.NDArray[np.int64], keys: Sequence[bytes]
    ) -> Callable[[Slot], bytes]:
        """Quantise some rows now; the outbox asks for the message once their place is known.

        Args:
            sampled: Of the whole batch.
            targets: What :meth:`ready` found for each row.
            rows: Which of them.
            keys: By what the trainer knows each of these again.
        """
        chosen = sampled.select(rows)
        tensor = self._uploaded(chosen.vectors)
        packed_targets = self._written([targets[row] for row in rows], chosen)

        def packed(slot: Slot) -> bytes:
            return self._letterhead.write(
                slot,
                sampling=self._rung.sampling,
                lengths=chosen.lengths.tolist(),
                targets=packed_targets,
                activations=tensor,
                keys=keys,
            )

        return packed

    def keep(self, sampled: Sampled, row: int) -> bytes:
        """Quantise one row now, for the day when its label comes."""
        return kept.write(sampled, row, self._rung.sampling, self._uploaded)

    def _uploaded(self, vectors: Floats) -> Tensor:
        """[B, V, d] as it leaves the device."""
        return self.quantised(self._privacy.noisy(vectors))

    def quantised(self, vectors: Floats) -> Tensor:
        """[B, V, d] as the rung has it."""
        return encode(vectors, self._rung.codec, self._tier.codebooks_id)

    def _written(self, targets: Sequence[Any], chosen: Sampled) -> bytes:
        """Targets as they travel."""
        return self.targets.pack(self.targets.stack(targets, chosen))

    def _size(self, rows: int, vectors: int) -> int:
        shape = (len(self._tier.taps), vectors, self._backbone.width)
        return sum(encoded_sizes(self._rung.codec, shape)) + ROW_BYTES * rows
