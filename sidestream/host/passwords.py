"""Where a password comes from: a file, the environment, a prompt. Never the command line, which is public."""

from __future__ import annotations

import getpass
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from sidestream.contract.errors import ConfigError

VARIABLE: Final = "SIDESTREAM_ENROLMENT_PASSWORD"
_ALPHABET: Final = "23456789abcdefghjkmnpqrstuvwxyz"  # nothing that looks like something else
_GROUPS: Final = 5
_GROUP_CHARS: Final = 4


def given_password(file: Path | None, environ: Mapping[str, str] | None = None) -> str | None:
    """The first line of the file, else what the environment says, else None.

    Raises:
        ConfigError: the file cannot be read, or begins with an empty line.
    """
    if file is None:
        return (os.environ if environ is None else environ).get(VARIABLE) or None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError("--password-file", f"{file} cannot be read: {exc}") from exc
    if not lines or not lines[0]:
        raise ConfigError("--password-file", f"{file} holds no password on its first line")
    return lines[0]


def asked_password(prompt: str, *, twice: bool = False) -> str | None:
    """What is typed at the terminal, unseen; None where there is no terminal.

    Raises:
        ConfigError: it was asked for twice, and two things were typed.
    """
    if not sys.stdin.isatty():
        return None
    typed = getpass.getpass(f"{prompt}: ")
    if twice and typed and getpass.getpass("the same again: ") != typed:
        raise ConfigError("password", "the two passwords differ; start again")
    return typed


def made_up_password() -> str:
    """One that can be read out and typed: 99 bits in groups of four characters."""
    groups = ("".join(secrets.choice(_ALPHABET) for _ in range(_GROUP_CHARS)) for _ in range(_GROUPS))
    return "-".join(groups)
