"""Side-network weights as bytes: one safetensors file that says what it is. Never pickle.

With the codec ``int8`` a tensor of two axes or more stands in the file as int8, and beside it, under its name
and ``:scale``, what one step is worth: a float16 for each output. Axis 1 is what an output sums over, in a
linear map's [out, in] and in an alignment map's [B, in, out] alike, so it is the scales' axis of length 1.
Tensors of one axis are float16. The error is at most half a step: 1/254 of an output's largest weight.

With ``packed`` the steps are wider, a share of the output's root mean square, so that few of them are much in
use; and the file is packed by Huffman's code, behind a mark that no safetensors file begins with. In any file
a matrix may stand as what has changed since it was initial (:mod:`sidestream.side_network.change`).
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sidestream.contract.errors import ConfigError, DecodeError
from sidestream.contract.messages import MAX_LABELS, Count, check_labels, check_stream
from sidestream.contract.plan import MAX_TIERS, SideNetworkSpec
from sidestream.contract.tasks import TASKS, Scale, Task
from sidestream.contract.tensors import Floats
from sidestream.contract.topics import check_name
from sidestream.contract.wire import M, Message, brief, prepared
from sidestream.side_network.change import restored
from sidestream.side_network.initial import initial

MAX_BUNDLE_BYTES: Final = 2**31
MAX_HEADER_BYTES: Final = 2**20
"""The largest side-network and label list take 0.7 MB; safetensors takes some thirty times what it reads."""
_LENGTH_BYTES: Final = 8
_SCALE: Final = ":scale"
"""Ends the names of scales; no parameter's name holds a colon."""
_INPUT_AXIS: Final = 1
_LARGEST_HALF: Final = 65504

_MARK: Final = b"hufb"
"""As the length of a safetensors header it would be 1.6 GB."""
_MOST_PACKED: Final = 8
"""Huffman's code takes a bit for eight at least; a file that grows by more was not packed by us."""
_STEP_SHARE: Final = 1 / 3
"""Of an output's root mean square weight: a step of ``packed``."""

WeightsCodec = Literal["f32", "f16", "int8", "packed"]
"""How weights are written."""


@prepared
class About(Message, frozen=True, kw_only=True):
    """What the weights are; kept as JSON in the file's metadata, so that an export explains itself."""

    job: str
    """The job's name."""
    run: str
    """The trainer's journal id."""
    version: Count
    """Journal records folded in."""
    labels: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_LABELS)]
    """Label names in index order; none where the task has none."""
    side_network: SideNetworkSpec
    """Shape of the side-network."""
    aligns: Annotated[dict[str, int], msgspec.Meta(max_length=MAX_TIERS)]
    """Alignment maps inside, by name, with the backbone width that each takes."""
    tiers: Annotated[dict[str, str], msgspec.Meta(max_length=MAX_TIERS)]
    """Tiers, with the alignment map that each uses."""
    seed: Count = 0
    """The learner's: decides what the weights were at first."""
    task: Task = Task.TEXT_CLASSIFICATION
    """What was learnt."""
    scale: Scale = Scale()
    """What answers are measured in, where the task is regression."""
    starts: Annotated[dict[str, tuple[int, ...]], msgspec.Meta(max_length=MAX_TIERS)] = msgspec.field(
        default_factory=dict
    )
    """Linear starts inside: by alignment map, of how many taps."""

    def __post_init__(self) -> None:
        check_stream(self.run)
        check_labels(self.labels)
        if TASKS[self.task].named and not self.labels:
            raise DecodeError(f"{self.task.value} without labels")
        try:
            for field, names in (("job", [self.job]), ("align", self.aligns), ("tier", self.tiers)):
                for name in names:
                    check_name(field, name)
        except ConfigError as exc:
            raise DecodeError(str(exc)) from exc
        if not set(self.tiers.values()) <= set(self.aligns):
            raise DecodeError("a tier names an alignment map that the bundle does not hold")
        if any(not 1 <= width <= 65536 for width in self.aligns.values()):
            raise DecodeError("an alignment map takes a width outside 1…65536")
        if not set(self.starts) <= set(self.aligns):
            raise DecodeError("a linear start is of an alignment map that the bundle does not hold")
        if any(
            not 1 <= taps <= self.side_network.blocks for counts in self.starts.values() for taps in counts
        ):
            raise DecodeError("a linear start has more taps than the side-network has blocks, or none")
        if self.starts and (TASKS[self.task].per_vector or TASKS[self.task].generates):
            raise DecodeError(f"{self.task.value} has no linear start")


@prepared
class _Metadata(msgspec.Struct):
    """The file's own key-value pairs: strings only, so ours is JSON in JSON."""

    sidestream: str


@prepared
class _Header(msgspec.Struct):
    """What we read of a safetensors header; tensors are safetensors' business."""

    metadata: _Metadata = msgspec.field(name="__metadata__")


@prepared
class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """Weights with their description."""

    about: About
    """What they are."""
    tensors: dict[str, Floats]
    """By parameter name, float32."""


