from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.backbone.inputs import seeds_of
from sidestream.backbone.sampled import Bools, Ints, Sampled
from sidestream.backbone.token_sampler import TokenSampler
from sidestream.contract.sampling import Sampling, parse_sampling
from sidestream.contract.tensors import Floats

BLOCKS, WIDTH = 2, 5
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)
POLICIES = st.sampled_from(["pivot", "mean", "segments:1", "segments:3", "segments:64", "all"])
PICKS = st.sampled_from(["random:1", "random:3", "random:64", "important:1", "important:4"])


@dataclass(kw_only=True)
class Taps:
    """What a forward pass of some texts gives, tap by tap."""

    activations: Floats
    """[B, K, T, d]."""
    mask: Bools
    """[K, T]."""
    seeds: Ints
    """[K]."""


def sample_tokens(taps: Taps, sampling: Sampling, *, is_decoder: bool) -> Sampled:
    sampler = TokenSampler(sampling, taps.mask, taps.seeds, is_decoder=is_decoder)
    for tap in taps.activations:
        sampler.take(tap)
    return sampler.sampled()


def drawn(samples: int, tokens: int) -> Floats:
    shape = (BLOCKS, samples, tokens, WIDTH)
    return np.random.default_rng(samples * tokens).normal(size=shape).astype(np.float32)


def taps_of(lengths: list[int]) -> Taps:
    """Random activations; what stands under the mask is NaN, so that it is noticed where it is used."""
    longest = max(lengths)
    mask = np.arange(longest) < np.array(lengths)[:, None]
    values = drawn(len(lengths), longest)
    values[:, ~mask] = float("nan")
    seeds = seeds_of([f"text {row} of {length}" for row, length in enumerate(lengths)])
    return Taps(activations=values, mask=mask, seeds=seeds)


