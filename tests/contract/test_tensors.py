"""Codecs: a round trip stays within its stated error, a header is checked before it is believed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.contract.errors import DecodeError
from sidestream.contract.tensors import (
    MAX_VALUES,
    Codec,
    Floats,
    Tensor,
    decode,
    encode,
    encoded_sizes,
    error_bound,
    join,
    joinable,
)
from tests.contract.examples import SCALAR

CODECS = st.sampled_from(SCALAR)
MAGNITUDES = (0.0, 1e-45, 1e-40, 1e-38, 1e-20, 1e-3, 1.0, 448.0, 65504.0, 1e20, 3e38, 3.4028234e38)
SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple) | st.sampled_from(
    [(63,), (64,), (65,), (1, 127), (3, 129), (2, 2, 64)]
)


@st.composite
def _arrays(draw: st.DrawFn, largest: float = math.inf) -> Floats:
    shape: tuple[int, ...] = draw(SHAPES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scales = [m for m in MAGNITUDES if m <= largest]
    scale = draw(st.lists(st.sampled_from(scales), min_size=1, max_size=4))
    values = rng.uniform(-1, 1, math.prod(shape)) * rng.choice(scale, math.prod(shape))
    values[rng.random(values.size) < 0.1] = draw(st.sampled_from(scale))
    array: Floats = np.clip(values, -3.4028234e38, 3.4028234e38).astype(np.float32).reshape(shape)
    return array


@given(_arrays(), st.sampled_from([c for c in SCALAR if c is not Codec.F16]))
def test_a_round_trip_stays_within_its_bound(array: Floats, codec: Codec) -> None:
    _check(array, codec)


@given(_arrays(largest=65504.0))
def test_half_precision_stays_within_its_bound(array: Floats) -> None:
    _check(array, Codec.F16)


def _check(array: Floats, codec: Codec) -> None:
    tensor = encode(array, codec)
    assert (len(tensor.data), len(tensor.scales)) == encoded_sizes(codec, array.shape)
    back = decode(tensor)
    assert back.shape == array.shape and back.dtype == np.float32 and back.flags.writeable
    error = np.abs(back.astype(np.float64) - array)
    assert (error <= error_bound(array, codec)).all(), float((error - error_bound(array, codec)).max())


@given(_arrays(), CODECS)
def test_what_was_decoded_encodes_to_the_same_values_again(array: Floats, codec: Codec) -> None:
    if codec is Codec.INT2:
        return  # two bits have no zero: a second trip is a second rounding
    once = decode(encode(array, codec))
    twice = decode(encode(once, codec))
    assert (np.abs(twice.astype(np.float64) - once) <= error_bound(once, codec)).all()


@pytest.mark.parametrize("codec", [codec for codec in SCALAR if codec is not Codec.INT2])
def test_zeros_come_back_as_zeros(codec: Codec) -> None:
    array = np.zeros((3, 50), np.float32)
    array[2] = 1.0
    assert (decode(encode(array, codec))[:1] == 0).all()


@pytest.mark.parametrize("codec", SCALAR)
def test_a_block_of_zeros_is_exactly_zero_beside_a_huge_one(codec: Codec) -> None:
    array = np.zeros((2, 64), np.float32)
    array[1] = 6e4
    assert (decode(encode(array, codec))[0] == 0).all()


@pytest.mark.parametrize("codec", SCALAR)
def test_non_contiguous_and_double_precision_arrays_encode_alike(codec: Codec) -> None:
    array = np.arange(48, dtype=np.float64).reshape(6, 8) / 7
    assert encode(array.T, codec) == encode(np.ascontiguousarray(array.T).astype(np.float32), codec)


@pytest.mark.parametrize("codec", SCALAR)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
def test_what_is_not_finite_is_never_sent(codec: Codec, bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode(np.array([1.0, bad]), codec)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (1, 1, 1, 1, 1)])
def test_empty_and_five_dimensional_arrays_are_never_sent(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot encode an array of shape"):
        encode(np.zeros(shape, np.float32), Codec.F32)


@pytest.mark.parametrize("codec", SCALAR)
def test_bytes_a_value_are_as_the_table_says(codec: Codec) -> None:
    sizes = {
        Codec.F32: (4 * 384, 0),
        Codec.F16: (2 * 384, 0),
        Codec.INT8: (384, 2 * 3),
        Codec.INT4: (192, 2 * 6),
        Codec.NF4: (192, 2 * 6),
        Codec.INT2: (96, 2 * 6),
    }
    assert encoded_sizes(codec, (3, 128)) == sizes[codec]


@pytest.mark.parametrize("codec", SCALAR)
@pytest.mark.parametrize(
    "shape",
    [
        *((), (0,), (2, 0), (-1, -6), (-6,), (6, -1), (1,) * 5, (70,)),
        *((2**62, 4), (MAX_VALUES + 1,), (2**31, 2**33), (MAX_VALUES, MAX_VALUES, 2)),
    ],
)
def test_a_shape_that_lies_is_refused(codec: Codec, shape: tuple[int, ...]) -> None:
    honest = encode(np.ones((2, 3), np.float32), codec)
    with pytest.raises(DecodeError):
        Tensor(codec=codec, shape=shape, data=honest.data, scales=honest.scales)


@given(CODECS, SHAPES, st.integers(-2, 2), st.integers(-2, 2))
def test_a_byte_more_or_less_is_refused(codec: Codec, shape: tuple[int, ...], more: int, scale: int) -> None:
    data_bytes, scale_bytes = encoded_sizes(codec, shape)
    wrong = (max(0, data_bytes + more), max(0, scale_bytes + scale))
    if wrong != (data_bytes, scale_bytes):
        with pytest.raises(DecodeError):
            Tensor(codec=codec, shape=shape, data=bytes(wrong[0]), scales=bytes(wrong[1]))


@given(st.data(), CODECS, SHAPES)
def test_any_payload_decodes_to_finite_values_or_is_refused(
    data: st.DataObject, codec: Codec, shape: tuple[int, ...]
) -> None:
    data_bytes, scale_bytes = encoded_sizes(codec, shape)
    payload = data.draw(st.binary(min_size=data_bytes, max_size=data_bytes))
    scales = data.draw(st.binary(min_size=scale_bytes, max_size=scale_bytes))
    _decode_or_refuse(Tensor(codec=codec, shape=shape, data=payload, scales=scales))


@pytest.mark.parametrize("codec", [Codec.INT8, Codec.INT4, Codec.NF4, Codec.INT2])
@pytest.mark.parametrize("scale", ["807f", "c07f", "80ff", "80bf", "0180"])
def test_a_scale_that_is_not_finite_or_negative_is_refused(codec: Codec, scale: str) -> None:
    tensor = Tensor(codec=codec, shape=(1,), data=b"\x01", scales=bytes.fromhex(scale))
    with pytest.raises(DecodeError, match="scale"):
        decode(tensor)


@pytest.mark.parametrize("codec", [Codec.INT8, Codec.INT4, Codec.NF4, Codec.INT2])
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_the_largest_scale_stays_finite(codec: Codec, byte: int) -> None:
    tensor = Tensor(codec=codec, shape=(1,), data=bytes([byte]), scales=b"\x7f\x7f")
    assert np.isfinite(decode(tensor)).all()


@pytest.mark.parametrize(
    ("codec", "data"), [(Codec.F32, "0000c07f"), (Codec.F16, "007c"), (Codec.F16, "007e")]
)
def test_floats_that_are_not_finite_are_refused(codec: Codec, data: str) -> None:
    with pytest.raises(DecodeError, match="NaN or infinite"):
        decode(Tensor(codec=codec, shape=(1,), data=bytes.fromhex(data)))


def _decode_or_refuse(tensor: Tensor) -> None:
    try:
        values: Any = decode(tensor)
    except DecodeError:
        return
    assert values.shape == tensor.shape and np.isfinite(values).all()


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    taps=st.integers(1, 3),
    width=st.sampled_from([16, 32, 48, 64, 128]),
    codec=CODECS,
    seed=st.integers(0, 2**32),
)
def test_joined_tensors_hold_each_others_values_bit_by_bit(
    lengths: list[int], taps: int, width: int, codec: Codec, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.standard_normal((taps, length, width)) for length in lengths]
    fit = [one for one in values if joinable(codec, one.shape)] or values[:1]
    joined = join([encode(one, codec) for one in fit])
    assert np.array_equal(decode(joined), np.concatenate([decode(encode(one, codec)) for one in fit], axis=1))
    if width % 64 == 0:
        assert joined == encode(np.concatenate(fit, axis=1), codec), "as if written at once"
