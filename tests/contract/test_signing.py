"""Only what a trusted key signed, for this job and tier, and every byte of it, is opened."""

from __future__ import annotations

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from sidestream.contract.errors import ConfigError, DecodeError, UntrustedError
from sidestream.contract.messages import WeightsManifest
from sidestream.contract.plan import Plan
from sidestream.contract.signing import (
    MAX_KEYS,
    Scope,
    Signer,
    key_id,
    open_signed,
    public_pem,
    read_public_keys,
)
from sidestream.contract.wire import pack, unpack
from tests.contract.examples import SIGNED, SIGNER, plan

SCOPE = Scope(kind="plan", job="assist")
SEALED = SIGNER.sign(plan(), SCOPE)
MANIFEST = SIGNED["weights"][0]
TRUSTED = [SIGNER.public]


def test_what_is_signed_is_read_back_with_the_name_of_its_key() -> None:
    read = open_signed(Plan, SEALED, SCOPE, TRUSTED)
    assert read.key_id == key_id(SIGNER.public) and read.tiers == plan().tiers
    assert unpack(Plan, SEALED) == read, "who checks no signature reads the same"


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_no_byte_can_be_altered(position: int, change: int) -> None:
    altered = bytearray(SEALED)
    altered[position] ^= change
    with pytest.raises(UntrustedError):
        open_signed(Plan, bytes(altered), SCOPE, TRUSTED)


@given(st.integers(0, len(SEALED) - 1), st.binary(max_size=40))
def test_nothing_can_be_cut_off_or_put_behind(length: int, more: bytes) -> None:
    with pytest.raises(UntrustedError):
        open_signed(Plan, SEALED[:length] + more, SCOPE, TRUSTED)
    with pytest.raises(UntrustedError):
        open_signed(Plan, SEALED + b"\0" + more, SCOPE, TRUSTED)


@given(st.binary(max_size=300))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(UntrustedError):
        open_signed(Plan, data, SCOPE, TRUSTED)


@pytest.mark.parametrize(
    "other",
    [
        Scope(kind="weights", job="assist"),
        Scope(kind="plan", job="assist2"),
        Scope(kind="plan", job="assist", tier="full"),
        Scope(kind="plan", job="", tier="assist"),
    ],
)
def test_a_signature_for_one_thing_is_none_for_another(other: Scope) -> None:
    with pytest.raises(UntrustedError, match="another job"):
        open_signed(Plan, SEALED, other, TRUSTED)


def test_one_tiers_weights_are_not_anothers() -> None:
    sealed = SIGNER.sign(MANIFEST, Scope(kind="weights", job="assist", tier="full"))
    with pytest.raises(UntrustedError):
        open_signed(WeightsManifest, sealed, Scope(kind="weights", job="assist", tier="half"), TRUSTED)


def test_an_unsigned_message_and_one_of_another_key_are_told_apart() -> None:
    with pytest.raises(UntrustedError, match="not signed"):
        open_signed(Plan, pack(plan()), SCOPE, TRUSTED)
    with pytest.raises(
        UntrustedError, match=f"key {key_id(SIGNER.public)}, which this device does not trust"
    ):
        open_signed(Plan, SEALED, SCOPE, [Signer.new().public])


def test_claiming_a_trusted_key_does_not_make_a_signature() -> None:
    stranger = Signer.new()
    forged = stranger.sign(plan(), SCOPE).replace(
        key_id(stranger.public).encode(), key_id(SIGNER.public).encode()
    )
    with pytest.raises(UntrustedError):
        open_signed(Plan, forged, SCOPE, TRUSTED)


def test_fields_of_a_later_version_are_covered_and_stepped_over() -> None:
    fields = msgpack.unpackb(pack(plan()))
    for last in ("key_id", "signature"):
        del fields[last]
    later = msgpack.packb(
        {**fields, "colour": "blue", "key_id": key_id(SIGNER.public), "signature": bytes(64)}
    )[:-64]
    sealed = later + SIGNER._key.sign(SCOPE.prefix() + later)
    assert open_signed(Plan, sealed, SCOPE, TRUSTED).job == "assist"
    with pytest.raises(UntrustedError):
        open_signed(Plan, sealed.replace(b"blue", b"teal"), SCOPE, TRUSTED)


def test_a_signed_message_of_another_type_is_no_plan() -> None:
    with pytest.raises(DecodeError):
        open_signed(Plan, SIGNER.sign(MANIFEST, SCOPE), SCOPE, TRUSTED)


def test_keys_go_through_files() -> None:
    other = Signer.new()
    both = public_pem(SIGNER.public) + b"a note\n" + public_pem(other.public) + public_pem(other.public)
    assert read_public_keys(both, "keys") == (SIGNER.public, other.public)
    assert Signer.from_pem(other.to_pem(), "key").public == other.public


def test_a_file_that_holds_no_fitting_key_is_refused_by_its_setting() -> None:
    foreign = generate_private_key(SECP256R1())
    pem = foreign.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for data in (b"", b"nonsense", public_pem(SIGNER.public), pem):
        with pytest.raises(ConfigError, match=r"signing\.key_file"):
            Signer.from_pem(data, "signing.key_file")
    too_many = b"".join(public_pem(Signer.new().public) for _ in range(MAX_KEYS + 1))
    for data in (b"", SIGNER.to_pem(), public_pem(SIGNER.public)[:60], too_many):
        with pytest.raises(ConfigError, match="trusted"):
            read_public_keys(data, "trusted")


def test_a_private_key_never_shows() -> None:
    assert repr(SIGNER) == f"Signer({key_id(SIGNER.public)})"
