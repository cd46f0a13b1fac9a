"""Whatever bytes arrive: a message, or a DecodeError, in bounded memory. And the wire only grows."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.contract.errors import DecodeError
from sidestream.contract.messages import ActivationBatch, Receipt, Status, Telemetry, content_digest
from sidestream.contract.plan import Plan
from sidestream.contract.tensors import Codec, decode
from sidestream.contract.wire import MAX_MESSAGE_BYTES, Message, pack, unpack
from tests.contract.examples import EXAMPLES, KINDS, SCALAR, STREAM, batch, plan

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_example = pytest.mark.parametrize("message", EXAMPLES.values(), ids=EXAMPLES)

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=40)
    | st.sampled_from([STREAM, "online", "int4", "text-classification", b"", b"\0\0\0\0", b"\1\0"])
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def _receive(kind: type[Message], payload: bytes) -> Message | None:
    """What a trainer or an agent does with a payload; anything but a DecodeError fails the test."""
    try:
        message = unpack(kind, payload)
        if isinstance(message, ActivationBatch):
            decode(message.activations)
            content_digest(message)
    except DecodeError as exc:
        assert len(str(exc)) < 1000 and str(exc).isprintable()
        return None
    assert unpack(kind, pack(message)) == message
    return message


@every_example
def test_every_message_comes_back_as_it_was(message: Message) -> None:
    assert unpack(type(message), pack(message)) == message


@every_kind
@given(payload=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(kind: type[Message], payload: bytes) -> None:
    _receive(kind, payload)


@every_example
def test_a_real_message_with_some_bytes_changed_is_read_or_refused(message: Message) -> None:
    rng, payload = random.Random(1), pack(message)
    for _ in range(400):
        mutated = bytearray(payload)
        for _ in range(rng.choice((1, 1, 2, 5))):
            place = rng.randrange(len(mutated))
            action = rng.randrange(4)
            if action == 0:
                mutated[place] = rng.randrange(256)
            elif action == 1:
                mutated[place] ^= 1 << rng.randrange(8)
            elif action == 2:
                mutated[place:place] = rng.randbytes(rng.choice((1, 2, 4)))
            else:
                del mutated[place : place + rng.choice((1, 2, 4))]
        _receive(type(message), bytes(mutated))


@every_example
def test_a_truncated_message_is_refused(message: Message) -> None:
    payload = pack(message)
    for length in range(0, len(payload), max(1, len(payload) // 200)):
        assert _receive(type(message), payload[:length]) is None


@every_example
def test_bytes_after_the_message_are_refused(message: Message) -> None:
    assert _receive(type(message), pack(message) + b"\0") is None


@pytest.mark.slow
@every_kind
@given(data=st.data())
def test_the_right_keys_with_wrong_values_are_read_or_refused(
    kind: type[Message], data: st.DataObject
) -> None:
    example = next(message for message in EXAMPLES.values() if type(message) is kind)
    body = msgpack.unpackb(pack(example))
    for key in data.draw(st.lists(st.sampled_from(sorted(body)), min_size=1, max_size=3)):
        body[key] = data.draw(_VALUES)
    _receive(kind, msgpack.packb(body))


@given(data=st.data())
def test_a_tensor_header_with_wrong_values_is_read_or_refused(data: st.DataObject) -> None:
    body = msgpack.unpackb(pack(batch(data.draw(st.sampled_from(SCALAR)))))
    tensor = body["activations"]
    sizes = st.lists(st.integers(-2, 7) | st.sampled_from([2**31, 2**63, 2**64 - 1]), max_size=6)
    tensor["shape"] = data.draw(sizes | st.permutations(tensor["shape"]))
    tensor["codec"] = data.draw(st.sampled_from([codec.value for codec in Codec]) | st.text(max_size=3))
    _receive(ActivationBatch, msgpack.packb(body))


@every_kind
def test_keys_of_a_newer_version_are_stepped_over(kind: type[Message]) -> None:
    for example in (message for message in EXAMPLES.values() if type(message) is kind):
        body = {"a": [1, {"b": None}], **msgpack.unpackb(pack(example)), "zz": b"new", "v": 7}
        assert unpack(kind, msgpack.packb(body)) == example


def test_a_newer_field_inside_a_nested_type_is_stepped_over() -> None:
    body = msgpack.unpackb(pack(batch()))
    body["activations"]["rotation"] = "hadamard"
    assert unpack(ActivationBatch, msgpack.packb(body)) == batch()


@every_kind
def test_a_missing_required_key_is_refused_and_named(kind: type[Message]) -> None:
    example = next(message for message in EXAMPLES.values() if type(message) is kind)
    for field in msgspec.structs.fields(kind):
        body = msgpack.unpackb(pack(example))
        body.pop(field.name, None)  # what is absent is not written
        if field.required:
            with pytest.raises(DecodeError, match=field.name):
                unpack(kind, msgpack.packb(body))
        else:
            _receive(kind, msgpack.packb(body))


def test_an_older_message_without_optional_fields_takes_their_defaults() -> None:
    assert unpack(Telemetry, msgpack.packb({"v": 1, "stream": STREAM})) == Telemetry(stream=STREAM)


@pytest.mark.parametrize("version", [None, 0, -1, "1", 1.5, True, 2**64 - 1, [], {}])
def test_the_schema_version_is_a_positive_integer(version: Any) -> None:
    body = {**msgpack.unpackb(pack(EXAMPLES["flow"])), "v": version}
    if version == 2**64 - 1:
        assert _receive(KINDS["Flow"], msgpack.packb(body)) is not None
    else:
        assert _receive(KINDS["Flow"], msgpack.packb(body)) is None


def test_a_message_without_a_version_is_refused() -> None:
    with pytest.raises(DecodeError, match="`v`"):
        unpack(Receipt, msgpack.packb({"stream": STREAM, "upto": 1}))


@pytest.mark.parametrize("body", [None, 1, "x", [], [1, STREAM], b"", 1.5])
def test_what_is_no_map_is_refused(body: Any) -> None:
    assert _receive(Receipt, msgpack.packb(body)) is None


@pytest.mark.parametrize(
    "hostile",
    [
        {"upto": 2**63},
        {"upto": -1},
        {"upto": 1.0},
        {"upto": "1"},
        {"upto": True},
        {"stream": STREAM.upper()},
        {"stream": STREAM + "\n"},
        {"stream": "٣" * 32},
        {"stream": STREAM.encode()},
        {"reason": "x" * 513},
        {"reason": None},
    ],
)
def test_a_value_outside_its_promise_is_refused(hostile: dict[str, Any]) -> None:
    assert _receive(Receipt, msgpack.packb({"v": 1, "stream": STREAM, "upto": 1, **hostile})) is None


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"])
def test_text_that_is_not_utf_8_is_refused(text: bytes) -> None:
    payload = msgpack.packb({"v": 1, "stream": STREAM, "upto": 1, "reason": "A" * len(text)})
    assert _receive(Receipt, payload.replace(b"A" * len(text), text)) is None


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("field", ["forward_seconds", "accuracy"])
def test_numbers_that_would_poison_a_mean_are_refused(field: str, number: float) -> None:
    assert _receive(Telemetry, msgpack.packb({"v": 1, "stream": STREAM, field: number})) is None


@pytest.mark.parametrize("key", [b"upto", 1, None, 1.5])
def test_keys_that_are_not_text_are_refused(key: Any) -> None:
    payload = msgpack.packb({"v": 1, "stream": STREAM, "upto": 1, key: 2})
    assert _receive(Receipt, payload) is None


def test_of_a_key_twice_the_last_counts_on_every_read() -> None:
    payload = b"\x84" + msgpack.packb({"v": 1, "stream": STREAM, "upto": 1})[1:] + b"\xa4upto\x02"
    assert _receive(Receipt, payload) == Receipt(stream=STREAM, upto=2)


def test_extension_types_are_no_values() -> None:
    body = {"v": 1, "stream": STREAM, "upto": msgpack.ExtType(5, b"")}
    assert _receive(Receipt, msgpack.packb(body)) is None
    assert _receive(Receipt, msgpack.packb({**body, "upto": msgpack.Timestamp(1)})) is None


def test_an_error_repeats_little_of_what_was_sent() -> None:
    body = {"v": 1, "state": "\x1b[2J\n" + "x" * 100_000, "birth": 1, "stream": STREAM}
    with pytest.raises(DecodeError) as failure:
        unpack(Status, msgpack.packb(body))
    assert len(str(failure.value)) < 300 and str(failure.value).isprintable()


def test_a_payload_over_the_limit_is_not_even_looked_at() -> None:
    with pytest.raises(DecodeError, match="at most"):
        unpack(Receipt, bytes(MAX_MESSAGE_BYTES + 1))


def _array(items: list[bytes]) -> bytes:
    return b"\xdd" + len(items).to_bytes(4, "big") + b"".join(items)


_EMPTY_LISTS = _array([_array([b"\x90"] * 4000)] * 450)
_MANY_KEYS = b"\xdf" + (200_000).to_bytes(4, "big") + b"".join(b"\xa6%06d\xc0" % n for n in range(200_000))
_BOMBS: dict[str, bytes] = {
    "a million empty lists": _EMPTY_LISTS,
    "lists in lists": b"\x91" * 1_900_000,
    "maps in maps": b"\x81\xa1x" * 600_000,
    "many keys": _MANY_KEYS,
    "many short strings": _array([b"\xa2ab"] * 600_000),
    "a list said to be endless": b"\xdd\xff\xff\xff\xff",
    "a map said to be endless": b"\xdf\xff\xff\xff\xff",
    "a text said to be endless": b"\xdb\xff\xff\xff\xff",
    "a bin said to be endless": b"\xc6\xff\xff\xff\xff",
    "an extension said to be endless": b"\xc9\xff\xff\xff\xff\x05",
}


@pytest.mark.parametrize("bomb", _BOMBS.values(), ids=_BOMBS)
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (ActivationBatch, "later"),
        (ActivationBatch, "taps"),
        (ActivationBatch, "samples"),
        (ActivationBatch, "activations"),
        (Plan, "labels"),
        (Plan, "tiers"),
        (Status, "labels"),
    ],
)
def test_a_bomb_costs_no_more_than_a_few_times_its_size(kind: type[Message], key: str, bomb: bytes) -> None:
    example = (
        batch()
        if kind is ActivationBatch
        else plan()
        if kind is Plan
        else EXAMPLES["status online, with a certificate"]
    )
    body = msgpack.unpackb(pack(example))
    body.pop(key, None)
    head = msgpack.packb(body)
    payload = (
        b"\xde" + (len(body) + 1).to_bytes(2, "big") + head[3 if head[0] == 0xDE else 1 :]
        + msgpack.packb(key) + bomb
    )  # fmt: skip
    assert _peak(lambda: _receive(kind, payload)) < 4 * len(payload) + 300_000


def test_a_tensor_of_two_bits_a_value_costs_little_more_than_its_values() -> None:
    values = 6_400_000
    body = msgpack.unpackb(pack(batch()))
    body |= {
        "taps": [1],
        "samples": b"".join(n.to_bytes(4, "little") for n in range(100)),
        "lengths": (100).to_bytes(2, "little") * 100,
        "targets": bytes(200),
        "keys": b"",
        "activations": {
            "codec": "int2",
            "shape": [1, 10_000, values // 10_000],
            "data": bytes(values // 4),
            "scales": bytes(values // 32),
        },
    }
    payload = msgpack.packb(body)
    message = unpack(ActivationBatch, payload)
    assert _peak(lambda: decode(message.activations)) < 3 * 4 * values


def _peak(action: Callable[[], object]) -> int:
    """Bytes allocated at the most while ``action`` runs."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
