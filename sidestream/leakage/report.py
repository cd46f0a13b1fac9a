"""What the attacks found, as a table, three sentences, a picture and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sidestream.contract.privacy import DELTA
from sidestream.leakage.measure import Result
from sidestream.leakage.scores import Found
from sidestream.leakage.side_attacks import Share

_VACUOUS: Final = 50.0
_HEADINGS: Final = (
    *("taps", "sent", "exact", "precision", "recall", "F1", "F1 content", "by"),
    *("without upload", "nearest", "label", "number", "name"),
)


def table(results: Sequence[Result]) -> str:
    """A line a way; the strongest attack is the one shown."""
    extra = ["accuracy"] if any(one.accuracy is not None for one in results) else []
    rows = [[*_HEADINGS, *extra]]
    for one in results:
        worst, way = one.worst, one.way
        sent = f"{way.sampling} {way.codec.value}" + (f" {way.privacy}" if str(way.privacy) else "")
        rows.append(
            [
                ",".join(map(str, way.taps)),
                sent,
                f"{worst.exact}/{worst.texts}",
                *(f"{value:.2f}" for value in (worst.words.precision, worst.words.recall, worst.words.f1)),
                f"{worst.content.f1:.2f}",
                "search" if worst is one.search else "linear",
                f"{one.blind.words.f1:.2f} ({one.blind.content.f1:.2f})",
                *(_share(share) for share in (one.nearest, one.labels, one.digits, one.names)),
                *([f"{one.accuracy:.3f}" if one.accuracy is not None else "-"] if extra else []),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _share(share: Share | None) -> str:
    return "-" if share is None else f"{share.right:.2f} ({share.chance:.2f})"


def sentences(results: Sequence[Result]) -> str:
    """What it means, in three sentences, and what ε there is."""
    worst = max(results, key=lambda one: one.worst.exact / max(1, one.worst.texts))
    least = min(results, key=lambda one: (one.worst.content.f1, one.worst.exact))
    found = worst.worst
    lines = [
        f"Of {found.texts} texts sent as {worst.way}, {found.exact} came back word for word, and "
        f"{found.words.recall:.0%} of all words ({found.content.recall:.0%} of the content words), from the "
        "upload and public text alone.",
        f"The least was found in {least.way}: {least.worst.exact} of {least.worst.texts} word for word, F1 "
        f"of content words {least.worst.content.f1:.2f}, where a guess that needs no upload has "
        f"{least.blind.content.f1:.2f}.",
        "These are lower bounds, of the attacks built in and the time they were given: whoever has the "
        "uploads, the trainer and the broker among them, may have better ones, so let them run where the "
        "texts may be read.",
    ]
    return "\n".join([*lines, *_epsilons(results), *_rotations(results)])


def _epsilons(results: Sequence[Result]) -> list[str]:
    return [
        f"{one.way}: ε = {one.epsilon:,.0f} at δ = {DELTA:g} for one sample, between any two samples "
        "whatever (all taps and vectors together, each of length 1)."
        + (" At such an ε the bound says nothing." if one.epsilon > _VACUOUS else "")
        for one in results
        if one.epsilon is not None
    ]


def _rotations(results: Sequence[Result]) -> list[str]:
    return [
        f"{one.way} under a fleet's secret rotation: F1 of words by the linear inverter "
        + ", ".join(f"{f1:.2f} with {count} known" for count, f1 in one.rotated.items())
        + "; it falls to whoever knows some texts, or has one device."
        for one in results
        if one.rotated
    ]


def to_builtins(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For JSON."""
    return [_plain(one) for one in results]


def _plain(one: Result) -> dict[str, Any]:
    way = {
        **dataclasses.asdict(one.way),
        "privacy": str(one.way.privacy),
        "codebooks": one.way.codebooks.hex(),
        "codec": one.way.codec.value,
        "taps": list(one.way.taps),
    }
    return {
        "way": way,
        "attacks": {
            name: _words(found)
            for name, found in (("search", one.search), ("linear", one.linear), ("without_upload", one.blind))
            if found is not None
        },
        "worst": _words(one.worst),
        "tokens_in_place": one.tokens,
        **{
            name: None if share is None else share._asdict()
            for name, share in (
                ("nearest", one.nearest),
                ("label", one.labels),
                ("number", one.digits),
                ("name", one.names),
            )
        },
        "rotated_f1_by_known": one.rotated,
        "seconds_a_text": one.seconds,
        "epsilon": one.epsilon,
        "accuracy": one.accuracy,
        "guesses": one.guesses,
    }


def _words(found: Found) -> dict[str, Any]:
    return {
        "exact": found.exact,
        "texts": found.texts,
        **{
            name: {"precision": score.precision, "recall": score.recall, "f1": score.f1}
            for name, score in (("words", found.words), ("content_words", found.content))
        },
    }


def plot(results: Sequence[Result], path: Path) -> None:
    """Bars a way: texts found word for word, and F1 of content words next to the guess without an upload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 1.6 + 0.55 * len(results)), constrained_layout=True)
    places = range(len(results))
    names = [
        str(one.way) + (f"\naccuracy {one.accuracy:.3f}" if one.accuracy is not None else "")
        for one in results
    ]
    exact = [100 * one.worst.exact / max(1, one.worst.texts) for one in results]
    content = [100 * one.worst.content.f1 for one in results]
    axis.barh(
        [place - 0.2 for place in places], exact, 0.38, color="C3", label="texts word for word, % of all"
    )
    axis.barh([place + 0.2 for place in places], content, 0.38, color="C0", label="content words, F1 in %")
    blind = [100 * one.blind.content.f1 for one in results]
    axis.plot(
        blind, [place + 0.2 for place in places], "k|", markersize=12, label="the same without any upload"
    )
    axis.set_yticks(list(places), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("what the strongest attack finds in uploads (less is better)")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
