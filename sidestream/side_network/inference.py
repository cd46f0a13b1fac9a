"""The side-network's forward in NumPy: what a device answers with. Never trained, and needs no torch.

Computes what :mod:`sidestream.side_network.network`, whose formulas these are, computes in ``eval``: equal to
it to 1e-5. That one takes rows of several families, padded; this one takes one family's vectors, row after
row, as they travel.

Legend: B taps, K rows, V vectors of all rows, d the backbone's width, r the side-network's, C numbers in an
answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from sidestream.contract.tasks import TASKS
from sidestream.contract.tensors import Floats
from sidestream.side_network.bundle import Bundle
from sidestream.side_network.form import APART_SHARE, align_key, check_parameters, stands_apart, start_key

_EPS: Final = 1e-5
_ERF_SLOPE: Final = 0.3275911 / 2**0.5
_ERF: Final = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


class InferenceNetwork:
    """A bundle's side-network. Its tensors are the bundle's own; any number of threads may use it.

    Args:
        bundle: The weights with their description.

    Raises:
        DecodeError: its tensors are not those that its description asks for.
    """

    def __init__(self, bundle: Bundle) -> None:
        check_parameters(bundle)
        self.about = bundle.about
        """What the weights are of."""
        self.scale = bundle.about.scale
        """What answers are measured in, where they are numbers."""
        self._spec = bundle.about.side_network
        self._task = TASKS[bundle.about.task]
        self._tensors = bundle.tensors

    def predict(self, align: str, vectors: Floats, lengths: npt.NDArray[np.int64]) -> Floats:
        """Answer at the last of the taps.

        Args:
            align: The family's alignment map.
            vectors: [B, V, d]: the rows' sampled activations, one row after the other.
            lengths: [K]: how many vectors each row has, one at least.

        Returns:
            [K, C], or [V, C] where the task has an answer for every vector.
        """
        normed = [_normed(tap) for tap in vectors]
        answer = np.zeros(0, np.float32)
        means = None if self._task.per_vector else _means(lengths)
        for block, hidden in enumerate(self._trunk(align, normed)):
            pooled = hidden if means is None else means @ hidden
            said = self._linear(f"steps.{block}.head", self._norm(f"steps.{block}.norm", pooled))
            share = APART_SHARE if block and self._apart(block + 1) else 1.0
            answer = answer + share * said if block else said
        start = None if means is None else self._start(align, normed, means)
        return answer if start is None else answer + start

    def probe(self, align: str, vectors: Floats, lengths: npt.NDArray[np.int64]) -> Floats | None:
        """As :meth:`predict`, by the linear start alone: [K, C], or None if there is none."""
        return self._start(align, [_normed(tap) for tap in vectors], _means(lengths))

    def _start(self, align: str, normed: Sequence[Floats], means: Floats) -> Floats | None:
        """Of normalised taps, and what makes means of them: [K, C]."""
        name = f"starts.{start_key(align, len(normed))}"
        if f"{name}.weight" not in self._tensors:
            return None
        pairs = zip(normed, self._tensors[f"{name}.weight"], strict=True)
        said: Floats = sum((_normed(means @ tap) @ weight for tap, weight in pairs), np.float32(0))
        return said + self._tensors[f"{name}.bias"]

    def refine(self, align: str, taps: Floats) -> Floats:
        """Of a language model: its taps [B, V, d] -> its last states, with what was learnt added: [V, d]."""
        (*_, hidden) = self._trunk(align, [_normed(tap) for tap in taps])
        added = self._norm("norm", hidden) @ self._tensors[f"outs.{align_key(align)}.weight"].T
        size = np.sqrt(np.square(taps[-1]).mean(axis=1, keepdims=True))
        lifted: Floats = taps[-1] + size * added
        return lifted

    def _trunk(self, align: str, normed: Sequence[Floats]) -> Iterator[Floats]:
        """h_b [V, r] of each tap, normalised."""
        weights, biases = (self._tensors[f"aligns.{align_key(align)}.{one}"] for one in ("weight", "bias"))
        hidden = np.zeros(0, np.float32)
        for block, tap in enumerate(normed):
            mixed = tap @ weights[block]
            mixed += biases[block]
            if block and not self._apart(block + 1):
                gate = 1 / (1 + np.exp(-self._tensors["gates"][block - 1]))
                mixed *= 1 - gate
                mixed += gate * hidden
            inner = self._linear(f"adapters.{block}.down", self._norm(f"adapters.{block}.norm", mixed))
            hidden = self._linear(f"adapters.{block}.up", _gelu(inner))
            hidden += mixed
            yield hidden

    def _apart(self, block: int) -> bool:
        return stands_apart(self._spec, self._task, block)

    def _norm(self, name: str, values: Floats) -> Floats:
        normed = _normed(values)
        normed *= self._tensors[f"{name}.weight"]
        normed += self._tensors[f"{name}.bias"]
        return normed

    def _linear(self, name: str, values: Floats) -> Floats:
        mapped: Floats = values @ self._tensors[f"{name}.weight"].T
        mapped += self._tensors[f"{name}.bias"]
        return mapped


def _means(lengths: npt.NDArray[np.int64]) -> Floats:
    """[K, V]: what makes means of runs of so many vectors that follow one another."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    weights: Floats = (rows == np.arange(len(lengths))[:, None]) / lengths[:, None].astype(np.float32)
    return weights


def _normed(values: Floats) -> Floats:
    """[V, d]: each of mean 0 and variance 1."""
    width = np.float32(values.shape[1])
    centred: Floats = values - values.sum(axis=1, keepdims=True) / width
    variance = np.einsum("vd,vd->v", centred, centred) / width
    centred *= 1 / np.sqrt(variance + np.float32(_EPS))[:, None]
    return centred


def _gelu(values: Floats) -> Floats:
    """x·Φ(x), off by 1e-7·|x| at most: Abramowitz and Stegun's formula 7.1.26, for NumPy has no erf.

    In place wherever it can be: fresh arrays would take longer than the sums.
    """
    size = np.abs(values)
    t = size * np.float32(_ERF_SLOPE)
    t += 1
    np.reciprocal(t, out=t)
    tail = t * np.float32(_ERF[-1])
    for factor in reversed(_ERF[:-1]):
        tail += np.float32(factor)
        tail *= t
    tail *= size
    np.square(size, out=t)
    t *= np.float32(-0.5)
    np.exp(t, out=t)
    tail *= t
    np.maximum(values, 0, out=size)
    tail *= np.float32(0.5)
    size -= tail
    return size
