"""The wire as it was agreed: these bytes mean these values, for ever."""

from __future__ import annotations

import math
import struct
from typing import Any, get_args

import msgpack
import msgspec
import numpy as np
import pytest

from sidestream.contract.signing import Scope, open_signed
from sidestream.contract.tensors import Codec, Tensor, decode, encode
from sidestream.contract.wire import pack, unpack
from sidestream.side_network.bundle import About, WeightsCodec, decode_bundle
from tests.contract.examples import KINDS, SIGNER, codebooks, load

CODECS = load("codecs.json")
MESSAGES = load("messages.json")
BUNDLES = load("bundles.json")
SIGNED = load("signed.json")
codebooks()  # ready for use


def _named(vectors: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


def test_every_codec_and_every_message_has_vectors() -> None:
    assert {vector["codec"] for vector in CODECS} == {codec.value for codec in Codec}
    assert {vector["type"] for vector in MESSAGES} == set(KINDS)


@_named(CODECS)
def test_the_encoder_writes_these_bytes(vector: dict[str, Any]) -> None:
    raw = bytes.fromhex(vector["values_f32"])
    values = np.frombuffer(raw, "<f4").reshape(vector["shape"])
    tensor = encode(values, Codec(vector["codec"]), bytes.fromhex(vector.get("codebooks", "")))
    assert (tensor.data.hex(), tensor.scales.hex()) == (vector["data"], vector["scales"])


@_named(CODECS)
def test_the_decoder_reads_these_values(vector: dict[str, Any]) -> None:
    values = decode(_tensor(vector))
    assert values.shape == tuple(vector["shape"])
    assert values.ravel().tolist() == vector["decoded"]


@_named(CODECS)
def test_a_plain_reading_of_the_format_gives_the_same_values(vector: dict[str, Any]) -> None:
    assert _read_plainly(_tensor(vector)) == pytest.approx(vector["decoded"], rel=1e-6, abs=0)


@_named([vector for vector in MESSAGES if not vector.get("decode_only")])
def test_a_message_is_written_as_these_bytes(vector: dict[str, Any]) -> None:
    message = msgspec.convert(vector["value"], type=KINDS[vector["type"]])
    assert pack(message).hex() == vector["hex"]


@_named(MESSAGES)
def test_these_bytes_are_read_as_this_message(vector: dict[str, Any]) -> None:
    message = unpack(KINDS[vector["type"]], bytes.fromhex(vector["hex"]))
    assert message == msgspec.convert(vector["value"], type=KINDS[vector["type"]])


@_named(MESSAGES)
def test_another_msgpack_library_reads_the_same(vector: dict[str, Any]) -> None:
    body = msgpack.unpackb(bytes.fromhex(vector["hex"]))
    assert body.pop("v") == 1
    assert msgspec.to_builtins(body) == vector["value"]


@_named(SIGNED)
def test_what_was_signed_once_is_read_and_believed_for_ever(vector: dict[str, Any]) -> None:
    sealed, kind = bytes.fromhex(vector["hex"]), KINDS[vector["type"]]
    scope = Scope(kind=vector["name"], job="assist", tier=vector["tier"], device=vector.get("device", ""))
    message = open_signed(kind, sealed, scope, [bytes.fromhex(vector["public_key"])])
    assert vector.get("decode_only") or SIGNER.sign(message, scope) == sealed


def test_every_codec_of_weights_has_a_vector() -> None:
    named = {vector["name"] for vector in BUNDLES}
    assert named == {
        name for codec in get_args(WeightsCodec) for name in (codec, f"{codec}, with a linear start")
    }


@_named(BUNDLES)
def test_a_bundle_once_written_is_read_for_ever(vector: dict[str, Any]) -> None:
    bundle = decode_bundle(bytes.fromhex(vector["hex"]))
    assert bundle.about == msgspec.convert(vector["about"], type=About)
    assert {name: array.tolist() for name, array in bundle.tensors.items()} == vector["decoded"]


def _tensor(vector: dict[str, Any]) -> Tensor:
    return Tensor(
        codec=Codec(vector["codec"]),
        shape=tuple(vector["shape"]),
        data=bytes.fromhex(vector["data"]),
        scales=bytes.fromhex(vector["scales"]),
        codebooks=bytes.fromhex(vector["codebooks"]) if "codebooks" in vector else msgspec.UNSET,
    )


_NF4: tuple[float, ...] = (-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0)
_NF4 += (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)


def _read_plainly(tensor: Tensor) -> list[float]:
    """The table in sidestream/contract/tensors.py, value by value, with nothing but the standard library."""
    count, data = math.prod(tensor.shape), tensor.data
    if tensor.codec in (Codec.PQ1, Codec.PQ2):
        return _read_codes(tensor)
    if tensor.codec in (Codec.F32, Codec.F16):
        return list(struct.unpack(f"<{count}{'f' if tensor.codec is Codec.F32 else 'e'}", data))
    raw = struct.unpack(f"<{len(tensor.scales) // 2}H", tensor.scales)
    scales = [struct.unpack("<f", struct.pack("<I", high << 16))[0] for high in raw]
    if tensor.codec is Codec.INT8:
        levels: list[float] = list(struct.unpack(f"<{count}b", data))
        return [level * scales[i // tensor.shape[-1]] for i, level in enumerate(levels)]
    if tensor.codec is Codec.INT2:
        levels = [(data[i // 4] >> (2 * (i % 4)) & 3) - 1.5 for i in range(count)]
    else:
        nibbles = [data[i // 2] >> (4 * (i % 2)) & 15 for i in range(count)]
        levels = [_NF4[n] if tensor.codec is Codec.NF4 else n - 8 for n in nibbles]
    return [level * scales[i // 64] for i, level in enumerate(levels)]


def _read_codes(tensor: Tensor) -> list[float]:
    """Codes of one stage after the other, eight values each; the sum of their centroids is turned back."""
    taps, vectors, width = tensor.shape
    books, found, each = codebooks().by_tap, [], len(tensor.data) // (taps * vectors)
    for start in range(0, len(tensor.data), each):
        book = books[start // each // vectors]
        codes = [
            tensor.data[start + stage : start + stage + width // 8] for stage in range(0, each, width // 8)
        ]
        turned = [
            sum(float(book.centroids[stage, j // 8, code[j // 8], j % 8]) for stage, code in enumerate(codes))
            for j in range(width)
        ]
        found += [sum(turned[j] * float(book.rotation[i, j]) for j in range(width)) for i in range(width)]
    return found
