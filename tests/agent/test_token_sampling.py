from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestream.backbone.taps import Sampled, TokenSampler, pad, seeds_of
from sidestream.contract.sampling import Sampling, parse_sampling

BLOCKS, WIDTH = 2, 5
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)
POLICIES = st.sampled_from(["pivot", "mean", "segments:1", "segments:3", "segments:64", "all"])
PICKS = st.sampled_from(["random:1", "random:3", "random:64", "important:1", "important:4"])


@dataclass(kw_only=True)
class Taps:
    """What a forward pass of some texts gives, tap by tap."""

    activations: torch.Tensor
    """[B, K, T, d]."""
    mask: torch.Tensor
    """[K, T]."""
    seeds: torch.Tensor
    """[K]."""


def sample_tokens(taps: Taps, sampling: Sampling, *, is_decoder: bool) -> Sampled:
    sampler = TokenSampler(sampling, taps.mask, taps.seeds, is_decoder=is_decoder)
    for tap in taps.activations:
        sampler.take(tap)
    return sampler.sampled()


def taps_of(lengths: list[int]) -> Taps:
    """Random activations; what stands under the mask is NaN, so that it is noticed where it is used."""
    longest = max(lengths)
    mask = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    values = torch.randn(BLOCKS, len(lengths), longest, WIDTH)
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
@settings(deadline=None)
def test_policies_do_what_their_words_say(lengths: list[int], policy: str, is_decoder: bool) -> None:
    taps, sampling = taps_of(lengths), parse_sampling(policy)
    sampled = sample_tokens(taps, sampling, is_decoder=is_decoder)
    assert torch.isfinite(sampled.values).all()
    vectors, counts = sampled.ragged()
    wanted = [
        [
            by_hand(taps.activations[tap, row, :length].numpy(), sampling, is_decoder=is_decoder)
            for row, length in enumerate(lengths)
        ]
        for tap in range(BLOCKS)
    ]
    assert counts.tolist() == [len(row) for row in wanted[0]]
    np.testing.assert_allclose(
        vectors, np.stack([np.concatenate(rows) for rows in wanted]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
@given(lengths=LENGTHS, policy=POLICIES | PICKS)
@settings(deadline=None)
def test_what_travels_comes_back_padded_as_it_was(lengths: list[int], policy: str) -> None:
    sampled = sample_tokens(taps_of(lengths), parse_sampling(policy), is_decoder=False)
    back = pad(*sampled.ragged())
    assert torch.equal(back.mask, sampled.mask) and torch.equal(back.values, sampled.values)


@given(length=st.integers(1, 100), parts=st.integers(1, 64))
@settings(deadline=None)
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
    sampler = TokenSampler(parse_sampling(policy), taps.mask, taps.seeds, is_decoder=False)
    tap = taps.activations[0].clone()
    kept = weakref.ref(tap)
    sampler.take(tap)
    del tap
    assert kept() is None
    sampler.take(taps.activations[1])
    assert sampler.sampled().values.shape[:2] == (2, 2)


def picked(taps: Taps, policy: str) -> list[list[int]]:
    """Which positions of each row travel, found by their vectors, which all differ."""
    sampled = sample_tokens(taps, parse_sampling(policy), is_decoder=False)
    places: list[list[int]] = []
    for row, mask in enumerate(sampled.mask):
        tokens = taps.activations[:, row]  # [B, T, d]
        found = [
            (tokens == vector[:, None]).all(dim=2).all(dim=0).nonzero().flatten().tolist()
            for vector in sampled.values[:, row, mask].unbind(dim=1)
        ]
        assert all(len(one) == 1 for one in found), "every vector is one token's, the same at all taps"
        places.append([one[0] for one in found])
    return places


@pytest.mark.slow
@given(lengths=LENGTHS, policy=PICKS)
@settings(deadline=None)
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
        mask = (torch.arange(longest) < 9).expand(len(chosen), longest)
        values = torch.randn(BLOCKS, len(chosen), longest, WIDTH)
        return Taps(activations=values, mask=mask, seeds=seeds_of(chosen))

    together = picked(taps(texts, 12), "random:3")
    assert [picked(taps([text], 9), "random:3")[0] for text in texts] == together
    assert len({tuple(places) for places in together}) > 20, "texts differ in what is drawn"
    often = torch.bincount(torch.tensor(together).flatten(), minlength=9)
    assert often.min() >= 4, "every position is drawn now and then"


def test_random_tokens_are_these_on_every_machine() -> None:
    mask = torch.ones(2, 10, dtype=torch.bool)
    values = torch.randn(BLOCKS, 2, 10, WIDTH)
    taps = Taps(activations=values, mask=mask, seeds=seeds_of(["turn the lights on", ""]))
    assert picked(taps, "random:4") == [[2, 7, 8, 9], [1, 2, 3, 5]]


@pytest.mark.slow
@given(lengths=LENGTHS, count=st.integers(1, 5))
@settings(deadline=None)
def test_important_tokens_lie_furthest_from_their_samples_mean(lengths: list[int], count: int) -> None:
    taps = taps_of(lengths)
    for row, (places, length) in enumerate(zip(picked(taps, f"important:{count}"), lengths, strict=True)):
        tokens = taps.activations[-1, row, :length].double().numpy()
        distances = np.linalg.norm(tokens - tokens.mean(axis=0), axis=1)
        rest = np.delete(distances, places)
        assert rest.size == 0 or distances[places].min() >= rest.max() - 1e-4