def by_hand(tokens: np.ndarray, sampling: Sampling, *, is_decoder: bool) -> np.ndarray:
    """[T, d] of one row and tap -> [n, d], as the contract's words say it."""
    if sampling.kind == "all":
        return tokens
    if sampling.kind == "pivot":
        return tokens[-1:] if is_decoder else tokens[:1]
    parts = min(sampling.count if sampling.kind == "segments" else 1, len(tokens))
    of_part = [[t for t in range(len(tokens)) if t * parts // len(tokens) == part] for part in range(parts)]
    return np.stack([tokens[members].mean(axis=0) for members in of_part])


@pytest.mark.slow
@given(lengths=LENGTHS, policy=POLICIES, is_decoder=st.booleans())
def test_policies_do_what_their_words_say(lengths: list[int], policy: str, is_decoder: bool) -> None:
    taps, sampling = taps_of(lengths), parse_sampling(policy)
    sampled = sample_tokens(taps, sampling, is_decoder=is_decoder)
    assert np.isfinite(sampled.vectors).all()
    wanted = [
        [
            by_hand(taps.activations[tap, row, :length], sampling, is_decoder=is_decoder)
            for row, length in enumerate(lengths)
        ]
        for tap in range(BLOCKS)
    ]
    assert sampled.lengths.tolist() == [len(row) for row in wanted[0]]
    np.testing.assert_allclose(
        sampled.vectors, np.stack([np.concatenate(rows) for rows in wanted]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
@given(lengths=LENGTHS, policy=POLICIES | PICKS, data=st.data())
def test_any_rows_are_chosen_with_all_that_is_theirs(
    lengths: list[int], policy: str, data: st.DataObject
) -> None:
    sampled = sample_tokens(taps_of(lengths), parse_sampling(policy), is_decoder=False)
    numbered = replace(sampled, targets=np.arange(sampled.vectors.shape[1]))
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True))
    chosen = numbered.select(rows)
    parts = np.split(np.arange(sampled.vectors.shape[1]), np.cumsum(sampled.lengths)[:-1])
    wanted = np.concatenate([parts[row] for row in rows])
    assert chosen.targets is not None and chosen.targets.tolist() == wanted.tolist()
    assert np.array_equal(chosen.vectors, sampled.vectors[:, wanted])
    assert chosen.lengths.tolist() == [len(parts[row]) for row in rows]
    every = numbered.select(np.isin(np.arange(len(lengths)), rows))
    assert every.lengths.tolist() == [len(parts[row]) for row in sorted(rows)]


@given(length=st.integers(1, 100), parts=st.integers(1, 64))
def test_segments_differ_by_one_token_at_most(length: int, parts: int) -> None:
    parts = min(parts, length)
    sizes = [sum(t * parts // length == part for t in range(length)) for part in range(parts)]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == length


@pytest.mark.parametrize("policy", ["pivot", "mean", "segments:2", "random:2", "important:2", "all"])
def test_a_row_gone_wrong_is_found_and_spoils_no_other(policy: str) -> None:
    taps = taps_of([3, 3, 2])
    taps.activations[1, 1, :] = float("inf")
    sampled = sample_tokens(taps, parse_sampling(policy), is_decoder=False)
    assert sampled.usable_rows().tolist() == [True, False, True]


@pytest.mark.parametrize("policy", ["pivot", "mean", "segments:2", "random:2"])
def test_no_tap_is_kept_once_it_has_been_sampled(policy: str) -> None:
    taps = taps_of([3, 5])
    sampler = TokenSampler(parse_sampling(policy), taps.mask, taps.seeds)
    tap = taps.activations[0].copy()
    kept = weakref.ref(tap)
    sampler.take(tap)
    del tap
    assert kept() is None
    sampler.take(taps.activations[1])
    assert len(sampler.sampled().vectors) == 2


def picked(taps: Taps, policy: str) -> list[list[int]]:
    """Which positions of each row travel, found by their vectors, which all differ."""
    sampled = sample_tokens(taps, parse_sampling(policy), is_decoder=False)
    places: list[list[int]] = []
    rows = np.split(sampled.vectors, np.cumsum(sampled.lengths)[:-1], axis=1)
    for row, vectors in enumerate(rows):
        tokens = taps.activations[:, row]  # [B, T, d]
        found = [
            np.flatnonzero((tokens == vector[:, None]).all(axis=(0, 2))).tolist()
            for vector in vectors.swapaxes(0, 1)
        ]
        assert all(len(one) == 1 for one in found), "every vector is one token's, the same at all taps"
        places.append([one[0] for one in found])
    return places


@pytest.mark.slow
@given(lengths=LENGTHS, policy=PICKS)
def test_picked_tokens_are_real_distinct_and_in_the_order_of_the_text(
    lengths: list[int], policy: str
) -> None:
    count = parse_sampling(policy).count
    for places, length in zip(picked(taps_of(lengths), policy), lengths, strict=True):
        assert len(places) == min(count, length)
        assert places == sorted(set(places)) and places[-1] < length


def test_a_sample_computed_again_in_other_company_gives_the_same_random_tokens() -> None:
    texts = [f"sentence number {number}" for number in range(40)]

    def taps(chosen: list[str], longest: int) -> Taps:
        mask = np.tile(np.arange(longest) < 9, (len(chosen), 1))
        return Taps(activations=drawn(len(chosen), longest), mask=mask, seeds=seeds_of(chosen))

    together = picked(taps(texts, 12), "random:3")
    assert [picked(taps([text], 9), "random:3")[0] for text in texts] == together
    assert len({tuple(places) for places in together}) > 20, "texts differ in what is drawn"
    often = np.bincount(np.ravel(together), minlength=9)
    assert often.min() >= 4, "every position is drawn now and then"


def test_random_tokens_are_these_on_every_machine() -> None:
    mask = np.ones((2, 10), bool)
    taps = Taps(activations=drawn(2, 10), mask=mask, seeds=seeds_of(["turn the lights on", ""]))
    assert picked(taps, "random:4") == [[2, 7, 8, 9], [1, 2, 3, 5]]


@pytest.mark.slow
@given(lengths=LENGTHS, count=st.integers(1, 5))
def test_important_tokens_lie_furthest_from_their_samples_mean(lengths: list[int], count: int) -> None:
    taps = taps_of(lengths)
    for row, (places, length) in enumerate(zip(picked(taps, f"important:{count}"), lengths, strict=True)):
        tokens = taps.activations[-1, row, :length].astype(np.float64)
        distances = np.linalg.norm(tokens - tokens.mean(axis=0), axis=1)
        rest = np.delete(distances, places)
        assert rest.size == 0 or distances[places].min() >= rest.max() - 1e-4
