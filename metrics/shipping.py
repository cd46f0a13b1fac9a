"""The files that come with the product for whoever watches it: scrape config, rules, alerts, a dashboard."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sidestream.contract.errors import ConfigError

FILES: Final = (
    "prometheus.yml",
    "sidestream.rules.yml",
    "sidestream.alerts.yml",
    "sidestream.dashboard.json",
)
"""Scrape config, recording rules, alert rules, and a dashboard for Grafana."""
DEFAULT_TARGET: Final = "127.0.0.1:9464"
DOCS: Final = "docs/operations.md"
"""Where alerts are explained: each alert's ``runbook_url`` is this and its section."""
_TARGET: Final = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:]{2,45}\]):([0-9]{1,5})")


def render(out_dir: Path, targets: Sequence[str] = (DEFAULT_TARGET,), docs: str = DOCS) -> list[Path]:
    """Write the files, over an earlier rendering.

    Args:
        out_dir: Made if need be.
        targets: The trainers' metrics, ``HOST:PORT`` each.
        docs: Where :data:`DOCS` can be read, such as the address of a fleet page's ``help.html``.

    Returns:
        The files written.

    Raises:
        ConfigError: if a target or an address is none, or the folder cannot be written to.
    """
    for target in targets:
        match = _TARGET.fullmatch(target)
        if not match or not 1 <= int(match[1]) <= 65535:
            raise ConfigError("--target", f"{target[:80]!r} is no HOST:PORT, such as 192.168.1.11:9464")
    if not docs.isprintable() or set(docs) & set(" \"'#"):
        raise ConfigError("--docs", f"{docs[:80]!r} is no address of a page")
    listed = ", ".join(f'"{target}"' for target in targets)
    written = []
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            path = out_dir / name
            text = shipped(name).replace(f'"{DEFAULT_TARGET}"', listed)
            path.write_text(text.replace(f"runbook_url: {DOCS}", f"runbook_url: {docs}"), encoding="utf-8")
            written.append(path)
    except OSError as exc:
        raise ConfigError("--out", f"cannot write to {out_dir}: {exc.strerror or exc}") from exc
    return written


def shipped(name: str) -> str:
    """The text of one of the files."""
    return (importlib.resources.files("metrics") / "shipped" / name).read_text("utf-8")
