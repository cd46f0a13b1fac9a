"""What each message promises of itself, on whichever end it is made."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from sidestream.contract.errors import DecodeError
from sidestream.contract.messages import MAX_ROWS, ActivationBatch, Status, content_digest, to_bin, with_floor
from sidestream.contract.tasks import TargetForm
from sidestream.contract.tensors import Codec, decode, encode, error_bound
from sidestream.contract.wire import pack, unpack
from tests.contract.examples import EXAMPLES, SCALAR, STREAM, batch, values

BLOCKED = {Codec.INT4, Codec.NF4, Codec.INT2}


def test_arrays_are_read_as_they_were_written() -> None:
    one = unpack(ActivationBatch, pack(batch()))
    assert one.sample_ids.tolist() == [40, 41, 43]
    assert one.row_lengths.tolist() == [2, 1, 3]
    assert one.read_targets().tolist() == [0, 2, 1]


def test_integers_travel_little_endian() -> None:
    assert to_bin([1, 2**32 - 1], "<u4") == b"\x01\0\0\0\xff\xff\xff\xff"


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": b""},
        {"samples": to_bin([40, 41, 43], "<u4")[:-1]},
        {"samples": to_bin([40, 40, 43], "<u4")},
        {"samples": to_bin(range(MAX_ROWS + 1), "<u4")},
        {"lengths": to_bin([2, 1], "<u2")},
        {"lengths": to_bin([2, 2, 3], "<u2")},
        {"lengths": to_bin([3, 0, 3], "<u2")},
        {"targets": to_bin([0, 2], "<u2")},
        {"targets": b""},
        {"floor": 8},
        {"taps": (4, 2)},
        {"taps": (2, 2)},
        {"taps": (0, 4)},
        {"taps": (-1, 4)},
        {"taps": (2,)},
        {"taps": (2, 4, 6)},
        {"stream": "z" * 32},
        {"stream": ""},
        {"keys": bytes(23)},
        {"keys": bytes(24)},
        {"activations": encode(values((6, 5)), Codec.F32)},
        {"activations": encode(values((2, 5, 6)), Codec.F32)},
        {"activations": encode(values((2, 6, 5, 1)), Codec.F32)},
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DecodeError):
        batch(**changes)


@pytest.mark.parametrize(
    "changes", [{"taps": ()}, {"sequence": 0}, {"floor": 0}, {"taps": tuple(range(1, 300))}]
)
def test_a_batch_outside_its_bounds_is_refused_on_arrival(changes: dict[str, Any]) -> None:
    body = msgspec.to_builtins(batch(), builtin_types=(bytes,))
    with pytest.raises(DecodeError):
        unpack(ActivationBatch, msgspec.msgpack.encode({"v": 1, **body, **changes}))


def test_the_largest_batch_fits() -> None:
    one = batch(
        samples=to_bin(np.arange(MAX_ROWS), "<u4"),
        lengths=to_bin(np.ones(MAX_ROWS), "<u2"),
        targets=bytes(2 * MAX_ROWS),
        keys=b"",
        activations=encode(values((2, MAX_ROWS, 8)), Codec.INT4),
    )
    assert unpack(ActivationBatch, pack(one)) == one


def test_a_refusal_names_a_batch_by_its_content_but_for_the_floor() -> None:
    assert content_digest(batch()) == content_digest(batch(floor=1))
    others = [
        batch(sequence=8),
        batch(Codec.INT8),
        batch(targets=to_bin([0, 2, 2], "<u2")),
        batch(previous="b" * 32),
    ]
    assert len({content_digest(one) for one in [batch(), *others]}) == 5
    assert content_digest(unpack(ActivationBatch, pack(batch()))) == content_digest(batch())


@pytest.mark.parametrize("floor", [1, 127, 128, 2**32, 2**62])
def test_a_packed_batch_gets_another_floor_as_if_it_had_been_made_with_it(floor: int) -> None:
    for made_with in (1, 200, 2**40):
        made, wanted = (batch(sequence=2**62, floor=one) for one in (made_with, floor))
        assert with_floor(pack(made), floor) == pack(wanted)
        assert content_digest(pack(made)) == content_digest(wanted)


def test_a_batch_has_the_same_digest_in_every_version() -> None:
    """A device and a trainer of different versions would each take the other's history for another one."""
    assert content_digest(batch()) == "1d9f2dc1dbe514a181251303a4e21c90"


