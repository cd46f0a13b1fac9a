"""Waits between attempts are full-jitter, bounded and start small."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.connection.backoff import Backoff


class Loudest(random.Random):
    """Always draws the upper end."""

    def uniform(self, a: float, b: float) -> float:
        return b


@given(st.floats(0.001, 10), st.floats(1, 100), st.integers(0, 2**32), st.integers(min_value=1, max_value=40))
def test_every_wait_is_between_zero_and_its_doubling_ceiling(
    first_s: float, factor: float, seed: int, attempts: int
) -> None:
    cap_s = first_s * factor
    backoff = Backoff(first_s, cap_s, random.Random(seed))
    for attempt in range(attempts):
        assert 0 <= backoff.next_s() <= min(first_s * 2**attempt, cap_s) * (1 + 1e-9)


def test_ceilings_double_from_one_second_to_sixty_and_stay() -> None:
    backoff = Backoff(rng=Loudest())
    assert [backoff.next_s() for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_waits_spread_over_the_whole_range() -> None:
    waits = [Backoff(1.0, 60.0, random.Random(seed)).next_s() for seed in range(1000)]
    tenths = {int(wait * 10) for wait in waits}
    assert tenths == set(range(10))


def test_reset_makes_the_next_retry_quick_again() -> None:
    backoff = Backoff(rng=Loudest())
    for _ in range(5):
        backoff.next_s()
    backoff.reset()
    assert backoff.next_s() == 1.0


@pytest.mark.parametrize(("first_s", "cap_s"), [(0, 1), (-1, 1), (2, 1)])
def test_senseless_bounds_are_refused(first_s: float, cap_s: float) -> None:
    with pytest.raises(ValueError):
        Backoff(first_s, cap_s)
