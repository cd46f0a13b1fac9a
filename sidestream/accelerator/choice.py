"""What a setting says about where to compute, and what came of it. Knows neither torch nor onnxruntime."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

from sidestream.contract.errors import ConfigError

AUTO: Final = "auto"
_FORM: Final = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_JETSON: Final = Path("/etc/nv_tegra_release")


class Chosen(NamedTuple):
    """Where it is computed."""

    device: str
    """cpu, or cuda:N."""
    why: str
    """In words."""

    @property
    def kind(self) -> str:
        """Cpu or cuda: results are the same bits on one kind of device only."""
        return self.device.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.device} ({self.why})"


def check_choice(field: str, value: str) -> None:
    """Refuse what is no device.

    Raises:
        ConfigError: naming the field.
    """
    if not _FORM.fullmatch(value):
        raise ConfigError(field, f"{value[:40]!r} is no device; write auto, cpu, cuda or cuda:1")


def index_of(wanted: str) -> int:
    """Which GPU is meant."""
    return int(wanted.partition(":")[2] or 0)


def without_cuda(package: str, place: Path = _JETSON) -> str:
    """Why there is no GPU for a package whose build knows none, and what to do where there must be one."""
    why = f"this build of {package} knows no CUDA"
    return f"{why}; this is a Jetson: install NVIDIA's build (docs/boards.md)" if place.exists() else why
