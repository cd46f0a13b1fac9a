"""Which tokens a vector speaks of, by linear maps that are fitted on public text.

A token's *signature* is what the first tapped layer gives for it where it stands alone. A map takes an
upload's vector to the sum of the signatures of the tokens that it is of. As it is linear, it also takes the
difference between an upload and a candidate's to what must change: which token to put in another's place.

Legend: K texts, B taps, N vectors of a text, T tokens of it, d width, D = B·d, V tokens that there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from sidestream.backbone.backbone import Backbone
from sidestream.backbone.sampled import Ints
from sidestream.backbone.text_input import Tokens
from sidestream.contract.tensors import Floats
from sidestream.leakage.language import Language
from sidestream.leakage.way import SINGLE, Seen, Way

_RIDGE: Final = 1e-2
_SHRINK: Final = 0.02
_TOGETHER: Final = 1024
_FEW: Final = 100
_FLOOR: Final = 0.02


class Ridge(NamedTuple):
    """x ↦ (x − middle) / spread · weights + bias."""

    middle: Floats
    spread: Floats
    weights: Floats
    bias: Floats

    def __call__(self, rows: Floats) -> Floats:
        """[M, D] -> [M, E]."""
        found: Floats = (((rows - self.middle) / self.spread) @ self.weights + self.bias).astype(np.float32)
        return found

    def change(self, rows: Floats) -> Floats:
        """[M, D] -> [M, E]: what a difference of inputs makes."""
        found: Floats = ((rows / self.spread) @ self.weights).astype(np.float32)
        return found


def ridge(inputs: Floats, answers: Floats) -> Ridge:
    """Least squares with a small penalty, of standardised inputs [M, D] and [M, E]."""
    middle, spread = inputs.mean(axis=0), inputs.std(axis=0) + 1e-6
    rows = ((inputs - middle) / spread).astype(np.float32)
    bias = answers.mean(axis=0)
    gram = rows.T @ rows
    gram[np.diag_indices_from(gram)] += _RIDGE * len(rows)
    weights = np.linalg.solve(gram, rows.T @ (answers - bias))
    return Ridge(middle, spread, weights.astype(np.float32), bias)


def homes(way: Way, length: int, vectors: int, places: Ints) -> Ints:
    """[T]: the vector that says most of each token."""
    if way.policy.kind in SINGLE:
        between = (places[1:] + places[:-1]) / 2
        return np.searchsorted(between, np.arange(length))
    return np.arange(length) * vectors // length


def signatures(backbone: Backbone, layer: int, language: Language) -> Floats:
    """[V, d], their mean taken away."""
    before, after = language.before, language.after
    found, count = [], len(language.log_counts)
    for start in range(0, count, _TOGETHER):
        ids = np.arange(start, min(count, start + _TOGETHER))
        rows = np.empty((len(ids), len(before) + 1 + len(after)), np.int64)
        rows[:, : len(before)], rows[:, len(before)] = before, ids
        rows[:, len(before) + 1 :] = after
        states = backbone.states(Tokens(rows, np.ones(rows.shape, bool)), layer)
        found.append(states.reshape(*rows.shape, -1)[:, len(before)])
    whole = np.concatenate(found)
    centred: Floats = whole - whole.mean(axis=0)
    return centred


@dataclass(frozen=True)
class Proposals:
    """Fitted for a way to send. See :func:`fit`."""

    way: Way
    table: Floats
    """[V, d] signatures."""
    own: Ridge
    """From a vector to the mean signature of its tokens."""
    others: Ridge | None
    """From the mean of a text's vectors to the mean signature of the tokens that are not sampled."""
    precision: Floats
    """[d, d]: a root of the inverse of what the map errs by, a token."""
    seen_as: Floats
    """[V, d]: signatures times that."""
    lengths_squared: Floats
    """[V]: of those."""
    lengths: dict[int, Ridge]
    """By N, from a text's vectors to T; empty where N says it."""
    where: Ridge | None
    """From a vector to where its token is, where that is not known."""
    weights: Floats
    """[D]: what a squared difference counts in each number, by what quantising and noise do to it."""
    public: Sequence[Seen]
    """What it was fitted on."""
    by_count: dict[int, tuple[Ints, Floats]]
    """By N: which public texts have so many vectors, and those, weighted [M, N·D]."""

    def scores(self, change: Floats, prior: Floats) -> Floats:
        """[M, d] signatures wanted -> [M, V]: twice how likely each token is, as a logarithm."""
        wanted = change @ self.precision
        found: Floats = 2 * wanted @ self.seen_as.T + (2 * prior - self.lengths_squared).astype(np.float32)
        return found


