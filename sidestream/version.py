"""The installed version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed


def version() -> str:
    """As pip knows it."""
    try:
        return installed("sidestream")
    except PackageNotFoundError:
        return "unknown"
