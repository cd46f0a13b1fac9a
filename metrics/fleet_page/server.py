"""The fleet page: ``http://host:port/``, read-only, from files that come with the product.

A small web application (Starlette) on a thread with an event loop of its own (uvicorn), so that no peer, slow
or silent, costs a thread. It asks the board and nobody else.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.resources
import socket
import threading
from types import TracebackType
from typing import Final

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from metrics.fleet_page.board import Board
from metrics.server import NOT_OURS, REQUEST_S, is_loopback, is_ours, why_not
from sidestream.contract.errors import ConfigError

_FILES: Final = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "chart.js": "text/javascript",
    "fleet.js": "text/javascript",
    "format.js": "text/javascript",
    "table.js": "text/javascript",
    "address.js": "text/javascript",
    "device.js": "text/javascript",
    "trouble.js": "text/javascript",
    "help.html": "text/html",
    "icon.svg": "image/svg+xml",
}
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_CLOSE_S: Final = 5.0


class PortInUseError(ConfigError):
    """Somebody else has the page's port: a page is no reason not to train."""


class _Guarded:
    """Adds the headers; answers a loopback page under this machine's own names only."""

    def __init__(self, app: ASGIApp, loopback: bool) -> None:
        self._app = app
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        app = self._app
        if self._loopback and not is_ours(Headers(scope=scope).get("host", "")):
            app = PlainTextResponse(NOT_OURS, 421)
        await app(scope, receive, guarded)


def application(board: Board, *, loopback: bool = True) -> Starlette:
    """The page's routes: its files, ``api/fleet``, and ``api/device?tier=…&name=…``."""
    folder = importlib.resources.files("metrics.fleet_page") / "page"
    contents = {name: (folder / name).read_bytes() for name in _FILES}

    async def fleet(request: Request) -> Response:
        since = request.query_params.get("since", "")
        view = board.view(
            board=request.query_params.get("board", ""),
            since=int(since) if since.isdecimal() and len(since) < 16 else 0,
        )
        return Response(msgspec.json.encode(view), media_type="application/json")

    async def device(request: Request) -> Response:
        named = request.query_params
        detail = board.detail(named.get("tier", ""), named.get("name", ""))
        return Response(msgspec.json.encode(detail), media_type="application/json")

    async def file(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in contents:
            return PlainTextResponse("there is no such page", 404)
        return Response(contents[name], media_type=_FILES[name])

    return Starlette(
        routes=[
            Route("/", file),
            Route("/api/fleet", fleet),
            Route("/api/device", device),
            Route("/{name}", file),
        ],
        middleware=[Middleware(_Guarded, loopback=loopback), Middleware(GZipMiddleware, compresslevel=1)],
    )


class _Timed(H11Protocol):
    """Hangs up on a peer that takes too long over a request and its answer, and would keep its place."""

    request_s = REQUEST_S
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        self._begin()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._end()
        super().on_response_complete()
        if not self.cycle.response_complete:  # the next request was there already
            self._begin()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # the answer is not read
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def _begin(self) -> None:
        self._deadline = self._deadline or self.loop.call_later(self.request_s, self.transport.abort)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None


class PageServer:
    """A running page; close it, or use it as a context manager."""

    def __init__(self, app: Starlette, listening: socket.socket, request_s: float) -> None:
        self._socket = listening
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            loop="asyncio",
            http=type("_Timed", (_Timed,), {"request_s": request_s}),
            ws="none",
            limit_concurrency=64,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([listening],), name="sidestream-page", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        host, port = self._socket.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def close(self) -> None:
        """Stop answering and free the port; again does nothing."""
        self._server.should_exit = True
        self._thread.join(_CLOSE_S)
        self._socket.close()

    def __enter__(self) -> PageServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve_page(
    board: Board, port: int, host: str = "127.0.0.1", *, request_s: float = REQUEST_S
) -> PageServer:
    """Serve the page.

    Args:
        board: What to show.
        port: 0 for any free one.
        host: The address to listen on. Anything but loopback is open to whoever reaches it: there are no
            passwords.
        request_s: So long may a peer take over a request and its answer.

    Raises:
        PortInUseError: if the port is taken.
        ConfigError: if the port is not ours to take, or the host is no address of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(128)
        except BaseException:
            listening.close()
            raise
    except (OSError, UnicodeError) as exc:
        number = getattr(exc, "errno", None)
        if number == errno.EADDRINUSE:
            raise PortInUseError("page_port", why_not(exc, port, host)) from exc
        field = "page_port" if number == errno.EACCES else "page_host"
        raise ConfigError(field, why_not(exc, port, host)) from exc
    return PageServer(application(board, loopback=is_loopback(str(address[0]))), listening, request_s)
