"""Tensors on the wire: a checked header and raw little-endian bytes, in one of a few codecs.

NumPy only, so that a device encodes and a script decodes without torch. With ``s`` a block's scale, the
round-trip error of a value ``x`` is bounded as :func:`error_bound` states:

========  ==================================================  ==========  =====================
codec     one value                                           bytes/value scale
========  ==================================================  ==========  =====================
``f32``   IEEE 754 single                                     4           none
``f16``   IEEE 754 half, clipped to ±65504                    2           none
``int8``  round(x / s), −127…127                              1           a row (last axis)
``int4``  round(x / s), −7…7, two a byte, low nibble first    0.5         64 consecutive values
``nf4``   nearest of 16 normal quantiles (QLoRA, app. E)      0.5         64 consecutive values
``int2``  (k − 1.5)·s, k = 0…3, four a byte, low bits first   0.25        64 consecutive values
``pq1``   the nearest of 256 centroids for eight values       0.125       none
``pq2``   the same, and again for what that leaves over       0.25        none
========  ==================================================  ==========  =====================

The last two, product quantisation, take codebooks (:mod:`sidestream.contract.codebooks`), which a tensor
names: one for each tap, its first dimension. No error is bounded; what they were fitted to has a small one.

A scale is a bfloat16 rounded **up**, so that it keeps the whole range of f32 in two bytes and no value of its
block is ever clipped. Blocks run over the flattened tensor; the last one may be shorter.

Legend: N values in all, B blocks, R rows.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from sidestream.contract.codebooks import GROUP, ID_BYTES, codebooks_of
from sidestream.contract.errors import DecodeError
from sidestream.contract.wire import MAX_MESSAGE_BYTES, Message, prepared

BLOCK: Final = 64
MAX_DIMS: Final = 4
MAX_VALUES: Final = 4 * MAX_MESSAGE_BYTES
"""int2 holds four values a byte: no message can carry more."""

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Codec(str, enum.Enum):
    """How the values of a tensor are written."""

    F32 = "f32"
    F16 = "f16"
    INT8 = "int8"
    INT4 = "int4"
    NF4 = "nf4"
    INT2 = "int2"
    PQ1 = "pq1"
    PQ2 = "pq2"

    @property
    def stages(self) -> int:
        """Codes for each eight values, in product quantisation; 0 for all others."""
        return _STAGES.get(self, 0)


@prepared
class Tensor(Message, frozen=True, kw_only=True):
    """A tensor as it travels."""

    codec: Codec
    """How ``data`` is written."""
    shape: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_DIMS)]
    """Its dimensions, 1 to 4 of them, each at least 1."""
    data: bytes
    """The values, row-major, little-endian."""
    scales: bytes = b""
    """One bfloat16 a block (a row for int8); empty for f32, f16, pq1 and pq2."""
    codebooks: bytes | msgspec.UnsetType = msgspec.UNSET
    """The id of the codebooks that pq1 and pq2 take (16 bytes); not written elsewhere."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= MAX_DIMS or any(not 1 <= n <= MAX_VALUES for n in self.shape):
            raise DecodeError(f"shape has {len(self.shape)} dimensions, or one outside 1…{MAX_VALUES}")
        if math.prod(self.shape) > MAX_VALUES:
            raise DecodeError(f"shape holds more than {MAX_VALUES} values")
        if self.codec.stages:
            self._check_product_codes()
        elif self.codebooks is not msgspec.UNSET:
            raise DecodeError(f"{self.codec.value} takes no codebooks")
        data_bytes, scale_bytes = encoded_sizes(self.codec, self.shape)
        if len(self.data) != data_bytes or len(self.scales) != scale_bytes:
            raise DecodeError(
                f"{self.codec.value} of shape {self.shape} takes {data_bytes} bytes and {scale_bytes} of "
                f"scales, not {len(self.data)} and {len(self.scales)}"
            )

    def _check_product_codes(self) -> None:
        if len(self.shape) not in (2, 3) or self.shape[-1] % GROUP:
            raise DecodeError(f"{self.codec.value} takes vectors of a width that {GROUP} divides")
        if not isinstance(self.codebooks, bytes) or len(self.codebooks) != ID_BYTES:
            raise DecodeError(f"{self.codec.value} names its codebooks by {ID_BYTES} bytes")

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales, without the header."""
        return len(self.data) + len(self.scales)


def encode(values: npt.NDArray[Any], codec: Codec, codebooks: bytes = b"") -> Tensor:
    """Write ``values`` (1 to 4 dimensions, any float dtype) in ``codec``.

    Args:
        values: In product quantisation [B, N, d], or [N, d] of one tap.
        codec: How.
        codebooks: In product quantisation, by which: their id. Others do without.

    Raises:
        ValueError: if a value is NaN or infinite, or the array is empty or too large: the caller's bug or
            a backbone gone wrong, to be counted and skipped there, never sent.
        DecodeError: these codebooks are not here.
    """
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused below
        array = np.ascontiguousarray(values, dtype=np.float32)
    if array.size == 0 or array.size > MAX_VALUES or not 1 <= array.ndim <= MAX_DIMS:
        raise ValueError(f"cannot encode an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("cannot encode NaN or infinite values")
    if codec.stages:
        data = codebooks_of(codebooks).encode(array, codec.stages)
        return Tensor(codec=codec, shape=tuple(array.shape), data=data, codebooks=codebooks)
    data, scales = _CODECS[codec].encode(array)
    return Tensor(codec=codec, shape=tuple(array.shape), data=data, scales=scales)


def decode(tensor: Tensor) -> Floats:
    """Read a tensor back as a writable float32 array of its shape.

    Raises:
        DecodeError: if a value or scale is NaN or infinite, or a scale is negative; or if its codebooks are
            not here, or not for such a tensor.
    """
    if isinstance(tensor.codebooks, bytes):
        books = codebooks_of(tensor.codebooks)
        return books.decode(tensor.data, tensor.shape, tensor.codec.stages)
    values = _CODECS[tensor.codec].decode(tensor)
    if not np.isfinite(values).all():
        raise DecodeError(f"{tensor.codec.value} tensor holds NaN or infinite values")
    return values.reshape(tensor.shape)


def encoded_sizes(codec: Codec, shape: tuple[int, ...]) -> tuple[int, int]:
    """Bytes of data and of scales that ``shape`` takes in ``codec``."""
    count = math.prod(shape)
    if codec.stages:
        return codec.stages * (count // GROUP), 0
    if codec is Codec.INT8:
        return count, 2 * (count // shape[-1])
    bits = _CODECS[codec].bits
    return -(-count * bits // 8), 2 * -(-count // BLOCK) if bits < 8 else 0


def joinable(codec: Codec, shape: tuple[int, ...]) -> bool:
    """Whether no block of such a tensor [B, V, d] holds values of two different taps."""
    return bool(codec.stages) or _CODECS[codec].bits >= 8 or (shape[1] * shape[2]) % BLOCK == 0


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Put tensors [B, V, d] one after another along V, as they are written: no value is quantised again.

    Args:
        tensors: Of one codec, B and d, each of them :func:`joinable` unless it is alone.
    """
    if len(tensors) == 1:
        return tensors[0]
    codec, (taps, _, width) = tensors[0].codec, tensors[0].shape
    books = tensors[0].codebooks
    assert all(one.codec is codec and joinable(codec, one.shape) for one in tensors)
    assert all(one.codebooks == books for one in tensors)
    return Tensor(
        codec=codec,
        shape=(taps, sum(one.shape[1] for one in tensors), width),
        data=_by_tap([one.data for one in tensors], taps),
        scales=_by_tap([one.scales for one in tensors], taps),
        codebooks=books,
    )


