"""A headless Chromium, for looking at pages: one process a look, with a profile of its own."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(BINARY is None, reason="there is no chromium")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr"),
)


def look(url: str, *, may_complain: bool = False) -> str:
    """What the page's document is once its scripts have run for eight seconds of the browser's clock.

    Raises:
        AssertionError: if the browser failed, or the page wrote to its console, as a page does that breaks
            its own content policy.
    """
    return _run(url, "--dump-dom", may_complain=may_complain)


def picture(url: str, path: Path, *, dark: bool, width: int = 1440, height: int = 1500) -> bytes:
    """The page as it is seen. A window narrower than 500 takes a frame: see :func:`narrow`."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _run(url, scheme, f"--window-size={width},{height}", f"--screenshot={path}")
    return path.read_bytes()


def _run(url: str, *flags: str, may_complain: bool = False) -> str:
    assert BINARY is not None
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        arguments = [f"--user-data-dir={profile}", "--virtual-time-budget=8000", *flags]
        done = subprocess.run(
            [BINARY, *FLAGS, *arguments, url], capture_output=True, text=True, timeout=120, check=False
        )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert done.returncode == 0 and (may_complain or not said), (done.returncode, said, done.stderr[-2000:])
    return done.stdout
