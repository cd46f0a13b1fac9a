"""An enrolment bundle opens with its own password only, whole and unaltered, and tells nothing else."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_config.enrolment import Enrolment, encrypt_enrolment, open_enrolment
from sidestream.contract.errors import ConfigError, DecodeError

ENROLMENT = Enrolment(
    job="lights",
    device="pi-1",
    tier="pi5",
    url="mqtts://broker:8883",
    ca="CA",
    certificate="CERTIFICATE",
    key="PRIVATE",
    trusted_keys="KEYS",
)
PASSWORD = "correct horse"
BUNDLE = encrypt_enrolment(ENROLMENT, PASSWORD)


def test_a_bundle_is_read_back() -> None:
    assert open_enrolment(BUNDLE, PASSWORD) == ENROLMENT


def test_what_is_in_it_does_not_show() -> None:
    for secret in (b"PRIVATE", b"broker", b"lights", PASSWORD.encode()):
        assert secret not in BUNDLE
    assert "PRIVATE" not in repr(ENROLMENT)
    assert encrypt_enrolment(ENROLMENT, PASSWORD) != BUNDLE, "every bundle has a salt of its own"


@pytest.mark.parametrize("password", ["", "Correct horse", PASSWORD + " "])
def test_another_password_does_not_open_it(password: str) -> None:
    with pytest.raises(DecodeError, match="password is wrong"):
        open_enrolment(BUNDLE, password)


@pytest.mark.slow
def test_an_altered_bundle_does_not_open() -> None:
    fields = msgspec.json.decode(BUNDLE)
    sealed = fields["sealed"]
    for position in (0, 20, len(sealed) // 2, len(sealed) - 3):
        other = "A" if sealed[position] != "A" else "B"
        fields["sealed"] = sealed[:position] + other + sealed[position + 1 :]
        with pytest.raises(DecodeError):
            open_enrolment(msgspec.json.encode(fields), PASSWORD)


@given(st.binary(max_size=200))
def test_foreign_bytes_are_no_bundle(data: bytes) -> None:
    with pytest.raises(DecodeError):
        open_enrolment(data, PASSWORD)


@settings(max_examples=20)
@given(st.integers(0, len(BUNDLE) - 3))
def test_a_bundle_cut_short_is_none(length: int) -> None:
    with pytest.raises(DecodeError):
        open_enrolment(BUNDLE[:length], PASSWORD)


def test_a_short_password_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 10"):
        encrypt_enrolment(ENROLMENT, "short")