def fit(backbone: Backbone, way: Way, public: Sequence[Seen], language: Language, table: Floats) -> Proposals:
    """Learn the maps from public text."""
    inputs, answers, counts = list[Floats](), list[Floats](), list[Floats]()
    rest_in, rest_out = list[Floats](), list[Floats]()
    single = way.policy.kind in SINGLE
    for one in public:
        vectors = flat(one.sent)
        inputs.append(vectors)
        known = table[one.tokens]
        if single:
            answers.append(known[one.places])
            counts.append(np.ones(len(vectors), np.float32))
            others = np.setdiff1d(np.arange(len(known)), one.places)
            if len(others):
                rest_in.append(vectors.mean(axis=0))
                rest_out.append(known[others].mean(axis=0))
        else:
            home = homes(way, len(known), len(vectors), one.places)
            count = np.bincount(home, minlength=len(vectors))
            sums = np.add.reduceat(known, np.searchsorted(home, np.arange(len(vectors))))
            counts.append(count.astype(np.float32))
            answers.append(np.asarray(sums / count[:, None], np.float32))
    rows, wanted, weight = np.concatenate(inputs), np.concatenate(answers), np.concatenate(counts)
    own, precision = _explained(rows, wanted, weight)
    weights = _weights(way, public, own.spread)
    seen_as = table @ precision
    return Proposals(
        way=way,
        table=table,
        own=own,
        others=ridge(np.stack(rest_in), np.stack(rest_out)) if len(rest_in) > _FEW else None,
        precision=precision,
        seen_as=seen_as,
        lengths_squared=np.square(seen_as).sum(axis=1),
        lengths=_lengths(way, public),
        where=_where(way, public) if single else None,
        weights=weights,
        public=public,
        by_count=_by_count(public, weights),
    )


def _explained(rows: Floats, wanted: Floats, counts: Floats) -> tuple[Ridge, Floats]:
    """From uploads [M, D] to the mean signatures [M, d] that explain them best, and a root of how well.

    Uploads are taken for a linear map of mean signatures with errors, which fall with the number of tokens;
    the way back is by generalised least squares, which unlike a regression on uploads does not draw rare
    tokens to the mean.
    """
    middle, spread = rows.mean(axis=0), rows.std(axis=0) + 1e-6
    inputs = ((rows - middle) / spread).astype(np.float32)
    centre = wanted.mean(axis=0)
    signal = (wanted - centre).astype(np.float32)
    gram = signal.T @ signal
    gram[np.diag_indices_from(gram)] += _RIDGE * np.trace(gram) / len(gram)
    forth = np.linalg.solve(gram, signal.T @ inputs)  # [d, D]
    wrong = (inputs - signal @ forth) * np.sqrt(counts)[:, None].astype(np.float32)
    errors = wrong.T @ wrong / len(wrong)
    errors[np.diag_indices_from(errors)] += _SHRINK * np.trace(errors) / len(errors) + 1e-6
    weighed = np.linalg.solve(errors, forth.T)  # [D, d]
    told = forth @ weighed
    told[np.diag_indices_from(told)] += 1e-3 * np.trace(told) / len(told)
    back = np.linalg.solve(told, weighed.T).T.astype(np.float32)
    root: Floats = np.linalg.cholesky(told).astype(np.float32)
    return Ridge(middle, spread, back, centre), root


def _weights(way: Way, public: Sequence[Seen], spread: Floats) -> Floats:
    """[D]: one over the noise, and a little of the spread, so that no number that hardly varies rules."""
    errors = np.concatenate([flat(one.sent - one.clean) for one in public]).var(axis=0)
    width, directions = public[0].sent.shape[2], way.privacy.directions
    share = directions / width if way.privacy.noise and 0 < directions < width else 1.0  # they err together
    weights: Floats = (share / (errors + _FLOOR * np.square(spread))).astype(np.float32)
    return weights


def _by_count(public: Sequence[Seen], weights: Floats) -> dict[int, tuple[Ints, Floats]]:
    counts = np.array([one.sent.shape[1] for one in public])
    found = {}
    for count in np.unique(counts).tolist():
        rows = np.flatnonzero(counts == count)
        known = np.stack([(flat(public[row].clean) * np.sqrt(weights)).ravel() for row in rows.tolist()])
        found[count] = rows, known
    return found


def flat(vectors: Floats) -> Floats:
    """[B, N, d] -> [N, D]."""
    found: Floats = vectors.transpose(1, 0, 2).reshape(vectors.shape[1], -1)
    return found


def shape_of(vectors: Floats) -> Floats:
    """[B, N, d] -> [N·d] of the first tap: how long a text is shows there best."""
    found: Floats = vectors[0].ravel()
    return found


def _lengths(way: Way, public: Sequence[Seen]) -> dict[int, Ridge]:
    if way.policy.kind == "all":
        return {}
    counts = np.array([one.sent.shape[1] for one in public])
    found = {}
    for count in np.unique(counts):
        some = [one for one in public if one.sent.shape[1] == count]
        if len(some) > 20 and count * some[0].sent.shape[2] <= 6144:
            lengths = np.array([[len(one.tokens)] for one in some], np.float32)
            found[int(count)] = ridge(np.stack([shape_of(one.sent) for one in some]), lengths)
    return found


def _where(way: Way, public: Sequence[Seen]) -> Ridge | None:
    if way.policy.kind in ("all", "pivot"):
        return None
    places = np.concatenate([one.places for one in public]).astype(np.float32)
    return ridge(np.concatenate([flat(one.sent) for one in public]), places[:, None])