@pytest.mark.parametrize("codec", SCALAR)
@pytest.mark.parametrize("width", [5, 64])
def test_some_rows_of_a_batch_are_what_they_were(codec: Codec, width: int) -> None:
    whole = batch(codec, activations=encode(values((2, 6, width)), codec))
    some = whole.select([0, 2])
    assert some.sample_ids.tolist() == [40, 43] and some.row_lengths.tolist() == [2, 3]
    assert some.read_targets().tolist() == [0, 1]
    assert some.sample_keys == [whole.sample_keys[0], whole.sample_keys[2]]
    kept = decode(whole.activations)[:, [0, 1, 3, 4, 5]]
    bound = error_bound(kept, codec) if width % 64 and codec in BLOCKED else np.zeros_like(kept)
    assert (np.abs(decode(some.activations) - kept) <= bound).all()
    assert content_digest(some) != content_digest(whole)


@pytest.mark.parametrize("form", [TargetForm.TOKENS, TargetForm.TOKEN_LABELS, TargetForm.LABEL_SETS])
def test_some_rows_keep_their_targets_in_whatever_form(form: TargetForm) -> None:
    targets = bytes([1, 2, 3]) if form is TargetForm.LABEL_SETS else to_bin(range(6), "<u2")
    some = batch(target_form=form, targets=targets, sampling="all").select([1])
    assert some.targets == (bytes([2]) if form is TargetForm.LABEL_SETS else to_bin([2], "<u2"))


def test_some_rows_of_a_batch_without_keys_have_none() -> None:
    some = batch(keys=b"").select([0, 2])
    assert some.keys == b"" and some.sample_keys == [] and some.sample_ids.tolist() == [40, 43]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("manifest, inline, unsigned", {"bundle": b"\x00\xff"}),
        ("manifest, inline, unsigned", {"bundle": b""}),
        ("manifest, inline, unsigned", {"chunks": 2}),
        ("manifest of chunks, unsigned", {"chunks": 0}),
        ("manifest of chunks, unsigned", {"run": "1"}),
        ("chunk", {"run": STREAM[:-1]}),
        ("trainer status, unsigned", {"run": ""}),
        ("receipt of a fork", {"stream": STREAM + "0"}),
        ("status online, with a certificate", {"labels": ("on", "on")}),
        ("status online, with a certificate", {"labels": ("",)}),
        ("status online, with a certificate", {"labels": ("x" * 129,)}),
        ("telemetry with troubles", {"accuracy": float("nan")}),
        ("telemetry with troubles", {"temperature_celsius": float("inf")}),
        ("telemetry with troubles", {"receipt_s": float("inf")}),
        ("telemetry with troubles", {"unix_s": float("nan")}),
        ("status online, with a certificate", {"certificate_expires_unix_s": float("nan")}),
        ("query", {"run": "z" * 32}),
        ("query", {"lengths": to_bin([2, 1], "<u2")}),
        ("query", {"lengths": to_bin([6, 0], "<u2")}),
        ("query", {"lengths": to_bin([2, 1, 3], "<u2")[:-1]}),
        ("query", {"states": encode(values((1, 6, 5)), Codec.INT8)}),
        ("query reply, unsigned", {"numbers": None}),
        ("query reply, unsigned", {"refused": "both"}),
        ("query reply, unsigned", {"numbers": encode(values((3,)), Codec.F32)}),
    ],
)
def test_a_message_that_contradicts_itself_is_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(DecodeError):
        msgspec.structs.replace(EXAMPLES[name], **changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("telemetry with troubles", {"accuracy": 1.5}),
        ("telemetry with troubles", {"forward_seconds": -1.0}),
        ("telemetry with troubles", {"bytes_up": 2**63}),
        ("status online, with a certificate", {"state": "asleep"}),
        ("status online, with a certificate", {"width": 65537}),
        ("status online, with a certificate", {"labels": [f"l{n}" for n in range(1025)]}),
        ("flow", {"window": 0}),
        ("chunk", {"index": -1}),
        ("manifest, inline, unsigned", {"bundle_bytes": 0}),
        ("rejection", {"reason": "x" * 513}),
        ("query", {"mark": bytes(15)}),
        ("query", {"place": 64}),
        ("query", {"lengths": b""}),
        ("query", {"lengths": bytes([1, 0]) * 257}),
    ],
)
def test_a_value_outside_its_bounds_is_refused_on_arrival(name: str, changes: dict[str, Any]) -> None:
    body = msgspec.to_builtins(EXAMPLES[name], builtin_types=(bytes,))
    with pytest.raises(DecodeError):
        unpack(type(EXAMPLES[name]), msgspec.msgpack.encode({"v": 1, **body, **changes}))


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Status(state="online", birth=1, stream=STREAM).birth = 2  # type: ignore[misc]
