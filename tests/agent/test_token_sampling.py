from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.sampling import Sampling, parse_sampling
from edge_agent.taps import Taps, pad, sample_tokens

BLOCKS, WIDTH = 2, 5
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)
POLICIES = st.sampled_from(["pivot", "mean", "segments:1", "segments:3", "segments:64", "all"])


def taps_of(lengths: list[int]) -> Taps:
    """Random activations; what stands under the mask is NaN, so that it is noticed where it is used."""
    longest = max(lengths)
    mask = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    values = torch.randn(BLOCKS, len(lengths), longest, WIDTH)
    values[:, ~mask] = float("nan")
    return Taps(activations=values, mask=mask, seconds=0.0)


def by_hand(tokens: np.ndarray, sampling: Sampling, *, is_decoder: bool) -> np.ndarray:
    """[T, d] of one row and tap -> [n, d], as the contract's words say it."""
    if sampling.kind == "all":
        return tokens
    if sampling.kind == "pivot":
        return tokens[-1:] if is_decoder else tokens[:1]
    parts = min(sampling.count if sampling.kind == "segments" else 1, len(tokens))
    of_part = [[t for t in range(len(tokens)) if t * parts // len(tokens) == part] for part in range(parts)]
    return np.stack([tokens[members].mean(axis=0) for members in of_part])


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


@given(lengths=LENGTHS, policy=POLICIES)
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


@pytest.mark.parametrize("policy", ["pivot", "mean", "segments:2", "all"])
def test_a_row_gone_wrong_is_found_and_spoils_no_other(policy: str) -> None:
    taps = taps_of([3, 3, 2])
    taps.activations[1, 1, :] = float("inf")
    sampled = sample_tokens(taps, parse_sampling(policy), is_decoder=False)
    assert sampled.finite_rows().tolist() == [True, False, True]
