"""Questions over HTTP, of programs on this machine: ``POST /predict`` and ``GET /health``."""

from __future__ import annotations

import base64
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final

import msgspec

from edge_agent.serving.predictions import Predictions
from metrics.server import NOT_OURS, is_loopback, is_ours, why_not
from sidestream.contract.errors import ConfigError, DataError, SidestreamError

MOST_BYTES: Final = 1024 * 1024
"""Of a question."""
_SILENT_S: Final = 30.0


def asked_in(body: bytes) -> list[Any]:
    """The texts of a question, a pair of texts being a list of two; or images, the bytes of each in base64.

    Raises:
        ValueError: it is none.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError('a question is JSON: {"texts": ["…"]}') from None
    if isinstance(asked, dict) and isinstance(images := asked.get("images"), list):
        return [_image(image) for image in images]
    texts = asked.get("texts") if isinstance(asked, dict) else None
    if not isinstance(texts, list):
        raise ValueError('a question is an object with a list: {"texts": ["…"]}')
    return [tuple(text) if isinstance(text, list) else text for text in texts]


def _image(said: object) -> bytes:
    try:
        return base64.b64decode(str(said), validate=True)
    except ValueError:
        raise ValueError('an image is a file\'s bytes in base64: {"images": ["…"]}') from None


def answer_to(predictions: Predictions, body: bytes) -> tuple[int, bytes]:
    """The HTTP status and the JSON for a question."""
    try:
        version, answers = predictions.ask(asked_in(body))
    except (ValueError, TypeError, DataError) as exc:
        return 400, msgspec.json.encode({"error": str(exc)})
    except SidestreamError as exc:
        return 503, msgspec.json.encode({"error": str(exc)})
    return 200, msgspec.json.encode({"version": version, "answers": answers})


class PredictionServer:
    """Serves until it is closed; a context manager.

    Raises:
        ConfigError: the port is taken, or the host is no address of this machine.
    """

    def __init__(self, predictions: Predictions, port: int, host: str = "127.0.0.1") -> None:
        handler = type("Handler", (_Handler,), {"predictions": predictions, "loopback": is_loopback(host)})
        try:
            self._server = _Server((host, port), handler)
        except OSError as exc:
            raise ConfigError("serve_port", why_not(exc, port, host)) from exc
        self._thread = threading.Thread(target=self._server.serve_forever, name="serve", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it is asked."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> PredictionServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    predictions: Predictions
    loopback: bool
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: else each answer waits for an acknowledgement
    timeout = _SILENT_S

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_GET(self) -> None:
        """Say what is served."""
        if not self._may():
            return
        if self.path.rstrip("/") not in ("", "/health"):
            self._say(404, b'{"error": "ask with POST /predict"}')
            return
        one = self.predictions.predictor
        self._say(200, msgspec.json.encode({"version": one.version, "task": one.task, "labels": one.labels}))

    def do_POST(self) -> None:
        """Answer a question."""
        length = self.headers.get("Content-Length", "")
        if not (length.isdecimal() and int(length) <= MOST_BYTES):
            self.close_connection = True
            self._say(413, msgspec.json.encode({"error": f"a question has {MOST_BYTES} bytes at most"}))
            return
        body = self.rfile.read(int(length))
        if not self._may():
            return
        if self.path != "/predict":
            self._say(404, b'{"error": "ask with POST /predict"}')
            return
        self._say(*answer_to(self.predictions, body))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: questions hold texts."""

    def _may(self) -> bool:
        """Whether it is asked under a name of this machine: a web site's name may point here too."""
        if self.loopback and not is_ours(self.headers.get("Host", "")):
            self._say(421, msgspec.json.encode({"error": NOT_OURS}))
            return False
        return True

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
