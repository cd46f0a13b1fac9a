"""What a device does to vectors before they leave it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.contract.errors import ConfigError, DecodeError
from sidestream.contract.plan import TierPlan
from sidestream.contract.privacy import NO_PRIVACY, Privacy, gaussian, parse_privacy
from sidestream.contract.tensors import Floats

VECTORS = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)


def lengths(vectors: Floats) -> Floats:
    """[B, V] of vectors."""
    return np.asarray(np.linalg.norm(vectors, axis=-1), np.float32)


@given(st.text(max_size=30))
def test_a_setting_is_read_or_refused_by_name(text: str) -> None:
    try:
        parse_privacy(text, "privacy")
    except ConfigError as exc:
        assert str(exc).startswith("privacy: ")


@given(st.integers(1, 9999), st.integers(1, 10_000))
def test_what_a_plan_says_is_read_back(directions: int, hundredths: int) -> None:
    privacy = Privacy(directions=directions, noise=hundredths / 100)
    assert parse_privacy(str(privacy)) == privacy


def test_a_whole_setting() -> None:
    found = parse_privacy("deep:2, mean, sketch:32, noise:1.5")
    assert found == Privacy(taps=2, sampling="mean", directions=32, noise=1.5)
    assert found.kept((1, 3, 6)) == (3, 6)
    assert str(found) == "sketch:32, noise:1.5"


@pytest.mark.parametrize(
    "text",
    ["noise", "noise:0", "noise:101", "noise:nan", "deep:0", "sketch:", "mean, pivot", "hidden", "mean:3"],
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="privacy"):
        parse_privacy(text)


def test_a_plan_with_a_setting_that_is_none_is_refused() -> None:
    with pytest.raises(DecodeError, match="privacy"):
        TierPlan(backbone="m", privacy="loud:3")


def test_without_a_setting_vectors_stay_as_they_are() -> None:
    assert NO_PRIVACY.project(VECTORS) is VECTORS
    assert NO_PRIVACY.noisy(VECTORS) is VECTORS


def test_vectors_get_one_length_and_a_sketch_keeps_so_many_directions() -> None:
    projected = Privacy(directions=3).project(VECTORS * 7)
    assert lengths(projected) == pytest.approx(8)
    assert np.linalg.matrix_rank(projected.reshape(-1, 64), tol=1e-2) == 3
    assert np.allclose(Privacy(directions=3).project(projected), projected, atol=1e-4)


@pytest.mark.parametrize("directions", [0, 8])
def test_noise_has_the_length_it_says_and_stays_within_the_sketch(directions: int) -> None:
    privacy = Privacy(directions=directions, noise=2.0)
    many = np.repeat(privacy.project(VECTORS[:, :1]), 400, axis=1)
    noise = privacy.noisy(many) - many
    assert np.square(noise).sum(axis=-1).mean() == pytest.approx(4 * 64, rel=0.1)
    assert np.linalg.matrix_rank(noise.reshape(-1, 64), tol=1e-2) == (directions or 64)


def test_noise_is_never_the_same_twice() -> None:
    assert not np.array_equal(gaussian((4, 4)), gaussian((4, 4)))


def test_what_is_not_finite_stays_so_and_is_found() -> None:
    broken = VECTORS.copy()
    broken[0, 1, 2] = np.nan
    found = parse_privacy("sketch:4, noise:1").project(broken)
    assert np.isfinite(found).all(axis=-1).tolist() == [[True, False, True, True, True], [True] * 5]


def test_epsilon_is_that_of_the_analytic_gaussian_mechanism() -> None:
    # One standard deviation apart: Balle and Wang's mechanism has δ = 1e-5 at ε = 4.3770.
    assert Privacy(noise=8.0).epsilon(64, 1.0) == pytest.approx(4.377, abs=0.001)
    assert Privacy(noise=8.0, directions=16).epsilon(64, 2.0) == pytest.approx(4.377, abs=0.001)
    far, near = Privacy(noise=0.01).epsilon(384, 6.0), Privacy(noise=100).epsilon(384, 0.01)
    assert far is not None and near is not None
    assert far > 1e6
    assert near < 0.1
    assert NO_PRIVACY.epsilon(64, 1.0) is None
