"""Matrices as what has changed since they were initial: what comes back, and what is refused."""

from __future__ import annotations

import hashlib
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestream.contract.errors import DecodeError
from sidestream.contract.plan import SideNetworkSpec
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats
from sidestream.side_network.bundle import About, decode_bundle, encode_bundle
from sidestream.side_network.change import directions_of, narrowed, restored
from sidestream.side_network.form import align_key
from sidestream.side_network.initial import initial
from sidestream.side_network.network import SideNetwork

SEED = 7
AT_FIRST = partial(initial, SEED)
ALIGN = f"aligns.{align_key('minilm')}.weight"
DOWN = "adapters.1.down.weight"


def narrow(name: str, array: Floats, kept: float = 0.9) -> dict[str, Floats]:
    return narrowed({name: array}, directions_of({name: array}, AT_FIRST), kept)


def low_rank(shape: tuple[int, ...], rank: int, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    left, right = (
        rng.standard_normal((*shape[:-1], rank)),
        rng.standard_normal((*shape[:-2], rank, shape[-1])),
    )
    return np.asarray(left @ right, np.float32)


@pytest.mark.parametrize(
    ("name", "shape", "rank"),
    [
        (DOWN, (96, 80), 5),
        (ALIGN, (3, 96, 64), 4),
        ("adapters.0.up.weight", (64, 96), 1),
        (DOWN, (70, 70), 20),
    ],
)
def test_a_change_of_few_directions_comes_back(name: str, shape: tuple[int, ...], rank: int) -> None:
    change, before = low_rank(shape, rank), None
    for kept in (0.5, 0.9, 0.999):
        found = narrow(name, AT_FIRST(name, shape) + change, kept)
        assert all(len(one) <= rank for one in found.values())
        assert sum(one.size for one in found.values()) < change.size
        back = restored(found, AT_FIRST)
        assert back.keys() == {name} and back[name].shape == shape
        left_over = np.square(back[name] - AT_FIRST(name, shape) - change).sum() / np.square(change).sum()
        assert left_over <= 1.001 - kept
        assert before is None or sum(map(len, found.values())) >= before, "more is kept by more"
        before = sum(map(len, found.values()))


def test_a_stack_of_fewer_blocks_is_written_by_the_directions_of_the_whole() -> None:
    array = AT_FIRST(ALIGN, (3, 96, 64)) + low_rank((3, 96, 64), 4)
    found = narrowed({ALIGN: array[:2]}, directions_of({ALIGN: array}, AT_FIRST), 0.9)
    assert sorted(found) == [f"{ALIGN}:{block}:{side}" for block in (0, 1) for side in ("left", "right")]
    assert restored(found, AT_FIRST)[ALIGN].shape == (2, 96, 64)


def test_what_takes_more_as_a_change_stays_as_it_is() -> None:
    noise = np.random.default_rng(0).standard_normal((96, 96)).astype(np.float32)
    square = np.random.default_rng(0).standard_normal((3, 70, 70)).astype(np.float32)
    for name, array in (
        (DOWN, noise),
        (DOWN, low_rank((8, 8), 1)),
        ("gates", np.zeros(9000, np.float32)),
        (DOWN, np.full((96, 96), np.nan, np.float32)),
        (f"starts.{ALIGN}", square[:, :, :3].repeat(20, axis=0)),
    ):
        assert narrow(name, array).keys() == {name}


def test_what_has_not_changed_takes_next_to_nothing() -> None:
    found = narrow(DOWN, AT_FIRST(DOWN, (96, 96)))
    assert all(len(one) == 1 for one in found.values()) and len(found) == 2
    assert np.array_equal(restored(found, AT_FIRST)[DOWN], AT_FIRST(DOWN, (96, 96)))


def pair(left: tuple[int, ...], right: tuple[int, ...], place: str = "") -> dict[str, Floats]:
    return {
        f"{DOWN}{place}:left": np.ones(left, np.float32),
        f"{DOWN}{place}:right": np.ones(right, np.float32),
    }


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{DOWN}:left": np.ones((2, 3), np.float32)},
        {f"{DOWN}:right": np.ones((2, 3), np.float32)},
        pair((2, 3), (3, 3)),
        pair((2, 3, 1), (2, 3)),
        pair((1, 2**14), (1, 2**14)),
        {
            **pair((1, 2**13), (1, 2**12), ":0"),
            **pair((1, 2**13), (1, 2**12), ":1"),
            **pair((1, 2), (1, 1), ":2"),
        },
        {**pair((2, 3), (2, 3)), DOWN: np.ones((3, 3), np.float32)},
        pair((2, 3), (2, 3), ":1"),
        pair((2, 0), (2, 3)),
        {name: 1e30 * one for name, one in pair((2, 3), (2, 3)).items()},
        pair((0, 3), (0, 3)),
        {**pair((2, 3), (2, 3), ":0"), **pair((2, 3), (2, 4), ":1")},
        {**pair((2, 3), (2, 3), ":0"), **pair((2, 3), (2, 3))},
    ],
)
def test_narrow_matrices_that_do_not_go_together_are_refused(tensors: dict[str, Floats]) -> None:
    with pytest.raises(DecodeError):
        restored(tensors, AT_FIRST)


