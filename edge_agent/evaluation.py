"""Accuracy on the device's own samples: their activations are computed once and kept quantised.

A sample whose label the job does not have counts as answered wrongly: the job cannot answer it rightly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from contract.side_network import SideNetwork
from contract.tensors import Codec, Tensor, decode, encode
from edge_agent.producer import BatchMaker
from edge_agent.samples import Row
from edge_agent.taps import pad

_FOREIGN = -1
_ROWS = 64  # samples that go through the side-network at once


class Score(NamedTuple):
    """How a version did."""

    accuracy: float | None
    """None without samples."""
    samples: int


class _Chunk(NamedTuple):
    activations: Tensor
    lengths: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]


class EvaluationSet:
    """The device's evaluation samples.

    Args:
        maker: Computes and samples activations as for uploading.
        codec: How they are kept.
        label_index: The job's labels.
        rows: The samples; may return more each time, the known ones first.
        stopped: Asked between batches; true abandons the work.
    """

    def __init__(
        self,
        maker: BatchMaker,
        codec: Codec,
        label_index: Mapping[str, int],
        rows: Callable[[], Sequence[Row]],
        *,
        stopped: Callable[[], bool],
    ) -> None:
        self._maker = maker
        self._codec = codec
        self._label_index = label_index
        self._rows = rows
        self._stopped = stopped
        self._known = 0
        self._chunks: list[_Chunk] = []

    def measure(self, network: SideNetwork, align: str) -> Score | None:
        """The share of samples that backbone and side-network answer rightly; None if stopped meanwhile."""
        self.extend()
        right = total = 0
        for chunk in self._chunks:
            if self._stopped():
                return None
            sampled = pad(decode(chunk.activations), chunk.lengths)
            with torch.inference_mode():
                answers = network.predict(align, sampled.values, sampled.mask).argmax(dim=1).numpy()
            right += int((answers == chunk.targets).sum())
            total += len(chunk.targets)
        return None if self._stopped() else Score(right / total if total else None, total)

    def extend(self) -> None:
        """Compute the activations of samples that are new since the last time."""
        rows = self._rows()
        fresh = [row for row in rows[self._known :] if row.label and row.text.strip()]
        fresh.sort(key=lambda row: len(row.text))
        for start in range(0, len(fresh), _ROWS):
            if self._stopped():
                return
            self._add(fresh[start : start + _ROWS])
        self._known = len(rows)

    def _add(self, rows: Sequence[Row]) -> None:
        sampled = self._maker.forward([row.text for row in rows])
        finite = sampled.finite_rows()
        if finite.any():
            targets = np.array([self._label_index.get(str(row.label), _FOREIGN) for row in rows])
            vectors, lengths = sampled.select(finite).ragged()
            self._chunks.append(_Chunk(encode(vectors, self._codec), lengths, targets[finite.numpy()]))
