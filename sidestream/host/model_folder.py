"""Where a saved model lies on this machine: inside an installed package, in a folder, in the hub's cache."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Final

from sidestream.contract.errors import BackboneError

_PACKAGE: Final = "package:"


def locate(reference: str) -> str:
    """The folder that a reference means, or the reference itself if only the hub can tell.

    Raises:
        BackboneError: it names a folder or a package that is not there, or holds no model.
    """
    if not reference:
        raise BackboneError("no backbone is named; write a folder, a hub name or package:NAME")
    if reference.startswith(_PACKAGE):
        return str(_folder_in_package(reference[len(_PACKAGE) :]))
    folder = Path(reference).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise BackboneError(f"{reference}: the folder holds no config.json, so it is no saved model")
    if not folder.is_dir() and reference.startswith(("/", "./", "../", "~")):
        raise BackboneError(f"{reference}: there is no such folder")
    return str(folder) if folder.is_dir() else reference


def locate_here(reference: str) -> Path:
    """As :func:`locate`; a hub name is looked for in the hub's cache, and nothing is downloaded.

    Raises:
        BackboneError: there is no such model on this machine.
    """
    place = Path(locate(reference))
    if place.is_dir():
        return place
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    model = cache / f"models--{reference.replace('/', '--')}"
    try:
        snapshot = model / "snapshots" / (model / "refs" / "main").read_text().strip()
    except OSError:
        snapshot = model
    if not (snapshot / "config.json").is_file():
        raise BackboneError(
            f"{reference}: no such folder here, and it is not in the Hugging Face cache ({cache}) either"
        )
    return snapshot


def _folder_in_package(name: str) -> Path:
    """The folder with config.json below an installed package, found without running its code."""
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(
            f"package:{name}: no such package is installed; "
            f"install it with: pip install {name.replace('_', '-')}"
        )
    roots = [Path(location) for location in spec.submodule_search_locations]
    found = sorted(
        (config.parent for root in roots for config in root.rglob("config.json")),
        key=lambda folder: (len(folder.parts), folder),
    )
    if not found:
        raise BackboneError(f"package:{name}: the package holds no model (no config.json in it)")
    return found[0]
