"""The search attack: sentences that, run through the public backbone again, give the upload.

It begins with what the linear proposals say, and with the public sentences whose uploads are nearest, and goes
on with what fits better: another token at a place, two places exchanged, a token moved. What fits is judged by
the upload's own numbers and by how likely the sentence is in the public text. No decoder is trained, and
nothing is known of the job.

Legend: n vectors of a sentence, F numbers of each, T tokens, P places, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from sidestream.backbone.sampled import Ints
from sidestream.contract.tensors import Floats
from sidestream.leakage.encoding import Encoding
from sidestream.leakage.proposals import Proposals

_TOKENS: Final = 6  # proposals a place
_AT_ONCE: Final = (32, 128)  # candidates of a step, at first and after one that found nothing better
_LENGTHS: Final = 5
_NEAREST: Final = 3
_STARTS: Final = 3
_STEPS: Final = 40
_PAIRS: Final = 4  # tokens between which two are chosen anew
_SAME: Final = 0.1  # of the noise of quantising: so few codes differ between two machines that round
_METRIC: Final = 0.02  # of the spread: a difference that counts as much as noise, so that no number rules


class Guess(NamedTuple):
    """What an attack made of an upload."""

    sentence: Ints
    """[T]: token ids."""
    distance: float
    """Squared difference to the upload, in units of what the truth would have on average."""
    fits: bool
    """Whether it gives the upload to the last bit, but for rounding: then it is the sentence."""


class _State(NamedTuple):
    sentence: Ints
    upload: Floats  # [n, F], standardised
    cost: float


class Search:
    """Attacks uploads of one way.

    Args:
        encoding: The way to upload.
        proposals: Fitted on public text.
        noise: [F]: variance of what quantising and the device's noise add, of standardised numbers.
        public: Token ids of public text.
        uploads: [n, F] of each.
        first: Token ids that every sentence begins with.
        last: And ends with.
        stopped: Asked often; true ends a search where it stands.
    """

    def __init__(
        self,
        encoding: Encoding,
        proposals: Proposals,
        noise: Floats,
        *,
        public: Sequence[Ints],
        uploads: Sequence[Floats],
        first: Sequence[int],
        last: Sequence[int],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._encoding, self._proposals = encoding, proposals
        self._noise, self._weights = noise, 1.0 / (noise + _METRIC)
        self._first, self._last = list(first), list(last)
        self._public, self._stopped = public, stopped
        self._by_count: dict[int, tuple[Ints, Floats]] = {}
        counts = np.array([len(one) for one in uploads])
        for count in np.unique(counts).tolist():
            rows = np.flatnonzero(counts == count)
            flat = np.stack([proposals.standard(uploads[row]).ravel() for row in rows])
            self._by_count[count] = rows, flat * np.sqrt(np.tile(self._weights, count))
        self.runs = 0
        """Sentences that went through the backbone."""

    def attack(self, upload: Floats, starts: Sequence[Ints] = ()) -> Guess:
        """The sentence that explains an upload [n, F] best, of those tried.

        Args:
            upload: As the trainer decodes it.
            starts: Sentences to begin with; what the proposals say and the nearest public ones by default.
        """
        target = self._proposals.standard(upload)
        states = self._states(target, starts or self._starts(upload, target))
        best = states[0]
        for start in states[:_STARTS]:
            state = self._climb(target, start)
            best = min(best, state, key=lambda one: one.cost)
            if self._fits(target, best) or self._stopped():
                break
        return Guess(best.sentence, self._distance(target, best), self._fits(target, best))

    def _starts(self, upload: Floats, target: Floats) -> list[Ints]:
        guesses = [
            self._proposals.greedy(upload, length, self._first, self._last)
            for length in self._proposals.lengths(upload, _LENGTHS)
        ]
        if len(target) in self._by_count:
            rows, known = self._by_count[len(target)]
            sought = (target * np.sqrt(self._weights)).ravel()
            nearest = np.argsort(np.square(known).sum(axis=1) - 2 * known @ sought)[:_NEAREST]
            guesses += [self._public[rows[one]] for one in nearest]
        return guesses

    def _states(self, target: Floats, sentences: Sequence[Ints]) -> list[_State]:
        """Sentences of any length, the best first."""
        by_length: dict[int, list[Ints]] = {}
        for one in sentences:
            if self._proposals.way.counts(len(one)) == len(target):
                by_length.setdefault(len(one), []).append(one)
        states = [state for same in by_length.values() for state in self._tried(target, same)]
        return sorted(states, key=lambda one: one.cost)

    def _distance(self, target: Floats, state: _State) -> float:
        expected = len(target) * float((self._weights * self._noise).sum())
        return float(self._misfit(target, state.upload[None])[0] / max(expected, 1e-9))

    def _fits(self, target: Floats, state: _State) -> bool:
        """Whether it gives the upload to the last bit, but for rounding; never where the device adds noise."""
        if self._proposals.way.privacy.noise:
            return False
        again = self._encoding.recoded(self._proposals.unstandard(state.upload))
        apart = np.square(self._proposals.standard(again) - target).mean()
        return bool(apart < _SAME * max(float(self._noise.mean()), 1e-4))

    def _tried(self, target: Floats, sentences: Sequence[Ints]) -> list[_State]:
        """Sentences of one length, run through the backbone."""
        self.runs += len(sentences)
        uploads = np.stack([self._proposals.standard(one) for one in self._encoding.clean(sentences)])
        surprise = self._proposals.language.surprise(np.stack(sentences))
        costs = self._misfit(target, uploads) / 2 + surprise
        return [_State(*one) for one in zip(sentences, uploads, costs.tolist(), strict=True)]

    def _misfit(self, target: Floats, uploads: Floats) -> Floats:
        misfit: Floats = (np.square(uploads - target) * self._weights).sum(axis=(1, 2))
        return misfit

    def _climb(self, target: Floats, state: _State) -> _State:
        tried = {state.sentence.tobytes()}
        stuck = 0
        for _ in range(_STEPS):
            if self._stopped() or self._fits(target, state):
                break
            fresh = [one for one in self._candidates(target, state, stuck) if one.tobytes() not in tried]
            found = self._states(target, fresh[: _AT_ONCE[stuck]])
            tried.update(one.sentence.tobytes() for one in found)
            better = [one for one in found if one.cost < state.cost]
            if len(better) > 1 and (joined := self._joined(state, better)).tobytes() not in tried:
                tried.add(joined.tobytes())
                better = sorted([*better, *self._tried(target, [joined])], key=lambda one: one.cost)
            if better:
                state, stuck = better[0], 0
            elif stuck + 1 < len(_AT_ONCE):
                stuck += 1
            else:
                break
        return state

    def _joined(self, state: _State, better: Sequence[_State]) -> Ints:
        """All changes that help and do not touch each other, at once."""
        joined, used = state.sentence.copy(), np.zeros(len(state.sentence), bool)
        for one in better:
            if len(one.sentence) != len(joined):
                continue
            changed = one.sentence != state.sentence
            if not (changed & used).any():
                joined[changed] = one.sentence[changed]
                used |= changed
        return joined

    def _candidates(self, target: Floats, state: _State, stuck: int) -> list[Ints]:
        """Sentences near by, the most promising first."""
        sentence = state.sentence
        places = np.arange(len(self._first), len(sentence) - len(self._last))
        homes = self._proposals.way.homes(len(sentence))
        counts = np.bincount(homes)
        change = self._proposals.change(target - state.upload) * counts[:, None].astype(np.float32)
        own = self._proposals.signatures[sentence[places]]
        scores = self._proposals.scores(change[homes[places]] + own, counts[homes[places]])
        gains = scores - scores[np.arange(len(places)), sentence[places]][:, None]
        top = np.argpartition(-gains, _TOKENS, axis=1)[:, :_TOKENS]
        by_gain = sorted(
            ((float(gains[row, token]), place, token) for row, place in enumerate(places.tolist()) for token in top[row].tolist()),
            reverse=True,
        )
        changed = [_put(sentence, place, token) for _, place, token in by_gain]
        if not stuck:
            many = _AT_ONCE[0] * 3 // 4
            return [*changed[:many], *self._reordered(sentence, places, 1), *changed[many:]]
        refilled = self._refilled(sentence, places, homes, counts, change)
        resized = self._resized(sentence, places, [(place, token) for _, place, token in by_gain])
        moved = self._reordered(sentence, places, 5)
        return [*refilled, *resized, *moved, *changed]

    def _refilled(
        self, sentence: Ints, places: Ints, homes: Ints, counts: Ints, change: Floats
    ) -> list[Ints]:
        """Two tokens of one vector chosen anew, one after the other."""
        pairs = [
            (one, other)
            for one in places.tolist()
            for other in places[places > one].tolist()
            if homes[one] == homes[other] and other - one <= _PAIRS
        ]
        if not pairs:
            return []
        one, other = np.array(pairs).T
        signatures = self._proposals.signatures
        left = change[homes[one]] + signatures[sentence[one]] + signatures[sentence[other]]
        first = self._proposals.scores(left, counts[homes[one]]).argmax(axis=1)
        second = self._proposals.scores(left - signatures[first], counts[homes[one]]).argmax(axis=1)
        return [
            _put(_put(sentence, places_[0], a), places_[1], b)
            for places_, x, y in zip(pairs, first.tolist(), second.tolist(), strict=True)
            for a, b in ((x, y), (y, x))
        ]

    def _resized(self, sentence: Ints, places: Ints, proposals: Sequence[tuple[int, int]]) -> list[Ints]:
        """A token left out, or one more."""
        if self._proposals.way.sampling.kind == "all" or not len(places):
            return []
        longer = [np.insert(sentence, place, token) for place, token in proposals[: 2 * len(places)]]
        shorter = [np.delete(sentence, place) for place in places.tolist()]
        return [*longer, *shorter]

    def _reordered(self, sentence: Ints, places: Ints, far: int) -> list[Ints]:
        """Two near places exchanged, or a token moved."""
        found = []
        for place in places.tolist():
            for other in range(place + 1, min(place + far, int(places[-1])) + 1):
                run = sentence[place : other + 1]
                found.append(_put(_put(sentence, place, run[-1]), other, run[0]))
                if other > place + 1:
                    found += [_rolled(sentence, place, other, by) for by in (1, -1)]
        return found


def _put(sentence: Ints, place: int, token: int) -> Ints:
    changed = sentence.copy()
    changed[place] = token
    return changed


def _rolled(sentence: Ints, place: int, other: int, by: int) -> Ints:
    changed = sentence.copy()
    changed[place : other + 1] = np.roll(sentence[place : other + 1], by)
    return changed
