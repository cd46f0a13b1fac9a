"""Samples as a split job takes them: token ids and targets, which are kept, for each is sent several times.

Legend: K rows of a batch, T tokens of the longest, N real tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from edge_agent.batches.batch_maker import Ready
from edge_agent.batches.targets import Targets, Unusable, targets_of
from edge_agent.samples.sample import Row, Sample
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.sampled import Sampled
from sidestream.backbone.text_input import Tokens, padded
from sidestream.backbone.windows import Window, windows_of
from sidestream.contract.plan import Plan, TierPlan
from sidestream.contract.tasks import NO_TARGET, TASKS, TargetForm, read_targets, write_tokens
from sidestream.contract.wire import prepared

_NO_VECTORS: Final = np.zeros((1, 1, 1), np.float32)


class PreparedRow(NamedTuple):
    """One row: what of it is computed, and what it is to be answered with."""

    ids: list[int]
    """Its tokens."""
    segments: list[int] | None
    """Of each, which text of a pair it is of, where the model asks."""
    target: Any
    """As the task has it; in a language model, the token that follows each, or -100."""


@prepared
class StoredBody(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a batch; msgpack in the outbox's file."""

    ids: tuple[tuple[int, ...], ...]
    """[K][T]."""
    segments: tuple[tuple[int, ...], ...] | None
    """Likewise, where the model asks."""
    targets: bytes
    """As they travel."""
    context: tuple[int, ...]
    """[K]: tokens at each row's beginning without a target; empty for none."""
    names: tuple[bytes, ...]
    """[K]: by what the trainer knows the rows."""

    def tokens(self, pad: int) -> Tokens:
        """As the model takes them."""
        ids, mask = padded(self.ids, pad)
        segments = None if self.segments is None else padded(self.segments, 0)[0]
        return Tokens(ids, mask, segments)


