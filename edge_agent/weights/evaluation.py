"""Quality on the device's own samples: their activations are computed once and kept at eight bits a value.

So it is what the device answers with that is judged, and not what it uploads: that may be far coarser.

A sample whose label the job does not have counts as answered wrongly: the job cannot answer it rightly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_agent.batches.batch_maker import BatchMaker
from edge_agent.batches.targets import Target, Unusable
from edge_agent.samples.sample import Row
from sidestream.contract.quality import Tally
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Codec, Tensor, decode, encode
from sidestream.side_network.inference import InferenceNetwork

log = logging.getLogger(__name__)
_ROWS = 16  # samples at once: what a forward pass takes is most of what an agent takes
_KEPT = Codec.INT8


class Score(NamedTuple):
    """How a version did."""

    tally: Tally
    """What it answered, to be added to other devices'."""
    measures: Mapping[str, float]
    """The task's measures by name, the headline first; empty without samples."""
    samples: int
    """How many it was judged by."""
    probe: float | None = None
    """Accuracy of the linear start alone, where there is one."""


class _EvaluationBatch(NamedTuple):
    activations: Tensor
    lengths: npt.NDArray[np.int64]
    targets: Target


class EvaluationSet:
    """The device's evaluation samples.

    Args:
        maker: Computes and samples activations as for uploading.
        task: The job's.
        rows: The samples; may return more each time, the known ones first.
        stopped: Asked between batches; true abandons the work.
    """

    def __init__(
        self,
        maker: BatchMaker,
        task: Task,
        rows: Callable[[], Sequence[Row]],
        *,
        stopped: Callable[[], bool],
    ) -> None:
        self._maker = maker
        self._task = task
        self._rows = rows
        self._stopped = stopped
        self._known = 0
        self._fresh: list[Row] = []  # known, and not computed yet
        self._chunks: list[_EvaluationBatch] = []

    def measure(self, network: InferenceNetwork, align: str) -> Score | None:
        """How well backbone and side-network answer; None if stopped meanwhile."""
        while not self._stopped() and self.extend():
            pass
        tally, probe, samples = Tally(), Tally(), 0
        for chunk in self._chunks:
            if self._stopped():
                return None
            rows = decode(chunk.activations), chunk.lengths
            answers = network.predict(align, *rows)
            tally += self._maker.targets.tally(answers, chunk.targets, network.scale)
            if (linear := network.probe(align, *rows)) is not None:
                probe += self._maker.targets.tally(linear, chunk.targets, network.scale)
            samples += len(chunk.lengths)
        if self._stopped():
            return None
        yardstick = probe.measures(self._task).get("accuracy") if probe.units else None
        return Score(tally, tally.measures(self._task), samples, yardstick)

    def extend(self) -> bool:
        """Compute the activations of a few samples that are new; return whether there were any."""
        if not self._fresh:
            rows = self._rows()
            self._fresh = [row for row in rows[self._known :] if row.label and not row.is_blank]
            self._fresh.sort(key=lambda row: row.size)
            self._known = len(rows)
        if not self._fresh:
            return False
        self._add(self._fresh[:_ROWS])
        del self._fresh[:_ROWS]
        return True

    def _add(self, rows: Sequence[Row]) -> None:
        sampled = self._maker.forward([row.input for row in rows])
        targets = [self._target_of(row) for row in rows]
        usable = sampled.usable_rows() & [target is not None for target in targets]
        if usable.any():
            chosen = sampled.select(usable)
            kept = [target for target, good in zip(targets, usable.tolist(), strict=True) if good]
            stacked = self._maker.targets.stack([one for one in kept if one is not None], chosen)
            self._chunks.append(_EvaluationBatch(encode(chosen.vectors, _KEPT), chosen.lengths, stacked))

    def _target_of(self, row: Row) -> Target | None:
        """None where the label is of no use even to judge by, such as one that is no number."""
        try:
            return self._maker.targets.read(str(row.label), row.text, judge=True)
        except Unusable as exc:
            log.warning("an evaluation sample is left out: %s", exc)
            return None
