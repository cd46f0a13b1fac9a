"""How good answers are, counted so that counts of many devices add up; ratios come last.

A mean of devices' macro-F1 is no macro-F1: devices with skewed labels see few of them. So a device counts,
and whoever reports adds the counts first. Pure.

===================  ====================================================================================
task                 measures, the headline first
===================  ====================================================================================
text and token       ``accuracy``; ``macro_f1``, over the labels that occur or are answered;
classification       ``matthews``, R_k for any number of labels (Gorodkin 2004)
multi-label          ``micro_f1``, ``macro_f1``, ``accuracy``: the share of samples whose whole set is right
regression           ``pearson``, ``rmse``. Not Spearman's: ranks of devices do not add up
language model       ``perplexity``, ``accuracy``: the share of tokens that were predicted
===================  ====================================================================================

Legend: C labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from sidestream.contract.errors import DecodeError
from sidestream.contract.tasks import Task
from sidestream.contract.wire import Message, prepared

MOST_CONFUSED: Final = 32
"""A tally keeps so many pairs of labels, those confused most: a sum of tallies may miss a rare one."""
_MOMENTS: Final = 6
_MOST_NATS: Final = 700.0  # a float holds no larger exponential
Counts = npt.NDArray[np.int64]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
PerLabel = Annotated[bytes, msgspec.Meta(max_length=4 * 1024)]


_PAIR: Final = np.dtype([("actual", "<u2"), ("answered", "<u2"), ("count", "<u4")])


class LabelCounts(NamedTuple):
    """How one label fared."""

    right: int
    """How often it was answered rightly."""
    answered: int
    """How often it was answered."""
    actual: int
    """How often it was true."""


class Confusion(NamedTuple):
    """One label taken for another."""

    actual: int
    """The true one's number."""
    answered: int
    """The number of the one that was answered."""
    times: int
    """How often."""


@prepared
class Tally(Message, frozen=True, kw_only=True):
    """What was answered, against what is true. Empty where the task has no use for a field."""

    units: Count = 0
    """What was judged: samples, words in token classification, or tokens of a language model."""
    correct: Count = 0
    """Of those, answered rightly, as a whole."""
    right: PerLabel = b""
    """u32[C]: how often each label was answered rightly."""
    answered: PerLabel = b""
    """u32[C]: how often it was answered."""
    actual: PerLabel = b""
    """u32[C]: how often it was true."""
    moments: Annotated[tuple[float, ...], msgspec.Meta(max_length=_MOMENTS)] = ()
    """Of answers x and truths y: Σx, Σy, Σxx, Σyy, Σxy, Σ(x - y)²."""
    nll: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Of a language model: the negative logarithm of what its answers gave the truth, in nats, summed up."""
    confused: Annotated[bytes, msgspec.Meta(max_length=8 * MOST_CONFUSED)] = b""
    """(u16 truth, u16 answer, u32 how often)[n]: the labels that were taken for others most often."""

    def __post_init__(self) -> None:
        if len(self.confused) % _PAIR.itemsize:
            raise DecodeError("confused labels must be 8 bytes each")
        if len({len(self.right), len(self.answered), len(self.actual)}) != 1 or len(self.right) % 4:
            raise DecodeError("counts by label must be u32 and equally many")
        if len(self.moments) not in (0, _MOMENTS) or not all(map(math.isfinite, self.moments)):
            raise DecodeError(f"moments must be {_MOMENTS} finite numbers")
        if not math.isfinite(self.nll):
            raise DecodeError("nll is not finite")
        if self.correct > self.units:
            raise DecodeError(f"{self.correct} correct of {self.units}")

    def __add__(self, other: Tally) -> Tally:
        """Both together.

        Raises:
            DecodeError: if they count different labels.
        """
        if self.right and other.right and len(self.right) != len(other.right):
            raise DecodeError("two tallies count different labels")
        return total((self, other))

    def measures(self, task: Task) -> dict[str, float]:
        """The task's measures by name, the headline first; those that are undefined are left out."""
        if not self.units:
            return {}
        accuracy = self.correct / self.units
        if task is Task.CAUSAL_LM:
            return {"perplexity": math.exp(min(_MOST_NATS, self.nll / self.units)), "accuracy": accuracy}
        if task is Task.REGRESSION:
            return self._regression()
        right, answered, actual = (_counts(getattr(self, name)) for name in _BY_LABEL)
        if task is Task.MULTI_LABEL:
            total = int((answered + actual).sum())
            micro = 2 * int(right.sum()) / total if total else 1.0
            return {"micro_f1": micro, "macro_f1": _macro_f1(right, answered, actual), "accuracy": accuracy}
        return {
            "accuracy": accuracy,
            "macro_f1": _macro_f1(right, answered, actual),
            "matthews": _matthews(right, answered, actual, self.units),
        }

    def headline(self, task: Task) -> float | None:
        """The measure that the task is judged by first, without the others; None where it is undefined."""
        if HEADLINE[task] == "accuracy":
            return self.correct / self.units if self.units else None
        return self.measures(task).get(HEADLINE[task])

    def by_label(self) -> list[LabelCounts]:
        """How each label fared, in their order; empty where the task has no labels to count by."""
        columns = (_counts(getattr(self, name)).tolist() for name in _BY_LABEL)
        return [LabelCounts(*counts) for counts in zip(*columns, strict=True)]

    def confusions(self) -> list[Confusion]:
        """The pairs of labels confused most, first the most frequent."""
        found = [Confusion(*pair, count) for pair, count in _pairs(self.confused).items()]
        return sorted(found, key=lambda one: (-one.times, one.actual, one.answered))

    def _regression(self) -> dict[str, float]:
        n, (x, y, xx, yy, xy, errors) = self.units, self.moments or (0.0,) * _MOMENTS
        spread = (n * xx - x * x) * (n * yy - y * y)
        pearson = {"pearson": float((n * xy - x * y) / math.sqrt(spread))} if spread > 0 else {}
        return {**pearson, "rmse": math.sqrt(max(0.0, errors) / n)}


