"""The search attack: candidates go through the public backbone again, and are compared with the upload.

It begins with the tokens that linear maps propose (:mod:`.proposals`), and changes one or a few at a time.
What the candidate's upload lacks of the true one is put through the same maps and says what to put in which
place. First by the shallowest tap alone, which is cheap and nearest to the words; then by all. Of two
candidates the likelier one is kept: by how far its upload is from the true one, in units of what quantising
and noise do, and by how public text goes.

Legend: B taps, N vectors, d width, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Final, NamedTuple

import numpy as np

from sidestream.backbone.backbone import Backbone
from sidestream.backbone.sampled import Ints
from sidestream.contract.sampling import EVERY_TOKEN
from sidestream.contract.tensors import Floats, decode, encode
from sidestream.leakage.language import Language
from sidestream.leakage.proposals import Proposals, flat, homes, shape_of
from sidestream.leakage.way import SINGLE, Way, rows_of

_TOP: Final = (12, 40)  # tokens proposed a place, at first and where nothing helped
_ROWS: Final = 32
_ROWS_STUCK: Final = 160
_STARTS: Final = 3
_NEAREST: Final = 3
_PATIENCE: Final = 2
_ALIKE: Final = 0.97
_NEAR: Final = 4


class Guess(NamedTuple):
    """What the search found."""

    tokens: Ints
    """[T], what stands around a text included."""
    cost: float
    """Minus the logarithm of how likely it is."""
    verified: bool
    """Whether its upload is the true one, value for value, or nearly."""


class _State(NamedTuple):
    tokens: Ints
    cost: float
    vectors: Floats
    """[B, N, d] that it would give."""


class Search:
    """Finds texts for uploads of one way to send.

    Args:
        backbone: The public one.
        stages: Proposals for the shallowest tap alone, if there are several, and for all.
        language: Of public text.
        clock: Seconds.
    """

    def __init__(
        self,
        backbone: Backbone,
        stages: Sequence[Proposals],
        language: Language,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backbone, self._stages, self._language, self._clock = backbone, stages, language, clock
        self.forwards = 0
        """Candidates that went through the backbone."""

    def find(self, upload: Floats, seconds: float = float("inf")) -> Guess:
        """The likeliest text for an upload [B, N, d] that can be found in so many seconds."""
        until = self._clock() + seconds
        best: Guess | None = None
        whole = self._stages[-1]
        for tokens, places in self._starts(upload)[:_STARTS]:
            one = _One(self, upload, places, until)
            for stage in self._stages:
                tokens = one.climb(stage, tokens).tokens
            state = one.state(whole, [tokens])[0]
            guess = Guess(state.tokens, state.cost, one.matches(state))
            if best is None or guess.verified or guess.cost < best.cost:
                best = guess
            if best.verified or self._clock() > until:
                break
        assert best is not None
        return best

    def first(self, upload: Floats) -> Ints:
        """[T] by the linear maps alone: no candidate goes through the backbone."""
        length, places = self._lengths(upload)[0]
        return self._first(self._stages[-1], upload, length, places)

    def _starts(self, upload: Floats) -> list[tuple[Ints, Ints]]:
        """First guesses of tokens and of where the vectors are from, the likeliest first, by their lengths.

        What the linear maps say, and the public texts whose uploads are nearest.
        """
        whole, found = self._stages[-1], []
        guesses = [
            (self._first(whole, upload, length, places), places) for length, places in self._lengths(upload)
        ]
        if upload.shape[1] in whole.by_count:
            rows, known = whole.by_count[upload.shape[1]]
            sought = (flat(upload) * np.sqrt(whole.weights)).ravel()
            nearest = rows[np.argsort(np.square(known).sum(axis=1) - 2 * known @ sought)[:_NEAREST]]
            guesses += [(whole.public[row].tokens, whole.public[row].places) for row in nearest]
        for tokens, places in guesses:
            one = _One(self, upload, places, float("inf"))
            found.append((one.state(whole, [tokens])[0].cost, tokens, places))
        found.sort(key=lambda one: one[0])
        return [(tokens, places) for _, tokens, places in found]

    def _lengths(self, upload: Floats) -> list[tuple[int, Ints]]:
        way, count = self._stages[-1].way, upload.shape[1]
        policy, around = way.policy, len(self._language.before) + len(self._language.after)
        least = max(count, around + 1)
        none = np.empty(0, np.int64)
        if policy.kind == "all":
            return [(count, np.arange(count))]
        if policy.count > count and not policy.share and policy.kind not in ("mean", "pivot"):
            return [(count, np.arange(count) if policy.kind in SINGLE else none)]
        known = self._stages[-1].lengths.get(count)
        middle = round(float(known(shape_of(upload)[None])[0, 0])) if known else 2 * count
        if policy.share:
            middle = round(count / policy.share)
        found = []
        for length in (middle, middle - 1, middle + 1, middle - 2, middle + 2):
            if least <= length <= way.max_tokens:
                found.append((length, self._places(upload, length) if policy.kind in SINGLE else none))
        return found or [(least, self._places(upload, least) if policy.kind in SINGLE else none)]

    def _places(self, upload: Floats, length: int) -> Ints:
        """[N]: where the sampled tokens were, ascending."""
        stage, count = self._stages[-1], upload.shape[1]
        if stage.where is None:
            return np.array([length - 1 if self._backbone.is_decoder else 0])
        found = np.rint(stage.where(flat(upload))[:, 0]).astype(np.int64)
        for index in range(count):  # ascending, with room for those that follow
            low = found[index - 1] + 1 if index else 0
            found[index] = min(max(found[index], low), length - count + index)
        return found

    def _first(self, stage: Proposals, upload: Floats, length: int, places: Ints) -> Ints:
        """Tokens by the linear maps alone, vector by vector, the surest first."""
        language, vectors = self._language, flat(upload)
        home = homes(stage.way, length, len(vectors), places)
        fixed = self.fixed(length)
        single = stage.way.policy.kind in SINGLE
        wanted, rest = stage.own(vectors), None
        if single and stage.others is not None:
            rest = stage.others(vectors.mean(axis=0)[None])[0]
        tokens = np.where(fixed >= 0, fixed, 0)
        for number in range(len(vectors)):
            mine = places[number : number + 1] if single else np.flatnonzero(home == number)
            left = wanted[number] * len(mine)
            left = left - stage.table[fixed[mine][fixed[mine] >= 0]].sum(axis=0)
            for place in mine[fixed[mine] < 0]:
                token = int(stage.scores(left[None], language.log_counts * len(mine))[0].argmax())
                tokens[place], left = token, left - stage.table[token]
        if single:
            others = np.setdiff1d(np.flatnonzero(fixed < 0), places)
            left = (wanted.mean(axis=0) if rest is None else rest) * max(1, len(others))
            for place in others:
                token = int(stage.scores(left[None], language.log_counts * len(others))[0].argmax())
                tokens[place], left = token, left - stage.table[token]
        return tokens

    def fixed(self, length: int) -> Ints:
        """[T]: tokens that stand around every text; -1 elsewhere."""
        found = np.full(length, -1)
        found[: len(self._language.before)] = self._language.before
        if self._language.after:
            found[-len(self._language.after) :] = self._language.after
        return found

    @property
    def backbone(self) -> Backbone:
        """The public one."""
        return self._backbone

    @property
    def language(self) -> Language:
        """Of public text."""
        return self._language

    def late(self, until: float) -> bool:
        """Whether the time is up."""
        return self._clock() > until


class _One:
    """The search for one upload, at one length."""

    def __init__(self, search: Search, upload: Floats, places: Ints, until: float) -> None:
        self._search, self._upload, self._places, self._until = search, upload, places, until

    def climb(self, stage: Proposals, tokens: Ints) -> _State:
        """Change tokens for the better until nothing helps."""
        best, stuck = self.state(stage, [tokens])[0], 0
        tried = {best.tokens.tobytes()}
        while stuck < _PATIENCE and not self._search.late(self._until):
            if self.matches(best, stage):
                break
            changed = self._changes(stage, best, stuck)
            fresh = [one for one in changed if one.tobytes() not in tried][: _ROWS_STUCK if stuck else _ROWS]
            if not fresh:
                break
            tried.update(one.tobytes() for one in fresh)
            states = self.state(stage, fresh)
            joined = self._joined(best, states)
            if joined is not None and joined.tobytes() not in tried:
                tried.add(joined.tobytes())
                states += self.state(stage, [joined])
            if not states:
                stuck += 1
                continue
            found = min(states, key=lambda one: one.cost)
            best, stuck = (found, 0) if found.cost < best.cost else (best, stuck + 1)
        return best

    def state(self, stage: Proposals, rows: Sequence[Ints]) -> list[_State]:
        """What candidates of one length would give, and how likely they are."""
        way, search = stage.way, self._search
        rows = [row for row in rows if way.policy.kind in SINGLE or self._fits(way, len(row))]
        if not rows:
            return []
        search.forwards += len(rows)
        tokens = search.backbone.text_input.padded([row.tolist() for row in rows])
        if way.policy.kind in SINGLE:
            mask = np.zeros(tokens.mask.shape, bool)
            mask[:, self._places] = True
            sampled = search.backbone.sample(tokens, way.taps, EVERY_TOKEN, mask)
        else:
            sampled = search.backbone.sample(tokens, way.taps, way.policy)
        target, found = self._upload[: len(way.taps)], []
        for row, vectors in zip(rows, rows_of(sampled), strict=True):
            vectors = way.privacy.project(vectors)
            if not np.isfinite(vectors).all():
                found.append(_State(row, np.inf, np.zeros_like(target)))
                continue
            apart = (np.square(flat(vectors - target)) * stage.weights).sum() / 2
            found.append(_State(row, float(apart) - search.language.log_of(row), vectors))
        return found

    def _fits(self, way: Way, length: int) -> bool:
        """Whether a text of so many tokens gives so many vectors."""
        return (
            int(way.policy.counts(np.array([length]))[0]) == self._upload.shape[1]
            and length <= way.max_tokens
        )

    def matches(self, state: _State, stage: Proposals | None = None) -> bool:
        """Whether a candidate, written as devices write, is what came; with noise, nobody can tell."""
        way = (stage or self._search._stages[-1]).way
        if way.privacy.noise or len(way.taps) < len(self._upload):
            return False
        again = decode(encode(state.vectors, way.codec, way.codebooks))
        tolerance = 1e-5 + 1e-3 * np.abs(self._upload)
        return bool((np.abs(again - self._upload) <= tolerance).mean() > _ALIKE)

    def _changes(self, stage: Proposals, state: _State, stuck: int) -> list[Ints]:
        """Candidates that differ in one place or two, the most promising first.

        Where nothing helped, tokens are proposed that public text has not, too.
        """
        tokens, free = state.tokens, np.flatnonzero(self._search.fixed(len(state.tokens)) < 0)
        home = homes(stage.way, len(tokens), self._upload.shape[1], self._places)
        count = np.ones(1, int) if stage.way.policy.kind in SINGLE else np.bincount(home)
        size = count[home[free] if len(count) > 1 else np.zeros(len(free), int)].astype(np.float32)
        lack = stage.own.change(flat(self._upload[: len(stage.way.taps)] - state.vectors))
        wanted = lack[home[free]] * size[:, None] + stage.table[tokens[free]]
        prior = self._search.language.log_counts * size[:, None]
        scores = stage.scores(wanted.astype(np.float32), np.zeros_like(prior) if stuck else prior)
        gains = (scores - scores[np.arange(len(free)), tokens[free]][:, None]) / size[:, None]
        few = min(_TOP[stuck > 0], gains.shape[1] - 1)
        top = np.argpartition(-gains, few, axis=1)[:, :few]
        rated = sorted(
            (
                (float(gains[row, token]), int(place), int(token))
                for row, place in enumerate(free)
                for token in top[row]
                if token != tokens[place]
            ),
            reverse=True,
        )
        changed = [_put(tokens, place, token) for _, place, token in rated]
        best, firsts = tokens.copy(), set[int]()
        for gain, place, token in rated:  # the best of each vector, all at once
            if gain > 0 and home[place] not in firsts:
                firsts.add(int(home[place]))
                best[place] = token
        if not stuck:
            many = _ROWS * 3 // 4
            return [best, *changed[:many], *_moved(tokens, free, 1), *changed[many:]]
        if stage.way.policy.kind in SINGLE:
            return [*changed, *_moved(tokens, free, _NEAR)]
        kinds = (self._refilled(stage, tokens, free, home, lack), _resized(tokens, free, rated))
        mixed = zip_longest(*kinds, _moved(tokens, free, _NEAR), changed)
        return [one for some in mixed for one in some if one is not None]

    def _refilled(self, stage: Proposals, tokens: Ints, free: Ints, home: Ints, lack: Floats) -> list[Ints]:
        """Two near tokens of one vector chosen anew, one after the other, in either order."""
        pairs = [(a, b) for a in free for b in free if 0 < b - a <= _NEAR and home[a] == home[b]]
        if not pairs:
            return []
        first, second = np.array(pairs).T
        size = np.bincount(home)[home[first]][:, None].astype(np.float32)
        prior, table = self._search.language.log_counts * size, stage.table
        left = lack[home[first]] * size + table[tokens[first]] + table[tokens[second]]
        one = stage.scores(left, prior).argmax(axis=1)
        other = stage.scores(left - table[one], prior).argmax(axis=1)
        return [
            _put(_put(tokens, a, x), b, y)
            for a, b, p, q in zip(first, second, one, other, strict=True)
            for x, y in ((p, q), (q, p))
        ]

    def _joined(self, best: _State, states: Sequence[_State]) -> Ints | None:
        """All changes that helped, as far as they are of different places."""
        same = (one for one in states if len(one.tokens) == len(best.tokens))
        better = sorted((one for one in same if one.cost < best.cost), key=lambda one: one.cost)
        if len(better) < 2:
            return None
        found: Ints = best.tokens.copy()
        taken = np.zeros(len(best.tokens), bool)
        for one in better:
            places = one.tokens != best.tokens
            if not (places & taken).any():
                found[places] = one.tokens[places]
                taken |= places
        return found


def _put(tokens: Ints, place: int, token: int) -> Ints:
    changed: Ints = tokens.copy()
    changed[place] = token
    return changed


def _resized(tokens: Ints, free: Ints, rated: Sequence[tuple[float, int, int]]) -> list[Ints]:
    """One token less, or one more."""
    longer = [np.insert(tokens, place, token) for _, place, token in rated[: 2 * len(free)]]
    return [*longer, *(np.delete(tokens, place) for place in free if len(free) > 1)]


def _moved(tokens: Ints, free: Ints, far: int) -> list[Ints]:
    """Two near tokens exchanged, or one taken elsewhere near by."""
    found = []
    for first in range(len(free)):
        for second in range(first + 1, min(first + far + 1, len(free))):
            a, b = free[first], free[second]
            if tokens[a] == tokens[b]:
                continue
            found.append(_put(_put(tokens, a, tokens[b]), b, tokens[a]))
            if b - a > 1 and len(free) == free[-1] - free[0] + 1:
                for shift in (-1, 1):
                    moved = tokens.copy()
                    moved[a : b + 1] = np.roll(tokens[a : b + 1], shift)
                    found.append(moved)
    return found
