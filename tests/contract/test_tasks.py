"""Targets travel in the form that their task has, and nothing else passes for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.contract.errors import DecodeError
from sidestream.contract.tasks import PER_VECTOR, TASKS, TargetForm, Task, check_targets, read_targets


@given(data=st.binary(max_size=64), rows=st.integers(1, 8), extra=st.integers(0, 8))
@pytest.mark.parametrize("form", list(TargetForm))
def test_any_bytes_are_targets_of_the_right_number_or_refused(
    form: TargetForm, data: bytes, rows: int, extra: int
) -> None:
    vectors = rows + extra
    try:
        targets = read_targets(form, data, rows=rows, vectors=vectors)
    except DecodeError:
        return
    assert len(targets) == (vectors if form in PER_VECTOR else rows)
    assert np.isfinite(targets).all()


@given(labels=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_label_sets_come_back_and_bits_beyond_the_labels_are_refused(labels: int, seed: int) -> None:
    sets = np.random.default_rng(seed).random((3, labels)) < 0.4
    packed = np.packbits(sets, axis=1, bitorder="little").tobytes()
    read = read_targets(TargetForm.LABEL_SETS, packed, rows=3, vectors=9)
    check_targets(TargetForm.LABEL_SETS, read, labels)
    assert (read[:, :labels] == sets).all()
    if labels % 8:
        beyond = bytearray(packed)
        beyond[-1] |= 1 << (labels % 8)
        with pytest.raises(DecodeError, match="no set"):
            check_targets(
                TargetForm.LABEL_SETS,
                read_targets(TargetForm.LABEL_SETS, bytes(beyond), rows=3, vectors=9),
                labels,
            )


@pytest.mark.parametrize("form", [TargetForm.LABELS, TargetForm.TOKEN_LABELS])
def test_a_label_that_the_job_does_not_have_is_refused(form: TargetForm) -> None:
    targets = read_targets(form, np.array([0, 3], "<u2").tobytes(), rows=2, vectors=2)
    check_targets(form, targets, 4)
    with pytest.raises(DecodeError, match="outside the 3 labels"):
        check_targets(form, targets, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(DecodeError, match="not finite"):
        read_targets(TargetForm.VALUES, np.array([value], "<f4").tobytes(), rows=1, vectors=1)


def test_every_task_says_what_it_takes() -> None:
    assert {task for task in Task if TASKS[task].per_vector} == {Task.TOKEN_CLASSIFICATION, Task.CAUSAL_LM}
    assert TASKS[Task.REGRESSION].outputs(0) == 1 and TASKS[Task.MULTI_LABEL].outputs(5) == 5
