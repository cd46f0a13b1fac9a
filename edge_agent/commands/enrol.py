"""Turns an enrolment bundle into a device's files: settings, certificate, keys. All for their owner only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from broker_config.enrolment import MAX_BUNDLE_BYTES, Enrolment, open_enrolment
from edge_agent.config import AgentConfig
from sidestream.contract.errors import ConfigError, StateError, WireError
from sidestream.host.settings_text import settings_file
from sidestream.host.state_dir import write_atomically

SETTINGS: Final = "agent.toml"


def default_config_dir() -> Path:
    """Where a device's settings belong: /etc/sidestream for root, else the user's configuration."""
    if os.geteuid() == 0:
        return Path("/etc/sidestream")
    given = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".config") / "sidestream"


def read_bundle(path: Path) -> bytes:
    """A bundle's bytes.

    Raises:
        ConfigError: it cannot be read, or is no bundle by its size.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BUNDLE_BYTES + 1)
    except OSError as exc:
        raise ConfigError("BUNDLE", f"{path} cannot be read: {exc.strerror or exc}") from exc
    if len(data) > MAX_BUNDLE_BYTES:
        raise ConfigError("BUNDLE", f"{path} is too large to be an enrolment bundle")
    return data


def enrol(bundle: bytes, password: str, folder: Path, *, data: str = "", replace: bool = False) -> Enrolment:
    """Open a bundle and write its files into ``folder``.

    Args:
        bundle: Its bytes.
        password: Its own.
        folder: Made if need be.
        data: Path of the device's samples, for the settings.
        replace: Take the place of settings that are there. Certificates and keys are replaced anyway.

    Raises:
        ConfigError: the bundle or its password is wrong, or there are settings already.
        StateError: the folder cannot be written to.
    """
    try:
        enrolment = open_enrolment(bundle, password)
    except WireError as exc:
        raise ConfigError("BUNDLE", str(exc)) from exc
    folder = folder.expanduser().absolute()
    settings = folder / SETTINGS
    if settings.exists() and not replace:
        raise ConfigError(
            "--config-dir", f"{settings} is there already; --replace puts new settings in its place"
        )
    files = {
        "ca.crt": enrolment.ca,
        "device.crt": enrolment.certificate,
        "device.key": enrolment.key,
        "trainer.pub.pem": enrolment.trusted_keys,
        SETTINGS: _settings(enrolment, folder, data),
    }
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomically(folder / name, text.encode())
    except OSError as exc:
        raise StateError(f"{folder} cannot be written to: {exc.strerror or exc}") from exc
    return enrolment


def _settings(enrolment: Enrolment, folder: Path, data: str) -> str:
    values: dict[str, Any] = {
        "job": enrolment.job,
        "device": enrolment.device,
        "tier": enrolment.tier,
        "trusted_keys_file": str(folder / "trainer.pub.pem"),
        "broker_wait_s": 0.0,
        "broker.url": enrolment.url,
        "broker.ca_file": str(folder / "ca.crt"),
        "broker.cert_file": str(folder / "device.crt"),
        "broker.key_file": str(folder / "device.key"),
        **({"data.path": data} if data else {}),
    }
    head = f"The agent of device {enrolment.device!r}: sidestream agent run {folder / SETTINGS}"
    return settings_file(AgentConfig, values, head)