class Preparer:
    """Makes rows, and batches of them.

    Args:
        backbone: Has the tokenizer.
        plan: The job.
        tier: This device's.
    """

    needs_labels = False
    """Samples without a label are of no use: nothing of them is kept for later."""

    def __init__(self, backbone: Backbone, plan: Plan, tier: str) -> None:
        self._input = backbone.text_input
        self._plan = plan
        self._tier: TierPlan = plan.tiers[tier]
        self._generates = TASKS[plan.task].generates

    @property
    def pad(self) -> int:
        """Stands where a row has ended."""
        return int(self._input.tokenizer.pad_token_id or 0)

    @property
    def targets(self) -> Targets:
        """What samples are to be answered with."""
        return targets_of(self._plan.task, self._plan.labels)

    def ready(self, sample: Sample) -> Sequence[Ready]:
        """A sample's row, or a text's windows.

        Raises:
            Unusable: the job can do nothing with it.
        """
        if self._generates:
            windows = self.windows(sample.row)
            return [
                Ready(sample, sample.key if not number else _key(sample.key, number), one, len(one.ids))
                for number, one in enumerate(windows)
            ]
        if sample.row.is_blank:
            raise Unusable("a sample has no text", "skipped_empty")
        if sample.label is None:
            raise Unusable("a sample has no label", "skipped_unlabelled")
        target = self.targets.read(sample.label, sample.row.text)
        ids, segments = self.tokenised(sample.row)
        return [Ready(sample, sample.key, PreparedRow(ids, segments, target), len(ids))]

    def tokenised(self, row: Row) -> tuple[list[int], list[int] | None]:
        """A row's tokens, cut to what the plan and the model take."""
        tokens = self._input.read([row.input], self._tier.max_tokens)
        real = tokens.mask[0]
        segments = None if tokens.segments is None else tokens.segments[0][real].tolist()
        return tokens.ids[0][real].tolist(), segments

    def windows(self, row: Row) -> list[PreparedRow]:
        """What of a text goes through the model.

        Raises:
            Unusable: nothing of it is to be predicted.
        """
        if not (row.pair if row.pair is not None else row.text).strip():
            raise Unusable("a sample has no text", "skipped_empty")
        tokenizer = self._input.tokenizer
        eos = tokenizer.eos_token_id
        found: list[Window] = windows_of(
            *(tokenizer, row.text, row.pair, min(self._tier.max_tokens, self._input.longest)),
            vocabulary=self._tier.vocabulary,
            ends=() if eos is None else (int(eos),),
        )
        if not found:
            raise Unusable("a sample has a single token, and so none to predict", "skipped_empty")
        return [PreparedRow(one.inputs, None, one.targets) for one in found]

    def body_tokens(self, rows: Sequence[PreparedRow]) -> Tokens:
        """Rows as the model takes them."""
        ids, mask = padded([row.ids for row in rows], self.pad)
        if all(row.segments is None for row in rows):
            return Tokens(ids, mask)
        segments = padded([row.segments or [0] * len(row.ids) for row in rows], 0)[0]
        return Tokens(ids, mask, segments)

    def body(self, rows: Sequence[PreparedRow], names: Sequence[bytes]) -> StoredBody:
        """A batch of rows to be kept."""
        segmented = any(row.segments is not None for row in rows)
        return StoredBody(
            ids=tuple(tuple(row.ids) for row in rows),
            segments=tuple(tuple(row.segments or [0] * len(row.ids)) for row in rows) if segmented else None,
            targets=self._packed(rows),
            context=self._context(rows),
            names=tuple(names),
        )

    def shortened(self, body: StoredBody) -> StoredBody:
        """A batch with its rows cut to what the plan takes now; itself if none is longer.

        A token that ends every text of a model's stays at the end.
        """
        most, given = self._tier.max_tokens, [len(ids) for ids in body.ids]
        if max(given) <= most:
            return body
        last = [most - 1 if self._ends(ids) else most for ids in body.ids]
        kept = [
            [*range(length)] if length <= most else [*range(end), *([length - 1] * (most - end))]
            for length, end in zip(given, last, strict=True)
        ]
        return msgspec.structs.replace(
            body,
            ids=_taken(body.ids, kept),
            segments=None if body.segments is None else _taken(body.segments, kept),
            targets=self._targets_of(body, kept) if self._generates else body.targets,
            context=tuple(min(count, most) for count in body.context),
        )

    def _ends(self, ids: Sequence[int]) -> bool:
        return not self._generates and ids[-1] in self._input.tokenizer.all_special_ids

    def _targets_of(self, body: StoredBody, kept: Sequence[Sequence[int]]) -> bytes:
        """Of each token that is kept, the one that follows it."""
        lengths = [len(ids) for ids in body.ids]
        every = read_targets(TargetForm.TOKENS, body.targets, rows=len(lengths), vectors=sum(lengths))
        starts = np.cumsum(lengths) - lengths
        places = np.concatenate([start + np.asarray(row) for start, row in zip(starts, kept, strict=True)])
        return write_tokens(every[places], self._tier.vocabulary)

    def _packed(self, rows: Sequence[PreparedRow]) -> bytes:
        if self._generates:
            every = np.concatenate([np.asarray(row.target) for row in rows])
            return write_tokens(np.where(every == NO_TARGET, 0, every), self._tier.vocabulary)
        lengths = np.array([len(row.ids) for row in rows])
        sampled = Sampled(vectors=_NO_VECTORS, lengths=lengths)
        return self.targets.pack(self.targets.stack([row.target for row in rows], sampled))

    def _context(self, rows: Sequence[PreparedRow]) -> tuple[int, ...]:
        if not self._generates:
            return ()
        return tuple(sum(target == NO_TARGET for target in row.target) for row in rows)


def _taken(rows: Sequence[Sequence[int]], kept: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row[at] for at in places) for row, places in zip(rows, kept, strict=True))


def _key(sample: bytes, window: int) -> bytes:
    return sample + window.to_bytes(4, "little")