def by_vector(tensor: Tensor) -> tuple[Bytes, Bytes]:
    """What a tensor [B, V, d] is written in, vector by vector: [B, V, n] of values and [B, V, m] of scales.

    Only where no block holds parts of two vectors (:func:`separable`).
    """
    taps, count, _ = tensor.shape
    data, scales = (np.frombuffer(part, np.uint8) for part in (tensor.data, tensor.scales))
    return data.reshape(taps, count, -1), scales.reshape(taps, count, len(scales) // (taps * count))


def separable(tensor: Tensor) -> bool:
    """Whether no block of a tensor [B, V, d] holds parts of two vectors."""
    codec = tensor.codec
    return bool(codec.stages) or _CODECS[codec].bits >= 8 or tensor.shape[2] % BLOCK == 0


def take(tensor: Tensor, vectors: npt.NDArray[np.integer[Any]]) -> Tensor:
    """Only some of the vectors of a tensor [B, V, d], in the order given.

    Values stay as they were written, unless a block holds parts of two vectors; then all are written anew,
    within the codec's error.

    Raises:
        DecodeError: as :func:`decode`, in the second case.
    """
    if not separable(tensor):
        return encode(decode(tensor)[:, vectors], tensor.codec)
    taps, _, width = tensor.shape
    data, scales = by_vector(tensor)
    return Tensor(
        codec=tensor.codec,
        shape=(taps, len(vectors), width),
        data=data[:, vectors].tobytes(),
        scales=scales[:, vectors].tobytes(),
        codebooks=tensor.codebooks,
    )


def _by_tap(parts: Sequence[bytes], taps: int) -> bytes:
    rows = [np.frombuffer(part, np.uint8).reshape(taps, len(part) // taps) for part in parts]
    return np.concatenate(rows, axis=1).tobytes()


def error_bound(values: npt.NDArray[Any], codec: Codec) -> Floats:
    """Largest error that a round trip of each of ``values`` may show, same shape.

    f16 for magnitudes within ±65504; the quantised codecs for every finite f32. Product quantisation has no
    such bound.
    """
    assert not codec.stages
    array = np.asarray(values, dtype=np.float32)
    if codec is Codec.F32:
        return np.zeros_like(array)
    if codec is Codec.F16:
        return (np.abs(array) * 2.0**-11 + 2.0**-25).astype(np.float32)
    if codec is Codec.INT8:
        absmax = np.abs(array).max(axis=-1, keepdims=True) * np.ones_like(array)
    else:
        absmax = np.repeat(_block_absmax(array), BLOCK)[: array.size].reshape(array.shape)
    # Half a step, the scale's rounding up (at most 2^-7 of it) and f32 arithmetic included.
    steps = {Codec.INT8: 0.5 / 127, Codec.INT4: 0.5 / 7, Codec.NF4: _NF4_HALF_GAP, Codec.INT2: 0.5 / 1.5}
    bound: Floats = (absmax.astype(np.float64) * steps[codec] * 1.01 + 1e-38).astype(np.float32)
    return bound


# --- scales ----------------------------------------------------------------------------------------------


def _block_absmax(array: Floats) -> Floats:
    """[N] or any shape -> [B] largest magnitude of each block of the flattened array."""
    flat = np.abs(array.reshape(-1))
    padded = np.zeros(-(-flat.size // BLOCK) * BLOCK, np.float32)
    padded[: flat.size] = flat
    blocks: Floats = padded.reshape(-1, BLOCK).max(axis=1)
    return blocks


def _bf16_up(scales: npt.NDArray[np.float64]) -> tuple[Floats, bytes]:
    """Round non-negative scales up to bfloat16: the rounded values, and their bytes."""
    bits = scales.astype(np.float32).view(np.uint32).astype(np.uint64)
    high = np.minimum((bits + 0xFFFF) >> 16, 0x7F7F).astype("<u2")
    return _bf16_values(high), high.tobytes()


def _bf16_values(high: npt.NDArray[np.uint16]) -> Floats:
    return (high.astype(np.uint32) << 16).view(np.float32)


def _read_scales(tensor: Tensor) -> Floats:
    scales = _bf16_values(np.frombuffer(tensor.scales, "<u2"))
    if not np.isfinite(scales).all() or (np.signbit(scales) & (scales != 0)).any():
        raise DecodeError(f"{tensor.codec.value} tensor has a scale that is not a finite, positive number")
    return scales


def _divide(array: npt.NDArray[np.float64], scales: Floats) -> npt.NDArray[np.float64]:
    """Return array / scales, with 0 where a scale is 0 (its block is all zeros)."""
    wide = scales.astype(np.float64)
    return np.divide(array, wide, out=np.zeros_like(array), where=wide > 0)


def _scale(values: Floats, scales: Floats) -> Floats:
    """[B, n] times [B], in place; what only a scale's rounding up pushed past f32 stays at its end."""
    limit = np.finfo(np.float32).max
    with np.errstate(over="ignore"):
        values *= scales[:, None]
    return np.clip(values, -limit, limit, out=values)


# --- codecs ----------------------------------------------------------------------------------------------


def _encode_f32(array: Floats) -> tuple[bytes, bytes]:
    return array.astype("<f4").tobytes(), b""


def _decode_f32(tensor: Tensor) -> Floats:
    return np.frombuffer(tensor.data, "<f4").astype(np.float32)


def _encode_f16(array: Floats) -> tuple[bytes, bytes]:
    return np.clip(array, -65504, 65504).astype("<f2").tobytes(), b""


def _decode_f16(tensor: Tensor) -> Floats:
    return np.frombuffer(tensor.data, "<f2").astype(np.float32)


def _encode_int8(array: Floats) -> tuple[bytes, bytes]:
    rows = array.reshape(-1, array.shape[-1]).astype(np.float64)  # [R, d]
    scales, scale_bytes = _bf16_up(np.abs(rows).max(axis=1) / 127)
    quantised = np.rint(_divide(rows, scales[:, None])).astype(np.int8)
    return quantised.tobytes(), scale_bytes


def _decode_int8(tensor: Tensor) -> Floats:
    scales = _read_scales(tensor)
    rows = np.frombuffer(tensor.data, np.int8).reshape(-1, tensor.shape[-1]).astype(np.float32)
    return _scale(rows, scales).reshape(-1)


def _to_blocks(array: Floats) -> npt.NDArray[np.float64]:
    """Any shape -> [B, 64], zero-padded at the end."""
    padded = np.zeros(-(-array.size // BLOCK) * BLOCK, np.float64)
    padded[: array.size] = array.reshape(-1)
    return padded.reshape(-1, BLOCK)


def _pack_bits(levels: Bytes, bits: int, count: int) -> bytes:
    """Levels below 2^bits -> bytes, the first level in the lowest bits; ``count`` of them matter."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    packed = (levels.reshape(-1, per_byte) << shifts).sum(axis=1, dtype=np.uint8)
    data: bytes = packed[: -(-count * bits // 8)].tobytes()
    return data


def _unpack_bits(data: bytes, bits: int, count: int) -> Bytes:
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    levels = (np.frombuffer(data, np.uint8)[:, None] >> shifts) & np.uint8(2**bits - 1)
    flat: Bytes = levels.reshape(-1)[:count]
    return flat


def _block_codec(
    bits: int,
    largest: float,
    quantise: Callable[[npt.NDArray[np.float64]], npt.NDArray[Any]],
    levels: npt.NDArray[np.float64],
) -> _Codec:
    """A codec of 64-value blocks whose largest magnitude stands at ``largest`` units of its scale.

    ``quantise`` maps values in units of the scale to indices into ``levels``.
    """
    narrow = levels.astype(np.float32)

    def encode_blocks(array: Floats) -> tuple[bytes, bytes]:
        blocks = _to_blocks(array)
        scales, scale_bytes = _bf16_up(np.abs(blocks).max(axis=1) / largest)
        indices = quantise(_divide(blocks, scales[:, None])).astype(np.uint8)
        return _pack_bits(indices, bits, array.size), scale_bytes

    def decode_blocks(tensor: Tensor) -> Floats:
        count, scales = math.prod(tensor.shape), _read_scales(tensor)
        values = np.zeros(scales.size * BLOCK, np.float32)
        values[:count] = narrow[_unpack_bits(tensor.data, bits, count)]
        return _scale(values.reshape(-1, BLOCK), scales).reshape(-1)[:count]

    return _Codec(bits=bits, encode=encode_blocks, decode=decode_blocks)


class _Codec(NamedTuple):
    bits: int
    encode: Callable[[Floats], tuple[bytes, bytes]]
    decode: Callable[[Tensor], Floats]


# The 16 quantiles of QLoRA (Dettmers et al. 2023, appendix E).
_NF4: Final = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
_NF4_EDGES: Final = (_NF4[1:] + _NF4[:-1]) / 2
_NF4_HALF_GAP: Final = float(np.diff(_NF4).max() / 2)

_CODECS: Final[dict[Codec, _Codec]] = {
    Codec.F32: _Codec(bits=32, encode=_encode_f32, decode=_decode_f32),
    Codec.F16: _Codec(bits=16, encode=_encode_f16, decode=_decode_f16),
    Codec.INT8: _Codec(bits=8, encode=_encode_int8, decode=_decode_int8),
    Codec.INT4: _block_codec(4, 7.0, lambda u: np.clip(np.rint(u), -7, 7) + 8, np.arange(-8.0, 8.0)),
    Codec.NF4: _block_codec(4, 1.0, lambda u: np.searchsorted(_NF4_EDGES, u), _NF4),
    Codec.INT2: _block_codec(
        2, 1.5, lambda u: np.clip(np.floor(u) + 2, 0, 3), np.array([-1.5, -0.5, 0.5, 1.5])
    ),
}
_STAGES: Final = {Codec.PQ1: 1, Codec.PQ2: 2}
if {*_CODECS, *_STAGES} != set(Codec):  # pragma: no cover
    raise AssertionError("every Codec needs an entry in _CODECS or _STAGES")
