"""How to reach a broker: the ``[broker]`` table of agent.toml and trainer.toml.

Opens nothing: :meth:`BrokerSettings.endpoint` only checks and takes apart. Files are read in
:mod:`broker_config.connection.tls`, sockets opened in
:mod:`broker_config.connection.link`.
"""

import math
import os
from collections.abc import Mapping
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from sidestream.contract.errors import ConfigError
from sidestream.contract.wire import prepared

PASSWORD_VARIABLE = "SIDESTREAM_BROKER_PASSWORD"
USERNAME_VARIABLE = "SIDESTREAM_BROKER_USERNAME"

_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
_URL_SHAPE = "write mqtt://HOST:PORT, or mqtts://HOST:PORT for TLS"
_MASK = "********"


@prepared
class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Broker settings, checked and taken apart."""

    host: str
    """Host name or address, without the brackets of IPv6."""
    port: int
    """TCP port."""
    tls: bool
    """Whether the connection is encrypted (``mqtts://``)."""
    username: str
    """Empty when the client is anonymous."""
    password: str
    """Empty when there is none."""

    def __repr__(self) -> str:
        return f"Endpoint({self.address}, tls={self.tls}, username={self.username!r})"

    @property
    def address(self) -> str:
        """``host:port``, fit for a log line."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@prepared
class BrokerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to reach the broker. Its repr never shows a password."""

    url: str = "mqtt://127.0.0.1:1883"
    """``mqtt://host:port``, or ``mqtts://host:port`` for TLS. ``user:password@`` before the host works, but
    ends up in shell histories and process lists: prefer SIDESTREAM_BROKER_PASSWORD."""
    username: str = ""
    """User name; SIDESTREAM_BROKER_USERNAME overrides it. Empty: the URL's, or anonymous."""
    password: str = ""
    """Password. Better given in the environment, as SIDESTREAM_BROKER_PASSWORD, which overrides this."""
    ca_file: str = ""
    """PEM file of the authorities trusted for the broker's certificate (mqtts only). Empty: the system's."""
    cert_file: str = ""
    """PEM file of this client's certificate (mqtts only); goes with key_file."""
    key_file: str = ""
    """PEM file of this client's private key; goes with cert_file."""
    keepalive_s: int = 30
    """The broker declares us dead after 1.5 times this long in silence, and we it."""
    max_packet_bytes: int = 272 * 1024
    """The largest packet we send, whatever the broker would take. The default holds a 256 KiB message."""
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    """MQTT version; auto tries 5 first and falls back to 3.1.1 where the broker does not speak it."""
    connect_timeout_s: float = 10.0
    """How long one attempt to connect may take, from the first packet to the last subscription."""

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        shown["url"] = masked_url(self.url)
        shown["password"] = _MASK if self.password else ""
        return f"BrokerSettings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def endpoint(self, environ: Mapping[str, str] | None = None) -> Endpoint:
        """Check every setting and say where, and as whom, to connect.

        Args:
            environ: Where the secrets' variables are looked up; the process's environment if None.

        Raises:
            ConfigError: A setting is wrong; the error names it.
        """
        environ = os.environ if environ is None else environ
        self._check_numbers()
        parts = _split(self.url)
        self._check_tls_files(parts.scheme == "mqtts")
        username = environ.get(USERNAME_VARIABLE) or self.username or unquote(parts.username or "")
        password = environ.get(PASSWORD_VARIABLE) or self.password or unquote(parts.password or "")
        if password and not username:
            raise ConfigError("broker.username", "there is a password but no user name; give one")
        return Endpoint(
            host=_host(parts),
            port=_port(parts),
            tls=parts.scheme == "mqtts",
            username=_credential("broker.username", username),
            password=_credential("broker.password", password),
        )

    def _check_numbers(self) -> None:
        _check_range("broker.keepalive_s", self.keepalive_s, 1, 65535)
        _check_range("broker.max_packet_bytes", self.max_packet_bytes, 1024, 256 * 1024 * 1024)
        _check_range("broker.connect_timeout_s", self.connect_timeout_s, 0.1, 3600)
        if self.protocol not in ("auto", "5", "3.1.1"):
            raise ConfigError("broker.protocol", f'is "auto", "5" or "3.1.1", not {self.protocol!r}')

    def _check_tls_files(self, tls: bool) -> None:
        given = [name for name in ("ca_file", "cert_file", "key_file") if getattr(self, name)]
        if given and not tls:
            raise ConfigError("broker.url", f"starts with mqtt://, but {given[0]} needs mqtts://")
        if bool(self.cert_file) != bool(self.key_file):
            missing = "key_file" if self.cert_file else "cert_file"
            raise ConfigError(f"broker.{missing}", "cert_file and key_file go together; give both or neither")


def masked_url(url: str) -> str:
    """The URL without the password in it, fit for a log line."""
    scheme, separator, rest = url.partition("://")
    userinfo, at, host = rest.rpartition("@")
    if not at or ":" not in userinfo:
        return url
    return f"{scheme}{separator}{userinfo.partition(':')[0]}:{_MASK}@{host}"


def _split(url: str) -> SplitResult:
    if not url.isprintable() or " " in url:
        raise ConfigError("broker.url", f"has spaces or control characters; {_URL_SHAPE}")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError("broker.url", f"is not a URL ({error}); {_URL_SHAPE}") from error
    if parts.scheme not in _DEFAULT_PORTS:
        raise ConfigError("broker.url", f"{masked_url(url)!r} does not start with mqtt://; {_URL_SHAPE}")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigError("broker.url", f"ends in more than a host and a port; {_URL_SHAPE}")
    return parts


def _host(parts: SplitResult) -> str:
    host = parts.hostname or ""
    if not host:
        raise ConfigError("broker.url", f"names no host; {_URL_SHAPE}")
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise ConfigError("broker.url", f"{host!r} is not a host name; {_URL_SHAPE}") from error
    return host


def _port(parts: SplitResult) -> int:
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError("broker.url", f"the port is a number from 1 to 65535; {_URL_SHAPE}") from error
    if port == 0:
        raise ConfigError("broker.url", f"port 0 cannot be connected to; {_URL_SHAPE}")
    return port or _DEFAULT_PORTS[parts.scheme]


def _credential(name: str, text: str) -> str:
    try:
        size = len(text.encode())
    except UnicodeError as error:
        raise ConfigError(name, "is not valid text; use characters that UTF-8 can write") from error
    if size > 65535:
        raise ConfigError(name, "is longer than MQTT allows (65535 bytes); shorten it")
    return text


def _check_range(name: str, value: float, lowest: float, highest: float) -> None:
    if not (math.isfinite(value) and lowest <= value <= highest):
        raise ConfigError(name, f"is {value:g}; it must be from {lowest:g} to {highest:g}")
