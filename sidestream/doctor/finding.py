"""What the doctor finds: one thing looked at, how it is, and what to do about it."""

from __future__ import annotations

from typing import Literal

import msgspec

from sidestream.contract.wire import prepared

State = Literal["ok", "warning", "failed", "skipped"]


@prepared
class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One check's outcome."""

    check: str
    """What was looked at."""
    state: State
    """How it is."""
    said: str
    """What was seen."""
    remedy: str = ""
    """What to do, where something is to be done."""


def ok(check: str, said: str) -> Finding:
    """All is well."""
    return Finding(check=check, state="ok", said=said)


def warning(check: str, said: str, remedy: str) -> Finding:
    """It works, but."""
    return Finding(check=check, state="warning", said=said, remedy=remedy)


def failed(check: str, said: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(check=check, state="failed", said=said, remedy=remedy)


def skipped(check: str, said: str) -> Finding:
    """It could not be looked at."""
    return Finding(check=check, state="skipped", said=said)