def encode_bundle(about: Message, tensors: Mapping[str, Floats], *, codec: WeightsCodec = "f32") -> bytes:
    """Write a bundle; what float16 cannot hold is clipped. Equal input gives equal bytes."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, array in sorted(tensors.items()):
        if codec in ("int8", "packed") and array.ndim > _INPUT_AXIS and array.size:
            share = _STEP_SHARE if codec == "packed" else 0.0
            arrays[name], arrays[name + _SCALE] = _to_int8(np.ascontiguousarray(array), share)
        elif codec == "f32":
            arrays[name] = np.ascontiguousarray(array, np.float32)
        else:
            arrays[name] = np.ascontiguousarray(np.clip(array, -_LARGEST_HALF, _LARGEST_HALF), np.float16)
    written: bytes = save(arrays, metadata={"sidestream": msgspec.json.encode(about).decode()})
    return _packed(written) if codec == "packed" else written


def _packed(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return _MARK + packer.compress(data) + packer.flush()


def _unpacked(data: bytes) -> bytes:
    """Data as it was before it was packed, if it was.

    Raises:
        DecodeError: if it was packed by somebody else, or is not whole.
    """
    if not data.startswith(_MARK):
        return data
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(data[len(_MARK) :], _MOST_PACKED * len(data))
    except zlib.error as exc:
        raise DecodeError(f"not a packed bundle of weights: {brief(exc)}") from exc
    if not unpacker.eof or unpacker.unused_data:
        raise DecodeError("a packed bundle of weights is cut short, or holds more than it says")
    return found


def _to_int8(array: Floats, share: float = 0.0) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """[out, in, …] -> int8 of that shape, and scales [out, 1, …], rounded up so that nothing is clipped.

    Args:
        array: Weights.
        share: No step is smaller than this share of an output's root mean square.
    """
    exact = np.abs(array).max(axis=_INPUT_AXIS, keepdims=True) / 127
    if share:
        with np.errstate(over="ignore"):
            exact = np.maximum(exact, share * np.sqrt(np.square(array).mean(axis=_INPUT_AXIS, keepdims=True)))
    scales = np.minimum(exact, _LARGEST_HALF).astype(np.float16)
    scales = np.where(scales < exact, np.nextafter(scales, np.float16(_LARGEST_HALF)), scales)
    steps = np.divide(array, scales, out=np.zeros_like(array), where=scales > 0, dtype=np.float32)
    return np.rint(np.clip(steps, -127, 127)).astype(np.int8), scales


def decode_bundle(data: bytes) -> Bundle:
    """Read a bundle.

    Raises:
        DecodeError: whatever the bytes are, if they are no bundle or hold NaN or infinite values.
    """
    about, tensors = decode_weights(data, About)
    return Bundle(about=about, tensors=restored(tensors, partial(initial, about.seed)))


def decode_weights(data: bytes, kind: type[M]) -> tuple[M, dict[str, Floats]]:
    """Read any file that :func:`encode_bundle` wrote: what it says of itself, and its tensors as float32.

    What it wrote as changes is left as such.

    Raises:
        DecodeError: as :func:`decode_bundle`.
    """
    data = _unpacked(data)
    try:
        header_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little")
        if len(data) < _LENGTH_BYTES or header_bytes > len(data) - _LENGTH_BYTES:
            raise DecodeError("not a safetensors file: truncated header")
        if header_bytes > MAX_HEADER_BYTES or len(data) > MAX_BUNDLE_BYTES:
            raise DecodeError(f"{len(data)} bytes with a header of {header_bytes}: too large for a bundle")
        header = msgspec.json.decode(data[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes], type=_Header)
        about = msgspec.json.decode(header.metadata.sidestream, type=kind)
        arrays = load(data)
    except (SafetensorError, msgspec.MsgspecError, KeyError, TypeError, ValueError, RecursionError) as exc:
        raise DecodeError(f"not a bundle of weights: {type(exc).__name__}: {brief(exc)}") from exc
    tensors = {
        name: _to_float(name, array, arrays) for name, array in arrays.items() if not name.endswith(_SCALE)
    }
    if len(arrays) != len(tensors) + sum(array.dtype == np.int8 for array in arrays.values()):
        raise DecodeError("the bundle holds scales of no int8 tensor")
    if not all(np.isfinite(array).all() for array in tensors.values()):
        raise DecodeError("the bundle holds NaN or infinite weights")
    return about, tensors


def _to_float(name: str, array: npt.NDArray[Any], arrays: Mapping[str, npt.NDArray[Any]]) -> Floats:
    """A tensor as float32: as it stands, or times its scales.

    Raises:
        DecodeError: if it has another type, or not the scales that go with it.
    """
    if array.dtype in (np.float32, np.float16):
        return array.astype(np.float32)
    if array.dtype != np.int8:
        raise DecodeError("a bundle holds float32, float16 and int8 tensors only")
    scales = arrays.get(name + _SCALE)
    one_each = tuple(1 if axis == _INPUT_AXIS else length for axis, length in enumerate(array.shape))
    if scales is None or scales.dtype != np.float16 or scales.shape != one_each or array.ndim <= _INPUT_AXIS:
        raise DecodeError("an int8 tensor has no float16 scale for each output")
    if not (scales >= 0).all():
        raise DecodeError("a scale is negative or NaN")
    return array.astype(np.float32) * scales.astype(np.float32)


def digest(data: bytes) -> str:
    """sha256 in hex."""
    return hashlib.sha256(data).hexdigest()


def state_digest(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """sha256 over names, shapes and little-endian bytes in name order: two equal states, nothing else."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name], dtype=tensors[name].dtype.newbyteorder("<"))
        total.update(f"{len(name)} {name} {array.shape}\0".encode())
        total.update(array.tobytes())
    return total.hexdigest()
