"""The enrolment bundle: everything a new device needs, in one file that a password protects. Pure.

Written by ``sidestream fleet add-device``, opened by ``sidestream agent enroll``. The password becomes a key
by scrypt, and that key encrypts and authenticates everything with Fernet (AES-128-CBC and HMAC-SHA256): the
recipe that the ``cryptography`` library gives for passwords. Whoever has the file without the password learns
the device's name, and can neither read nor alter the rest.
"""

from __future__ import annotations

import base64
import os
from typing import Annotated, Final, Literal

import msgspec
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from sidestream.contract.errors import ConfigError, DecodeError
from sidestream.contract.topics import check_name
from sidestream.contract.wire import Message, brief, pack, prepared, unpack

LEAST_PASSWORD_CHARS: Final = 10
MAX_BUNDLE_BYTES: Final = 256 * 1024
_SALT_BYTES: Final = 16
_SCRYPT: Final = {"length": 32, "n": 2**16, "r": 8, "p": 1}  # 64 MiB and a fraction of a second on a Pi

Pem = Annotated[str, msgspec.Meta(min_length=1, max_length=16 * 1024)]


@prepared
class Enrolment(Message, frozen=True, kw_only=True):
    """What a device is given."""

    job: str
    """The job's name."""
    device: str
    """The device's name in the fleet, also its user name at the broker."""
    tier: str
    """Its hardware tier."""
    url: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    """Where the broker is."""
    ca: Pem
    """The certificate of the fleet's authority."""
    certificate: Pem
    """The device's own."""
    key: Pem
    """Its private key."""
    trusted_keys: Pem
    """The trainer's public keys."""

    def __post_init__(self) -> None:
        try:
            for field in ("job", "device", "tier"):
                check_name(field, getattr(self, field))
        except ConfigError as exc:
            raise DecodeError(str(exc)) from exc

    def __repr__(self) -> str:
        return f"Enrolment(job={self.job!r}, device={self.device!r}, tier={self.tier!r})"


@prepared
class _File(msgspec.Struct, frozen=True, kw_only=True):
    """The bundle as it lies on disk."""

    format: Literal["sidestream-enrolment-1"] = "sidestream-enrolment-1"
    device: Annotated[str, msgspec.Meta(max_length=64)]
    salt: Annotated[bytes, msgspec.Meta(min_length=_SALT_BYTES, max_length=_SALT_BYTES)]
    sealed: Annotated[str, msgspec.Meta(max_length=MAX_BUNDLE_BYTES)]


def check_password(password: str) -> str:
    """Return a password that may protect a bundle.

    Raises:
        ConfigError: it is too short.
    """
    if len(password) < LEAST_PASSWORD_CHARS:
        raise ConfigError("password", f"is short; give at least {LEAST_PASSWORD_CHARS} characters")
    return password


def encrypt_enrolment(enrolment: Enrolment, password: str) -> bytes:
    """Write a bundle.

    Raises:
        ConfigError: the password is too short.
    """
    check_password(password)
    salt = os.urandom(_SALT_BYTES)
    sealed = _box(password, salt).encrypt(pack(enrolment)).decode()
    file = _File(device=enrolment.device, salt=salt, sealed=sealed)
    return msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"


def open_enrolment(data: bytes, password: str) -> Enrolment:
    """Read a bundle.

    Raises:
        DecodeError: it is none, it was altered, or the password is not its own.
    """
    if len(data) > MAX_BUNDLE_BYTES:
        raise DecodeError(f"{len(data)} bytes are too many for an enrolment bundle")
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise DecodeError(f"not an enrolment bundle: {brief(exc)}") from exc
    try:
        plain = _box(password, file.salt).decrypt(file.sealed.encode())
    except (InvalidToken, ValueError) as exc:
        raise DecodeError("the password is wrong, or the bundle was altered") from exc
    return unpack(Enrolment, plain)


def _box(password: str, salt: bytes) -> Fernet:
    key = Scrypt(salt=salt, **_SCRYPT).derive(password.encode())
    return Fernet(base64.urlsafe_b64encode(key))
