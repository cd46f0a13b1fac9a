"""Accuracy against bytes: points, which of them no other beats, and what they are worth. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Final, NamedTuple

import msgspec

from benchmarks.table import render
from sidestream.contract.errors import ConfigError, SidestreamError
from sidestream.contract.sampling import parse_sampling
from sidestream.contract.tensors import Codec
from sidestream.contract.wire import prepared

LIMITS: Final = ((2300, 0.5), (1200, 1.2), (450, 2.3))
"""Bytes a sample, and how many points below the reference is near enough."""
_HEADINGS: Final = ("taps", "sampling", "codec", "bytes a sample", "accuracy", "to reference", "frontier")


class Point(NamedTuple):
    """A way to send."""

    taps: int
    """How many layers, evenly spread to the last one."""
    sampling: str
    """Which tokens."""
    codec: Codec
    """How quantised."""

    def __str__(self) -> str:
        return f"{self.taps}/{self.sampling}/{self.codec.value}"


def parse_point(text: str) -> Point:
    """``2/segments:8/int4`` -> two taps, segments:8, int4.

    Raises:
        ValueError: if it is not written like that.
    """
    try:
        taps, sampling, codec = text.split("/")
        parse_sampling(sampling)
        if int(taps) < 1:
            raise ValueError
        return Point(int(taps), sampling, Codec(codec))
    except (ValueError, SidestreamError) as exc:
        raise ValueError(f"{text!r}: write TAPS/SAMPLING/CODEC, such as 2/segments:8/int4") from exc


REFERENCE: Final = Point(2, "all", Codec.F16)
"""Half-way and last layer, every token: what the others are measured by."""


@prepared
class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a point with a seed."""

    point: str
    """As :func:`parse_point` reads it."""
    seed: int
    """Of the order and the learner."""
    bytes_per_sample: float
    """Whole messages, by the samples in them."""
    accuracy: float
    """On the evaluation data."""


class Line(NamedTuple):
    """A point over its seeds."""

    point: Point
    bytes_per_sample: float
    accuracy: float
    spread: float | None
    """Standard deviation over seeds; None of one."""
    difference: float
    """Points above the reference with the same seeds."""


def lines_of(results: Sequence[Found]) -> list[Line]:
    """A line a point, the most bytes first; of seeds that the reference has too."""
    by_point: dict[str, dict[int, Found]] = {}
    for one in results:
        by_point.setdefault(one.point, {})[one.seed] = one
    reference = by_point.get(str(REFERENCE), {})
    lines = [
        _line(parse_point(point), [seeds[seed] for seed in seeds if seed in reference], reference)
        for point, seeds in by_point.items()
        if set(seeds) & set(reference)
    ]
    return sorted(lines, key=lambda line: -line.bytes_per_sample)


def frontier(lines: Sequence[Line]) -> list[Line]:
    """Those that none beats: more accurate than every one of no more bytes."""
    best: list[Line] = []
    for line in sorted(lines, key=lambda line: (line.bytes_per_sample, -line.accuracy)):
        if not best or line.accuracy > best[-1].accuracy:
            best.append(line)
    return best


def frontier_text(results: Sequence[Found]) -> str:
    """The table, and what the best points within :data:`LIMITS` are worth."""
    lines = lines_of(results)
    best = set(frontier(lines))
    rows = [
        [
            *(str(line.point.taps), line.point.sampling, line.point.codec.value),
            f"{line.bytes_per_sample:,.0f}",
            f"{line.accuracy:.4f}" + ("" if line.spread is None else f" ± {line.spread:.4f}"),
            "reference" if line.point == REFERENCE else f"{line.difference:+.2f}",
            "*" if line in best else "",
        ]
        for line in lines
    ]
    return "\n".join([render(_HEADINGS, rows), "", *(_verdict(lines, *limit) for limit in LIMITS)])


def check_same(ours: Mapping[str, object], theirs: Mapping[str, object], file: str) -> None:
    """Refuse results of other data.

    Raises:
        ConfigError: naming what differs.
    """
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ConfigError("--have", f"{file} is of {name} {theirs.get(name)!r}, not {value!r}")


def _line(point: Point, found: Sequence[Found], reference: Mapping[int, Found]) -> Line:
    accuracies = [one.accuracy for one in found]
    return Line(
        point=point,
        bytes_per_sample=mean(one.bytes_per_sample for one in found),
        accuracy=mean(accuracies),
        spread=stdev(accuracies) if len(accuracies) > 1 else None,
        difference=mean(100 * (one.accuracy - reference[one.seed].accuracy) for one in found),
    )


def _verdict(lines: Sequence[Line], limit: int, near: float) -> str:
    within = [line for line in lines if line.bytes_per_sample <= limit]
    if not within:
        return f"at most {limit:,} bytes a sample: no point"
    best = max(within, key=lambda line: line.accuracy)
    reached = "reached" if round(best.difference + near, 6) >= 0 else "missed"
    return (
        f"at most {limit:,} bytes a sample: {best.point} ({best.bytes_per_sample:,.0f} bytes), "
        f"{best.difference:+.2f} points to the reference; within {near:g}: {reached}"
    )
