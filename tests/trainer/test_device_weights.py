"""Devices count in learning as far as their labels suit their samples, and none for too much."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from side_trainer.side_tuning.device_weights import DeviceWeights, medians_of_others, shares_of, trusts_of
from tests.work import work

FEATURES = 20
Ints = npt.NDArray[np.int64]


def fleet(
    sizes: list[int], labels: int, seed: int = 0, skew: float = 1.0
) -> tuple[npt.NDArray[np.float32], Ints, Ints]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(labels, FEATURES))
    owners = np.repeat(np.arange(len(sizes)), sizes)
    shares = rng.dirichlet(np.full(labels, skew), size=len(sizes))
    targets = np.array([rng.choice(labels, p=shares[owner]) for owner in owners])
    features = centres[targets] + rng.normal(size=(len(owners), FEATURES))
    return features.astype(np.float32), targets, owners


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("skew", [0.1, 1.0])
def test_honest_devices_all_count_however_skewed_their_labels(seed: int, skew: float) -> None:
    assert (trusts_of(*fleet([80] * 8, 6, seed, skew), 8) == 1).all()


def test_labels_moved_on_to_the_next_one_count_for_nothing() -> None:
    features, targets, owners = fleet([60] * 8, 6)
    targets[owners < 2] = (targets[owners < 2] + 1) % 6
    assert trusts_of(features, targets, owners, 8).tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


def test_many_rows_give_no_more_say() -> None:
    features, targets, owners = fleet([240, 240, *[60] * 6], 6)
    targets[owners < 2] = (targets[owners < 2] + 1) % 6
    assert trusts_of(features, targets, owners, 8).tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("wrong", [4, 5])
def test_where_half_say_otherwise_nobody_is_doubted(wrong: int) -> None:
    features, targets, owners = fleet([60] * 8, 6)
    targets[owners < wrong] = (targets[owners < wrong] + 1) % 6
    assert trusts_of(features, targets, owners, 8).tolist() == [1] * 8


def test_a_device_that_calls_everything_the_same_counts_for_nothing() -> None:
    features, targets, owners = fleet([60] * 8, 6)
    targets[owners == 3] = 0
    assert trusts_of(features, targets, owners, 8).tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


def test_half_of_the_labels_drawn_at_random_count_for_less() -> None:
    features, targets, owners = fleet([200] * 8, 6)
    drawn = np.flatnonzero(owners == 0)[::2]
    targets[drawn] = np.random.default_rng(1).integers(6, size=len(drawn))
    first, *others = trusts_of(features, targets, owners, 8).tolist()
    assert 0 < first < 1 and others == [1] * 7


def test_with_a_handful_of_rows_nothing_is_clear() -> None:
    features, targets, owners = fleet([3, *[60] * 7], 6)
    targets[owners == 0] = (targets[owners == 0] + 1) % 6
    assert trusts_of(features, targets, owners, 8)[0] > 0


def test_three_devices_judge_nobody() -> None:
    features, targets, owners = fleet([60] * 3, 6)
    targets[owners == 0] = (targets[owners == 0] + 1) % 6
    assert trusts_of(features, targets, owners, 3).tolist() == [1, 1, 1]


def test_where_labels_have_nothing_to_do_with_samples_nobody_is_judged() -> None:
    features, _, owners = fleet([60] * 8, 6)
    targets = np.random.default_rng(0).integers(6, size=len(owners))
    assert (trusts_of(features, targets, owners, 8) == 1).all()


@pytest.mark.parametrize(
    "counts", [[400, 10, 10, 10, 10, 10, 10, 10, 10, 10], [900, 800, 10, 10, 10, 10, 10, 10]]
)
def test_no_device_counts_for_more_than_its_share_of_all(counts: list[int]) -> None:
    rows = np.array(counts, np.float64)
    kept = rows * shares_of(rows, 0.3)
    assert kept.max() / kept.sum() <= 0.3 + 1e-6
    assert (kept[rows == 10] == 10).all()


def test_a_bound_that_none_exceeds_changes_nothing_nor_does_one_below_two_fair_shares() -> None:
    assert shares_of(np.full(8, 50.0), 0.25).tolist() == [1.0] * 8
    assert shares_of(np.array([50.0, 60.0]), 0.1).tolist() == [1.0, 1.0]
    assert shares_of(np.array([9.0, 1.0, 1.0, 1.0]), 1.0).tolist() == [1.0] * 4
    assert shares_of(np.array([6.0, 2.0, 2.0, 2.0]), 0.0).tolist() == [1.0] * 4


def test_streams_of_one_device_count_as_one() -> None:
    weights = DeviceWeights({"s1": "a", "s2": "a", "s3": "b", "s4": "c", "s5": "d", "s6": "e"}.__getitem__)
    for stream, rows in (("s1", 50), ("s2", 50), ("s3", 10), ("s4", 10), ("s5", 10), ("s6", 10)):
        weights.add(stream, rows)
    weights.weigh([], 0.4)
    assert weights.of("s1") == weights.of("s2") < 0.3 and weights.of("s3") == 1


def test_a_device_is_held_against_the_others_however_many_there_are_at_the_same_cost() -> None:
    def judged(devices: int) -> int:
        rows = fleet([2] * devices, 3)
        return work(lambda: trusts_of(*rows, devices))

    assert judged(400) < 2.5 * judged(200)


@pytest.mark.parametrize("devices", [4, 5, 8, 9])
def test_each_is_held_against_the_median_of_all_others(devices: int) -> None:
    values = np.random.default_rng(devices).integers(0, 4, devices) / 4  # some are equal
    wanted = [float(np.median(np.delete(values, at))) for at in range(devices)]
    assert medians_of_others(values.tolist()) == wanted