NAMES = st.sampled_from([DOWN, ALIGN, f"{ALIGN}:0", f"{ALIGN}:1", "gates", "steps.0.head.weight", ""])


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.builds(str.__add__, NAMES, st.sampled_from(["", ":left", ":right", ":left:left"])),
        st.lists(st.integers(0, 5), max_size=4).map(lambda shape: np.ones(shape, np.float32)),
        max_size=6,
    )
)
def test_whatever_a_file_holds_is_restored_or_refused(tensors: dict[str, Floats]) -> None:
    try:
        back = restored(tensors, AT_FIRST)
    except DecodeError:
        return
    assert not any(":left" in name and name.endswith(":left") for name in back)


def test_initial_values_are_the_same_everywhere_and_for_ever() -> None:
    values = np.concatenate([initial(3, DOWN, (5, 7)).ravel(), initial(3, ALIGN, (2, 5, 3)).ravel()])
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()[:16] == "039036d6317d8f7d"
    assert np.array_equal(initial(3, ALIGN, (2, 5, 3)), initial(3, ALIGN, (3, 5, 3))[:2]), "the first blocks"
    assert not np.array_equal(initial(3, DOWN, (5, 7)), initial(4, DOWN, (5, 7)))
    assert not np.array_equal(initial(3, DOWN, (5, 7)), initial(3, "adapters.0.down.weight", (5, 7)))
    wide = initial(3, DOWN, (300, 400))
    assert abs(wide.mean()) < 1e-3 and np.abs(wide).max() <= 400**-0.5
    assert np.isclose(wide.std(), (3 * 400) ** -0.5, rtol=0.01)
    assert np.isclose(initial(3, ALIGN, (1, 400, 300)).std(), 400**-0.5, rtol=0.01)
    assert not initial(3, "adapters.0.up.weight", (5, 7)).any()


@pytest.mark.parametrize("task", [Task.TEXT_CLASSIFICATION, Task.CAUSAL_LM])
def test_a_network_begins_with_its_initial_values_and_travels_as_what_has_changed(task: Task) -> None:
    spec, labels = SideNetworkSpec(blocks=2, width=64, inner=64), ("a", "b") if task.value[0] == "t" else ()
    network = SideNetwork(spec, labels=len(labels), seed=SEED, task=task)
    network.add_align("minilm", 96)
    arrays = network.arrays()
    for name, array in arrays.items():
        if array.ndim > 1:
            assert np.array_equal(array, AT_FIRST(name, array.shape)), name
    arrays[ALIGN] = arrays[ALIGN] + low_rank(arrays[ALIGN].shape, 3)
    about = About(
        job="j",
        run="0" * 32,
        version=1,
        labels=labels,
        seed=SEED,
        side_network=spec,
        aligns={"minilm": 96},
        tiers={"t": "minilm"},
        task=task,
    )
    directions = directions_of(arrays, AT_FIRST)
    packed = encode_bundle(about, narrowed(arrays, directions, 0.9), codec="packed")
    assert len(packed) < len(encode_bundle(about, arrays, codec="int8")) / 2
    back = decode_bundle(packed).tensors
    assert {name: one.shape for name, one in back.items()} == {
        name: one.shape for name, one in arrays.items()
    }
    change, kept = (one[ALIGN] - AT_FIRST(ALIGN, arrays[ALIGN].shape) for one in (arrays, back))
    assert np.square(change - kept).sum() < 0.2 * np.square(change).sum()
