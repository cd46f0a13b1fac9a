"""The TLS side of a connection: reads the certificate files once, when the connection object is made."""

import ssl
from pathlib import Path

from cryptography import x509

from broker_config.settings import BrokerSettings
from sidestream.contract.errors import ConfigError


class _Socket(ssl.SSLSocket):
    """Closes where its handshake fails: paho lets go of it, open."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except BaseException:
            self.close()
            raise


def tls_context(settings: BrokerSettings) -> ssl.SSLContext:
    """What an ``mqtts://`` connection verifies the broker with, and shows of itself.

    The broker's certificate and host name are always checked; there is no switch to turn that off.

    Raises:
        ConfigError: A file is missing, unreadable or not what it should be; the error names the setting.
    """
    for name in ("ca_file", "cert_file", "key_file"):
        _check_readable(f"broker.{name}", getattr(settings, name))
    try:
        context = ssl.create_default_context(cafile=settings.ca_file or None)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError("broker.ca_file", f"{settings.ca_file} holds no PEM certificates") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = _Socket
    if settings.cert_file:
        try:
            context.load_cert_chain(settings.cert_file, settings.key_file, password=_no_passphrase)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise ConfigError(
                "broker.cert_file",
                f"{settings.cert_file} and {settings.key_file} are not a PEM certificate and its key, "
                "or the key needs a passphrase",
            ) from error
    return context


def certificate_expires_unix_s(settings: BrokerSettings) -> float:
    """When the certificate ends that is shown to the broker; 0 where there is none, or it cannot be read."""
    try:
        pem = Path(settings.cert_file).read_bytes() if settings.cert_file else b""
        return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp() if pem else 0.0
    except (OSError, ValueError):
        return 0.0


def _check_readable(name: str, path: str) -> None:
    if not path:
        return
    try:
        with Path(path).open("rb"):
            pass
    except (OSError, ValueError) as error:
        raise ConfigError(name, f"cannot read {path!r}: {error}") from error


def _no_passphrase() -> str:
    """Keeps OpenSSL from asking for one on the terminal of a service."""
    return ""
