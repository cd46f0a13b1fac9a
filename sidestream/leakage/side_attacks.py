"""What else an upload tells: which of some texts it is, its label, whether there are numbers and names in it.

Legend: M uploads, E features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sidestream.contract.tensors import Floats
from sidestream.leakage.proposals import flat, ridge
from sidestream.leakage.way import Seen

_LEAST: Final = 5


class Share(NamedTuple):
    """A share of right answers, next to what needs no upload."""

    right: float
    chance: float


def nearest(attacked: Sequence[Seen]) -> Share:
    """How often an upload's text is the nearest of those attacked, by what each would give."""
    right = 0
    for number, one in enumerate(attacked):
        apart = [
            np.square(one.sent - other.clean).sum() if other.clean.shape == one.sent.shape else np.inf
            for other in attacked
        ]
        right += int(np.argmin(apart)) == number
    return Share(right / len(attacked), 1 / len(attacked))


def labels(attacked: Sequence[Seen], names: Sequence[str]) -> Share | None:
    """Labels from uploads: learnt from half of them, told of the others; None of less than two."""
    if len(set(names)) < 2 or not all(names):
        return None
    classes = sorted(set(names))
    answers = np.array([[name == one for one in classes] for name in names], np.float32)
    half = len(names) // 2
    learnt = ridge(features(attacked[:half]), answers[:half])
    told = learnt(features(attacked[half:])).argmax(axis=1)
    right = float((told == answers[half:].argmax(axis=1)).mean())
    return Share(right, Counter(names[half:]).most_common(1)[0][1] / len(names[half:]))


def attribute(
    public: Sequence[Seen],
    public_texts: Sequence[str],
    attacked: Sequence[Seen],
    texts: Sequence[str],
    has: Callable[[str], bool],
) -> Share | None:
    """Whether a text has something, learnt from public text: right with it and without, in the mean.

    None where fewer than five of either are at hand.
    """
    known = np.array([[has(text)] for text in public_texts], np.float32)
    truth = np.array([has(text) for text in texts])
    if min(known.sum(), (1 - known).sum(), truth.sum(), (~truth).sum()) < _LEAST:
        return None
    told = ridge(features(public), known)
    level = np.median(told(features(public))[known[:, 0] > 0])
    level = (level + np.median(told(features(public))[known[:, 0] == 0])) / 2
    found: npt.NDArray[np.bool_] = told(features(attacked))[:, 0] > level
    return Share(float((found[truth].mean() + (~found[~truth]).mean()) / 2), 0.5)


def has_digit(text: str) -> bool:
    """Whether there is a number in it."""
    return any(letter.isdigit() for letter in text)


def has_name(text: str) -> bool:
    """Whether a word but the first begins with a capital, and goes on without."""
    return any(word[:1].isupper() and word[1:].islower() for word in text.split()[1:])


def features(uploads: Sequence[Seen]) -> Floats:
    """[M, E]: the mean of each upload's vectors, and their greatest values."""
    rows = [flat(one.sent) for one in uploads]
    return np.stack([np.concatenate([row.mean(axis=0), row.max(axis=0)]) for row in rows])


def turned(uploads: Sequence[Seen], turns: Floats) -> list[Seen]:
    """Under a secret rotation [B, d, d] of each tap."""
    return [one._replace(sent=one.sent @ turns, clean=one.clean @ turns) for one in uploads]


def turned_back(uploads: Sequence[Seen], known: Sequence[Seen], turns: Floats) -> list[Seen]:
    """What somebody makes of rotated uploads who knows the texts of some: the likeliest rotation, taken back.

    It is the nearest to what those texts tell (orthogonal Procrustes, Schönemann 1966).

    Args:
        uploads: Rotated.
        known: Not rotated, of the same ways: what is sent of texts that the attacker knows.
        turns: [B, d, d], the secret; only what it makes of ``known`` is looked at.
    """
    if not known:
        return list(uploads)
    plain = np.concatenate([one.clean for one in known], axis=1)
    rotated = np.concatenate([one.sent for one in known], axis=1) @ turns
    found = []
    for before, after in zip(plain, rotated, strict=True):
        left, _, right = np.linalg.svd(after.T @ before)
        found.append(left @ right)
    return [one._replace(sent=one.sent @ np.stack(found)) for one in uploads]


def random_turns(taps: int, width: int, rng: np.random.Generator) -> Floats:
    """[B, d, d]: rotations drawn evenly."""
    found = [np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in range(taps)]
    return np.stack(found).astype(np.float32)
