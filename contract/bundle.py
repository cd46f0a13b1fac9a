"""Side-network weights as bytes: one safetensors file that says what it is. Never pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from contract.errors import ConfigError, DecodeError
from contract.messages import MAX_LABELS, Count, check_labels, check_stream
from contract.plan import MAX_TIERS, SideNetworkSpec
from contract.tensors import Floats
from contract.topics import check_name
from contract.wire import Message, brief

MAX_BUNDLE_BYTES: Final = 2**31
MAX_HEADER_BYTES: Final = 2**20
"""The largest side-network and label list take 0.7 MB; safetensors takes some thirty times what it reads."""
_LENGTH_BYTES: Final = 8


class About(Message, frozen=True, kw_only=True):
    """What the weights are; kept as JSON in the file's metadata, so that an export explains itself."""

    job: str
    """The job's name."""
    run: str
    """The trainer's journal id."""
    version: Count
    """Journal records folded in."""
    labels: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=MAX_LABELS)]
    """Label names in index order."""
    side_network: SideNetworkSpec
    """Shape of the side-network."""
    aligns: Annotated[dict[str, int], msgspec.Meta(max_length=MAX_TIERS)]
    """Alignment maps inside, by name, with the backbone width that each takes."""
    tiers: Annotated[dict[str, str], msgspec.Meta(max_length=MAX_TIERS)]
    """Tiers, with the alignment map that each uses."""

    def __post_init__(self) -> None:
        check_stream(self.run)
        check_labels(self.labels)
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


class _Metadata(msgspec.Struct):
    """The file's own key-value pairs: strings only, so ours is JSON in JSON."""

    sidestream: str


class _Header(msgspec.Struct):
    """What we read of a safetensors header; tensors are safetensors' business."""

    metadata: _Metadata = msgspec.field(name="__metadata__")


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """Weights with their description."""

    about: About
    """What they are."""
    tensors: dict[str, Floats]
    """By parameter name, float32."""


def encode_bundle(about: About, tensors: Mapping[str, Floats], *, half: bool = False) -> bytes:
    """Write a bundle, as float16 (clipped to ±65504) when ``half``. Equal input gives equal bytes."""
    dtype = np.float16 if half else np.float32
    arrays = {
        name: np.ascontiguousarray(np.clip(array, -65504, 65504) if half else array, dtype=dtype)
        for name, array in sorted(tensors.items())
    }
    written: bytes = save(arrays, metadata={"sidestream": msgspec.json.encode(about).decode()})
    return written


def decode_bundle(data: bytes) -> Bundle:
    """Read a bundle.

    Raises:
        DecodeError: whatever the bytes are, if they are no bundle or hold NaN or infinite values.
    """
    try:
        header_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little")
        if len(data) < _LENGTH_BYTES or header_bytes > len(data) - _LENGTH_BYTES:
            raise DecodeError("not a safetensors file: truncated header")
        if header_bytes > MAX_HEADER_BYTES or len(data) > MAX_BUNDLE_BYTES:
            raise DecodeError(f"{len(data)} bytes with a header of {header_bytes}: too large for a bundle")
        header = msgspec.json.decode(data[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes], type=_Header)
        about = msgspec.json.decode(header.metadata.sidestream, type=About)
        arrays = load(data)
    except (SafetensorError, msgspec.MsgspecError, KeyError, TypeError, ValueError, RecursionError) as exc:
        raise DecodeError(f"not a side-network bundle: {type(exc).__name__}: {brief(exc)}") from exc
    if any(array.dtype not in (np.float32, np.float16) for array in arrays.values()):
        raise DecodeError("a bundle holds float32 or float16 tensors only")
    tensors = {name: array.astype(np.float32) for name, array in arrays.items()}
    if not all(np.isfinite(array).all() for array in tensors.values()):
        raise DecodeError("the bundle holds NaN or infinite weights")
    return Bundle(about=about, tensors=tensors)


def digest(data: bytes) -> str:
    """sha256 in hex."""
    return hashlib.sha256(data).hexdigest()


def state_digest(tensors: Mapping[str, Floats]) -> str:
    """sha256 over names, shapes and float32 bytes in name order: two equal states, nothing else."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name], dtype="<f4")
        total.update(f"{len(name)} {name} {array.shape}\0".encode())
        total.update(array.tobytes())
    return total.hexdigest()