_BY_LABEL: Final = ("right", "answered", "actual")
HEADLINE: Final[dict[Task, str]] = {
    Task.TEXT_CLASSIFICATION: "accuracy",
    Task.IMAGE_CLASSIFICATION: "accuracy",
    Task.MULTI_LABEL: "micro_f1",
    Task.REGRESSION: "pearson",
    Task.TOKEN_CLASSIFICATION: "accuracy",
    Task.CAUSAL_LM: "perplexity",
}
"""The measure that a task is judged by first."""
MEASURES: Final = ("accuracy", "macro_f1", "matthews", "micro_f1", "pearson", "perplexity", "rmse")
"""Every measure of any task."""
if set(HEADLINE) != set(Task):  # pragma: no cover
    raise AssertionError("every Task needs a headline")


def total(tallies: Iterable[Tally]) -> Tally:
    """All together; those that count other labels than the first one are left out.

    In one go: thousands of devices are added up every second.
    """
    some = list(tallies)
    size = next((len(one.right) for one in some if one.right), 0)
    some = [one for one in some if len(one.right) in (0, size)]
    moments = [one.moments for one in some if one.moments]
    return Tally(
        units=sum(one.units for one in some),
        correct=sum(one.correct for one in some),
        **{name: _summed([getattr(one, name) for one in some], size) for name in _BY_LABEL},
        moments=tuple(map(sum, zip(*moments, strict=True))),
        nll=sum(one.nll for one in some),
        confused=_most_confused(b"".join(one.confused for one in some)),
    )


def tally_labels(answers: npt.NDArray[Any], targets: npt.NDArray[Any], labels: int) -> Tally:
    """Of label indices [N]; a target of -1 is a label that the job does not have."""
    hits = answers == targets
    return Tally(
        units=len(targets),
        correct=int(hits.sum()),
        right=_packed(np.bincount(answers[hits], minlength=labels)),
        answered=_packed(np.bincount(answers, minlength=labels)),
        actual=_packed(np.bincount(targets[targets >= 0], minlength=labels)),
        confused=_confused(answers[~hits], targets[~hits]),
    )


