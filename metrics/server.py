"""The scrape endpoint: ``http://host:port/metrics`` on a thread of its own."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from sidestream.contract.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

FIELD: Final = "metrics_port"
NOT_OURS: Final = "this page is served under localhost and 127.0.0.1 only"
REQUEST_S: Final = 10.0
"""So long may a peer take over a request and its answer."""
_MOST: Final = 64
_POLL_S: Final = 0.05


class _Handler(WSGIRequestHandler):
    """Silent."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: scrapes are no news."""


class _Server(ThreadingMixIn, WSGIServer):
    """One short-lived thread a request, and no more of them than a few scrapers need."""

    daemon_threads = True
    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self._since_s: dict[socket.socket, float] = {}
        super().__init__(address, handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether one more is taken on."""
        return len(self._since_s) < _MOST

    def process_request(self, request: Any, client_address: Any) -> None:
        self._since_s[request] = self.clock()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._since_s.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Hang up on whoever takes too long, however little at a time they say or read."""
        for request, since_s in list(self._since_s.items()):
            if self.clock() - since_s > REQUEST_S:
                with contextlib.suppress(OSError):  # it has just gone
                    request.shutdown(socket.SHUT_RDWR)

    def server_bind(self) -> None:
        """Bind without HTTPServer's reverse look-up, which takes seconds on a device without DNS."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Forget a scraper that timed out or hung up."""


class MetricsServer:
    """A running endpoint; close it, or use it as a context manager."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._thread = threading.Thread(
            target=server.serve_forever, args=(_POLL_S,), name="sidestream-metrics", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._server.server_port

    @property
    def url(self) -> str:
        """Where Prometheus, or a browser on this machine, finds it."""
        host = self._server.server_name
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"

    def close(self) -> None:
        """Stop answering and free the port; again does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def is_ours(host: str) -> bool:
    """Whether a request's Host names this machine as only it can.

    Otherwise any web site could have its name point here, and read what is served through a visitor's
    browser.
    """
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    return name.strip("[]").lower() == "localhost" or is_loopback(name.strip("[]"))


def _guarded(app: WSGIApplication) -> WSGIApplication:
    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if is_ours(environ.get("HTTP_HOST", "")):
            return app(environ, start_response)
        start_response("421 Misdirected Request", [("Content-Type", "text/plain")])
        return [NOT_OURS.encode()]

    return guarded


def serve(
    registry: CollectorRegistry,
    port: int,
    host: str = "127.0.0.1",
    *,
    clock: Callable[[], float] = time.monotonic,
) -> MetricsServer:
    """Serve ``registry`` in Prometheus' text format; on a loopback address, under names of loopback only.

    Args:
        registry: What to show.
        port: 0 for any free one.
        host: The address to listen on; ``0.0.0.0`` or ``::`` lets other machines scrape.
        clock: Seconds, to time peers by.

    Raises:
        ConfigError: if the port is in use or not ours to take, or the host is no address of this machine.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(FIELD, f"{port} is no port; write 0 (any free one) to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        server_type = type("_Server", (_Server,), {"address_family": family, "clock": staticmethod(clock)})
        server = server_type((str(address[0]), port), _Handler)
    except (OSError, UnicodeError) as exc:
        raise ConfigError(FIELD, why_not(exc, port, host)) from exc
    app = make_wsgi_app(registry)
    server.set_app(_guarded(app) if is_loopback(str(address[0])) else app)
    return MetricsServer(server)


def why_not(exc: OSError | UnicodeError, port: int, host: str) -> str:
    """Why a host and port cannot be listened on, and what to do."""
    number = getattr(exc, "errno", None)
    if number == errno.EADDRINUSE:
        return f"port {port} is in use; choose another, 0 for any free one"
    if number == errno.EACCES:
        return f"port {port} needs privileges; choose one above 1023"
    return f"cannot listen on {host!r}: {getattr(exc, 'strerror', None) or exc}"
