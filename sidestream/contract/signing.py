"""Signatures on what devices adopt: Ed25519 over the very bytes that travel. Pure.

A signed message ends in two entries, ``key_id`` and ``signature``. The signature covers every byte before its
own, and before those what the message is for: its kind, the job, and the tier where it has one. So nothing is
parsed before it is checked, there is no second way to write the same message, and fields that a later version
adds are covered even where the device does not know them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final, TypeAlias

import msgpack
import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from sidestream.contract.errors import ConfigError, UntrustedError
from sidestream.contract.wire import M, to_map, unpack

MAX_KEYS: Final = 8
PUBLIC_KEY_BYTES: Final = 32
_KEY_ID_CHARS: Final = 16
_SIGNATURE_BYTES: Final = 64
_DOMAIN: Final = b"sidestream signed message 1"
_LABEL: Final = b"\xa6key_id\xb0"  # msgpack: the key, and the head of a string of 16
_MIDDLE: Final = b"\xa9signature\xc4\x40"  # the key, and the head of 64 bytes
_TRAILER: Final = re.compile(
    re.escape(_LABEL) + rb"([0-9a-f]{16})" + re.escape(_MIDDLE) + rb"(.{64})", re.DOTALL
)
_TRAILER_BYTES: Final = len(_LABEL) + _KEY_ID_CHARS + len(_MIDDLE) + _SIGNATURE_BYTES
_PEM_KEY: Final = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)

PublicKey: TypeAlias = Annotated[
    bytes, msgspec.Meta(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)
]
"""The 32 bytes of an Ed25519 public key."""


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What a message is for; a signature for one scope is none for another."""

    kind: str
    """``plan``, ``weights``, ``status``, ``assignment``, ``gradient`` or ``prediction``."""
    job: str
    """The job's name."""
    tier: str = ""
    """The tier; empty where it is for all."""
    device: str = ""
    """The device; empty where it is for a whole tier."""

    def prefix(self) -> bytes:
        """What is signed before the message: each part with its length, so that no two scopes are alike."""
        parts = [_DOMAIN, *(part.encode() for part in (self.kind, self.job, self.tier))]
        parts += [self.device.encode()] if self.device else []
        return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


class Signer:
    """Holds a private key, and never shows it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        """The public half."""

    def __repr__(self) -> str:
        return f"Signer({key_id(self.public)})"

    @classmethod
    def new(cls) -> Signer:
        """Make a key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_pem(cls, pem: bytes, field: str) -> Signer:
        """Read a key.

        Raises:
            ConfigError: naming ``field``, if it is no unencrypted Ed25519 private key.
        """
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
            raise ConfigError(field, "holds no unencrypted private key in PEM") from exc
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(field, "holds a private key that is not Ed25519")
        return cls(key)

    def to_pem(self) -> bytes:
        """The private key, unencrypted: for a file that only its owner can read."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def sign(self, message: M, scope: Scope) -> bytes:
        """Encode a message of a type with ``key_id`` and ``signature``, and sign it."""
        fields = to_map(message)
        assert {"key_id", "signature"} <= fields.keys()
        for last in ("key_id", "signature"):
            del fields[last]
        fields["key_id"], fields["signature"] = key_id(self.public), bytes(_SIGNATURE_BYTES)
        unsigned: bytes = msgpack.packb(fields, use_bin_type=True)[:-_SIGNATURE_BYTES]
        return unsigned + self._key.sign(scope.prefix() + unsigned)


def open_signed(kind: type[M], payload: bytes, scope: Scope, trusted: Iterable[bytes]) -> M:
    """Decode a message that one of the trusted keys signed for this scope.

    Raises:
        UntrustedError: it is not signed, by another key, for something else, or not as it was signed.
        DecodeError: it is signed, but no message of type ``kind``.
    """
    match = _TRAILER.fullmatch(payload[-_TRAILER_BYTES:])
    if match is None:
        raise UntrustedError("it is not signed, or not whole")
    named = match[1].decode()
    public = next((key for key in trusted if key_id(key) == named), None)
    if public is None:
        raise UntrustedError(f"it is signed with key {named}, which this device does not trust")
    try:
        signed = scope.prefix() + payload[:-_SIGNATURE_BYTES]
        Ed25519PublicKey.from_public_bytes(public).verify(match[2], signed)
    except InvalidSignature as exc:
        raise UntrustedError(
            f"it was altered after key {named} signed it, or is another job's or tier's"
        ) from exc
    return unpack(kind, payload)


def key_id(public: bytes) -> str:
    """A short name of a public key: 16 hex digits."""
    return hashlib.sha256(public).hexdigest()[:_KEY_ID_CHARS]


def public_pem(public: bytes) -> bytes:
    """A public key as text, for a file."""
    key = Ed25519PublicKey.from_public_bytes(public)
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def read_public_keys(pem: bytes, field: str) -> tuple[bytes, ...]:
    """All public keys of a PEM file, in its order.

    Raises:
        ConfigError: naming ``field``, if there is none, one is not of Ed25519, or there are more than 8.
    """
    keys = tuple(dict.fromkeys(_public_key(block, field) for block in _PEM_KEY.findall(pem)))
    if not 1 <= len(keys) <= MAX_KEYS:
        raise ConfigError(field, f"holds {len(keys)} public keys in PEM; it takes 1 to {MAX_KEYS}")
    return keys


def _public_key(pem: bytes, field: str) -> bytes:
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise ConfigError(field, "holds a public key that cannot be read") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(field, "holds a public key that is not Ed25519")
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)
