"""A Prometheus of the tests' own, on a free port, that scrapes every half second."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from metrics.shipping import render
from tests.until import until

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="there is no prometheus binary",
)


class Prometheus:
    """Runs with the shipped files, scraping ``target``. A context manager."""

    def __init__(self, folder: Path, target: str) -> None:
        render(folder, [target])
        config = folder / "prometheus.yml"
        config.write_text(config.read_text().replace("_interval: 15s", "_interval: 500ms"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with (folder / "prometheus.log").open("w") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self._url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=log,
            )
        self._log = folder / "prometheus.log"

    def query(self, expression: str) -> list[Any]:
        """An instant query's result.

        Raises:
            AssertionError: if Prometheus refuses the expression.
        """
        query = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/query?{query}", timeout=10) as answer:
                result: list[Any] = json.load(answer)["data"]["result"]
                return result
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it is still starting
                raise
            raise AssertionError(f"{expression}: {error.read().decode()}") from None

    def await_result(self, expression: str, timeout_s: float = 60.0) -> list[Any]:
        """The first result that is not empty."""
        found: list[Any] = []

        def came() -> bool:
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            with suppress(urllib.error.URLError):  # it does not listen yet
                found[:] = self.query(expression)
            return bool(found)

        until(came, f"{expression}; see {self._log}", timeout_s, every_s=0.1)
        return found

    def await_figure(self, expression: str) -> None:
        """Wait for a result that is a number: a series is there before what it tells is known."""
        until(
            lambda: any(one["value"][1] != "NaN" for one in self.await_result(expression)),
            f"a figure for {expression}",
            every_s=0.1,
        )

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(30)