def tally_sets(answers: npt.NDArray[Any], targets: npt.NDArray[Any], foreign: npt.NDArray[Any]) -> Tally:
    """Of label sets, bool [N, C]; ``foreign`` [N]: which have labels besides that the job does not have."""
    return Tally(
        units=len(targets),
        correct=int(((answers == targets).all(axis=1) & ~foreign).sum()),
        right=_packed((answers & targets).sum(axis=0)),
        answered=_packed(answers.sum(axis=0)),
        actual=_packed(targets.sum(axis=0)),
    )


def tally_values(answers: npt.NDArray[Any], targets: npt.NDArray[Any]) -> Tally:
    """Of numbers [N]."""
    x, y = answers.astype(np.float64), targets.astype(np.float64)
    sums = (x.sum(), y.sum(), x @ x, y @ y, x @ y, (x - y) @ (x - y))
    return Tally(units=len(y), moments=tuple(float(one) for one in sums))


def tally_tokens(losses: npt.NDArray[Any], hits: npt.NDArray[np.bool_]) -> Tally:
    """Of a language model's tokens [N]: losses in nats, and whether the likeliest one was right."""
    return Tally(units=len(hits), correct=int(hits.sum()), nll=float(losses.astype(np.float64).sum()))


def _macro_f1(right: Counts, answered: Counts, actual: Counts) -> float:
    seen = (answered + actual) > 0
    return float(np.mean(2 * right[seen] / (answered + actual)[seen])) if seen.any() else 0.0


def _matthews(right: Counts, answered: Counts, actual: Counts, units: int) -> float:
    """0 where all answers or all truths are the same label, as is the custom."""
    covariance = float(right.sum()) * units - float(answered @ actual)
    spread = (float(units) ** 2 - float(answered @ answered)) * (float(units) ** 2 - float(actual @ actual))
    return covariance / math.sqrt(spread) if spread > 0 else 0.0


def _counts(data: bytes) -> Counts:
    return np.frombuffer(data, "<u4").astype(np.int64)


def _packed(counts: npt.NDArray[Any]) -> bytes:
    data: bytes = np.minimum(counts, 2**32 - 1).astype("<u4").tobytes()
    return data


def _summed(counts: Sequence[bytes], size: int) -> bytes:
    """Of several devices' counts by label, each of ``size`` bytes or of none."""
    every = np.frombuffer(b"".join(counts), "<u4").reshape(-1, max(1, size // 4))
    return _packed(every.sum(axis=0, dtype=np.int64)) if size else b""


def _confused(answers: npt.NDArray[Any], targets: npt.NDArray[Any]) -> bytes:
    """Of wrong answers [N]; labels that the job does not have can be confused with none."""
    known = targets >= 0
    return _pack_pairs(Counter(zip(targets[known].tolist(), answers[known].tolist(), strict=True)))


def _pairs(packed: bytes) -> Counter[tuple[int, int]]:
    return Counter(
        {(actual, answered): count for actual, answered, count in np.frombuffer(packed, _PAIR).tolist()}
    )


def _most_confused(packed: bytes) -> bytes:
    """Of several devices' pairs, one after another."""
    pairs = np.frombuffer(packed, _PAIR)
    which, place = np.unique(pairs["actual"].astype(np.uint32) << 16 | pairs["answered"], return_inverse=True)
    counts = np.bincount(place, weights=pairs["count"], minlength=len(which)).astype(np.int64)
    most = np.lexsort((which, -counts))[:MOST_CONFUSED]
    return _pack_pairs(Counter({divmod(int(which[one]), 1 << 16): int(counts[one]) for one in most}))


def _pack_pairs(counts: Counter[tuple[int, int]]) -> bytes:
    most = sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:MOST_CONFUSED]
    return np.array([(*pair, min(count, 2**32 - 1)) for pair, count in most], _PAIR).tobytes()
