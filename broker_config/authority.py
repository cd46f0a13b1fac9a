"""A fleet's own certificate authority: who is who at its broker. X.509, P-256; touches no file.

The common name of a certificate is its holder's user name at the broker. The authority signs for a fleet and
nothing else: its certificate allows no authority below it, and lists which certificates it has revoked.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sidestream.contract.errors import ConfigError, StateError

AUTHORITY_DAYS: Final = 20 * 365
LEAF_DAYS: Final = 5 * 365
_SLACK: Final = datetime.timedelta(days=1)  # of clocks: a board may come up in the past
_USAGES: Final = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


class Identity(NamedTuple):
    """A certificate and its private key, in PEM."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Identity(…)"

    @property
    def serial(self) -> int:
        """What the certificate is revoked by."""
        return x509.load_pem_x509_certificate(self.certificate).serial_number

    @property
    def expires(self) -> datetime.datetime:
        """When the certificate ends."""
        return x509.load_pem_x509_certificate(self.certificate).not_valid_after_utc


class Authority:
    """Signs certificates and lists of revoked ones.

    Args:
        identity: The authority's own.

    Raises:
        StateError: that is no certificate and its key.
    """

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        try:
            self._certificate = x509.load_pem_x509_certificate(identity.certificate)
            key = load_pem_private_key(identity.key, password=None)
        except (ValueError, TypeError) as exc:
            raise StateError("the fleet's authority is damaged: its certificate or key is no PEM") from exc
        if not isinstance(key, EllipticCurvePrivateKey):
            raise StateError("the fleet's authority is damaged: its key is of another kind")
        self._key = key

    @classmethod
    def new(cls, name: str) -> Authority:
        """Make one."""
        key = generate_private_key(SECP256R1())
        builder = _builder(_name(name), _name(name), key, AUTHORITY_DAYS)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        builder = builder.add_extension(_key_id(key), critical=False)
        return cls(_identity(builder.sign(key, hashes.SHA256()), key))

    def broker(self, hosts: Sequence[str]) -> Identity:
        """A certificate for the broker.

        Args:
            hosts: Every name and address that devices reach it by.

        Raises:
            ConfigError: one is neither.
        """
        alternatives = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
        return self._issue(hosts[0], ExtendedKeyUsageOID.SERVER_AUTH, alternatives)

    def client(self, name: str) -> Identity:
        """A certificate for a device or the trainer, whose user name is ``name``."""
        return self._issue(name, ExtendedKeyUsageOID.CLIENT_AUTH, None)

    def revocations(self, serials: Iterable[int]) -> bytes:
        """The list of revoked certificates, in PEM.

        It ends with the authority: OpenSSL, and so Mosquitto, lets nobody in once a list is out of date.
        """
        now = _now()
        builder = x509.CertificateRevocationListBuilder(
            issuer_name=self._certificate.subject,
            last_update=now - _SLACK,
            next_update=self._certificate.not_valid_after_utc,
        )
        for serial in serials:
            revoked = x509.RevokedCertificateBuilder(serial_number=serial, revocation_date=now).build()
            builder = builder.add_revoked_certificate(revoked)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def _issue(
        self, name: str, use: x509.ObjectIdentifier, alternatives: x509.SubjectAlternativeName | None
    ) -> Identity:
        key = generate_private_key(SECP256R1())
        builder = _builder(_name(name), self._certificate.subject, key, LEAF_DAYS)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage("digital_signature"), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        builder = builder.add_extension(_key_id(key), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        if alternatives is not None:
            builder = builder.add_extension(alternatives, critical=False)
        return _identity(builder.sign(self._key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = _now()
    return x509.CertificateBuilder(
        subject_name=subject,
        issuer_name=issuer,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _SLACK,
        not_valid_after=now + datetime.timedelta(days=days),
    )


def _identity(certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> Identity:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Identity(certificate.public_bytes(Encoding.PEM), private)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _usage(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in allowed for usage in _USAGES})


def _key_id(key: EllipticCurvePrivateKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key.public_key())


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode())
    except (UnicodeError, ValueError) as exc:
        raise ConfigError("--host", f"{host!r} is neither a host name nor an address") from exc


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
