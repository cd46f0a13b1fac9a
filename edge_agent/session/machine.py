"""What the machine says of itself: board, stable id, memory, temperature. Linux; elsewhere it says little."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import socket
import unicodedata
import uuid
from pathlib import Path

from sidestream.host.state_dir import write_atomically

GENERIC = "generic"
_TIERS = (
    (r"Raspberry Pi (?:Compute Module )?5|Raspberry Pi 500", "pi5"),
    (r"Raspberry Pi (?:Compute Module )?4|Raspberry Pi 400", "pi4"),
    (r"Raspberry Pi (?:Compute Module )?3", "pi3"),
    (r"Raspberry Pi Zero 2", "pi-zero2"),
    (r"Jetson AGX Thor", "jetson-thor"),
    (r"Orin", "jetson-orin"),
    (r"Xavier", "jetson-xavier"),
    (r"Jetson TX2", "jetson-tx2"),
    (r"Jetson Nano", "jetson-nano"),
)
_NAME_FILE = "device_name"
_COMMON = re.compile(
    r"localhost|localhost\.localdomain|raspberrypi|raspberry|raspbian|jetson|jetson-nano|nvidia|ubuntu|debian|"
    r"armbian|dietpi|orangepi|odroid|linaro|ubuntu-desktop|tegra-ubuntu|buildroot|[0-9a-f]{12}"
)
"""What boards and containers are called that nobody has named."""
_MOST = 40  # characters of a host name that are kept
log = logging.getLogger(__name__)


def detect_tier(root: Path = Path("/")) -> str:
    """The hardware tier by the board's own name: ``pi5``, ``jetson-orin``, …, or ``generic``."""
    model = _read(root / "proc/device-tree/model")
    return next((tier for pattern, tier in _TIERS if re.search(pattern, model)), GENERIC)


def device_name(folder: Path, root: Path = Path("/"), host: str | None = None) -> str:
    """The device's name where its settings give none: the host's name, made unique if many have it.

    Args:
        folder: Its state directory: a name that it has taken once, it keeps.
        root: Of the machine.
        host: The host's name; None to ask.
    """
    with contextlib.suppress(OSError, ValueError):
        if kept := (folder / _NAME_FILE).read_text("ascii").strip():
            return kept
    plain = _plain(socket.gethostname() if host is None else host)
    return plain if plain and not _COMMON.fullmatch(plain) else unique_name(plain, folder, root)


def unique_name(name: str, folder: Path, root: Path = Path("/")) -> str:
    """A name that no other machine has, nor another agent on this one."""
    whose = f"{machine_id(root)} {folder.absolute()}".encode()
    digits = hashlib.blake2b(whose, digest_size=3, person=b"device name").hexdigest()
    return f"{name or 'device'}-{digits}"


def keep_name(folder: Path, name: str) -> None:
    """Have the device go by a name from now on."""
    write_atomically(folder / _NAME_FILE, f"{name}\n".encode())


def _plain(host: str) -> str:
    """A host's name, without its domain, as it can be part of a topic."""
    ascii_ = unicodedata.normalize("NFKD", host.partition(".")[0]).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9_-]+", "-", ascii_.lower()).strip("-_")[:_MOST].strip("-_")


def machine_id(root: Path = Path("/")) -> str:
    """A stable name for this machine, 16 hex digits; a hash, so that the raw id stays here.

    The board's serial number comes first: machines made from one card image share their ``/etc/machine-id``.
    """
    places = ("proc/device-tree/serial-number", "etc/machine-id", "var/lib/dbus/machine-id")
    raw = next((text for text in (_read(root / place) for place in places) if text), "")
    if not raw:
        log.warning("this machine has neither serial number nor machine id; it goes by its network address")
        raw = f"{uuid.getnode():012x}"
    return hashlib.blake2b(raw.encode(), digest_size=8, person=b"sidestream").hexdigest()


def memory_bytes(status: Path = Path("/proc/self/status")) -> tuple[int, int]:
    """Resident memory of this process now, and the most it ever was; zeros where it cannot be read."""
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", _read(status), re.MULTILINE))
    return int(found.get("VmRSS", 0)) * 1024, int(found.get("VmHWM", 0)) * 1024


def temperature_celsius(root: Path = Path("/")) -> float | None:
    """The hottest thermal zone that gives a plausible figure, or None."""
    zones = (root / "sys/class/thermal").glob("thermal_zone*/temp")
    texts = [_read(zone) for zone in zones]
    degrees = [int(text) / 1000 for text in texts if re.fullmatch(r"-?\d{1,7}", text)]
    return max((value for value in degrees if -60 < value < 200), default=None)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace").strip("\0\n\r\t ")
    except OSError:
        return ""
