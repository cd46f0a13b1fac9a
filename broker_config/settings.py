"""How to reach a broker: the ``[broker]`` table of agent.toml and trainer.toml.

Opens nothing: :meth:`BrokerSettings.endpoint` only checks and takes apart. Files are read in
:mod:`broker_config.connection.tls`, sockets opened in
:mod:`broker_config.connection.link`.
"""

import math
import os
from collections.abc import Mapping
from ipaddress import IPv6Address
from typing import Literal, NamedTuple
from urllib.parse import quote, unquote

import msgspec

from sidestream.contract.errors import ConfigError
from sidestream.contract.wire import prepared

PASSWORD_VARIABLE = "SIDESTREAM_BROKER_PASSWORD"
USERNAME_VARIABLE = "SIDESTREAM_BROKER_USERNAME"

_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
_TLS = ("mqtts", "wss")
_WEB_SOCKETS = ("ws", "wss")
_URL_SHAPE = "write mqtt://HOST:PORT, or mqtts://HOST:PORT for TLS; ws:// and wss:// for web sockets"
_WEB_PATH = "/mqtt"
_MOST_PREFIX = 1024
_MASK = "********"


@prepared
class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Broker settings, checked and taken apart."""

    host: str
    """Host name or address, without the brackets of IPv6."""
    port: int
    """TCP port."""
    tls: bool
    """Whether the connection is encrypted (``mqtts://``, ``wss://``)."""
    username: str
    """Empty when the client is anonymous."""
    password: str
    """Empty when there is none."""
    web_path: str = ""
    """Of a connection through web sockets, its path; empty for plain MQTT."""
    topic_prefix: str = ""
    """Levels before every topic; empty for none."""

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
    """``mqtt://host:port``, or ``mqtts://host:port`` for TLS; ``ws://`` and ``wss://host:port/path`` through
    web sockets; ``[…]`` round an IPv6 address. ``mqtts://host/prefix`` puts a prefix before all topics.
    ``user:password@`` before the host works, with whatever is in them (a % is written %25), but ends up in
    shell histories and process lists: prefer SIDESTREAM_BROKER_PASSWORD."""
    topic_prefix: str = ""
    """Levels before every topic, such as tenants/17, for brokers that give a client only a part of the tree;
    the same on trainer and devices. Empty: the URL's, or none."""
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
        self._check_tls_files(parts.scheme)
        username = environ.get(USERNAME_VARIABLE) or self.username or parts.username
        password = environ.get(PASSWORD_VARIABLE) or self.password or parts.password
        if password and not username:
            raise ConfigError("broker.username", "there is a password but no user name; give one")
        web = parts.scheme in _WEB_SOCKETS
        return Endpoint(
            host=_host(parts.host),
            port=_port(parts),
            tls=parts.scheme in _TLS,
            username=_credential("broker.username", username),
            password=_credential("broker.password", password),
            web_path=(quote(parts.path, safe="/?=&%") or _WEB_PATH) if web else "",
            topic_prefix=_prefix(self.topic_prefix or ("" if web else unquote(parts.path))),
        )

    def _check_numbers(self) -> None:
        _check_range("broker.keepalive_s", self.keepalive_s, 1, 65535)
        _check_range("broker.max_packet_bytes", self.max_packet_bytes, 1024, 256 * 1024 * 1024)
        _check_range("broker.connect_timeout_s", self.connect_timeout_s, 0.1, 3600)
        if self.protocol not in ("auto", "5", "3.1.1"):
            raise ConfigError("broker.protocol", f'is "auto", "5" or "3.1.1", not {self.protocol!r}')

    def _check_tls_files(self, scheme: str) -> None:
        given = [name for name in ("ca_file", "cert_file", "key_file") if getattr(self, name)]
        if given and scheme not in _TLS:
            raise ConfigError("broker.url", f"starts with {scheme}://, but {given[0]} needs {scheme}s://")
        if bool(self.cert_file) != bool(self.key_file):
            missing = "key_file" if self.cert_file else "cert_file"
            raise ConfigError(f"broker.{missing}", "cert_file and key_file go together; give both or neither")


class _Parts(NamedTuple):
    """A URL, taken apart and not checked. User name and password are decoded."""

    scheme: str
    username: str
    password: str
    host: str
    port: str
    path: str


def masked_url(url: str) -> str:
    """The URL without the password in it, fit for a log line."""
    scheme, separator, rest = url.partition("://")
    userinfo, at, host = rest.rpartition("@")
    if not at or ":" not in userinfo:
        return url
    return f"{scheme}{separator}{userinfo.partition(':')[0]}:{_MASK}@{host}"


def _split(url: str) -> _Parts:
    """Take a URL apart; the last @ ends the user's part, whatever is in it."""
    if not url.isprintable() or " " in url:
        raise ConfigError("broker.url", f"has spaces or control characters; {_URL_SHAPE}")
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in _DEFAULT_PORTS:
        raise ConfigError("broker.url", f"{masked_url(url)!r} does not start with mqtt://; {_URL_SHAPE}")
    userinfo, _, rest = rest.rpartition("@")
    username, _, password = userinfo.partition(":")
    place, slash, path = rest.partition("/")
    host, port = _host_and_port(place)
    path = f"{slash}{path}" if path.strip("/") else ""
    if "#" in rest or ("?" in rest and scheme.lower() not in _WEB_SOCKETS):
        raise ConfigError("broker.url", f"ends in more than a host, a port and a path; {_URL_SHAPE}")
    return _Parts(scheme.lower(), unquote(username), unquote(password), host, port, path)


def _host_and_port(place: str) -> tuple[str, str]:
    if place.startswith("["):
        host, closed, after = place[1:].partition("]")
        if not closed or ":" not in host or (after and not after.startswith(":")):
            raise ConfigError("broker.url", f"has an IPv6 address that is not in [ ]; {_URL_SHAPE}")
        return host, after.removeprefix(":")
    if place.count(":") > 1:
        raise ConfigError(
            "broker.url", f"has more than one colon: an IPv6 address stands in [ ]; {_URL_SHAPE}"
        )
    host, _, port = place.partition(":")
    return host, port


def _host(host: str) -> str:
    if not host:
        raise ConfigError("broker.url", f"names no host; {_URL_SHAPE}")
    try:
        if ":" in host:
            IPv6Address(host)
        else:
            host.encode("idna")
    except ValueError as error:  # Unicode's errors are such
        raise ConfigError("broker.url", f"{host!r} is not a host name; {_URL_SHAPE}") from error
    if set(host) & set('[]%?#\\"<>^`{}|') and ":" not in host:
        raise ConfigError("broker.url", f"{host!r} is not a host name; {_URL_SHAPE}")
    return host


def _port(parts: _Parts) -> int:
    if not parts.port:
        return _DEFAULT_PORTS[parts.scheme]
    if not (parts.port.isascii() and parts.port.isdecimal() and 0 <= int(parts.port[:6]) <= 65535):
        raise ConfigError("broker.url", f"the port is a number from 1 to 65535; {_URL_SHAPE}")
    if int(parts.port) == 0:
        raise ConfigError("broker.url", f"port 0 cannot be connected to; {_URL_SHAPE}")
    return int(parts.port)


def _prefix(text: str) -> str:
    """Checked, without slashes at its ends."""
    prefix = text.strip("/")
    if not prefix:
        return ""
    bad = (
        "" in prefix.split("/")
        or prefix.startswith("$")
        or not prefix.isprintable()
        or set(prefix) & set("+#")
    )
    if bad or len(prefix) > _MOST_PREFIX:
        raise ConfigError(
            "broker.topic_prefix",
            f"{prefix[:80]!r} cannot stand before topics; write levels such as tenants/17",
        )
    return prefix


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
