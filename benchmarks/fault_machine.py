"""Faults of the machine: small disks that fill up or turn read-only, and clocks that jump."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_FAKETIME: Final = (
    *("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",),
    *("/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",),
)


class SmallDisk:
    """A file system in memory, mounted on a folder. Takes root."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read_only(self) -> None:
        """As after a remount; no file on it may be open for writing."""
        self._mount("remount,ro")

    def writable(self) -> None:
        self._mount("remount,rw")

    def _mount(self, options: str) -> None:
        subprocess.run(["mount", "-o", options, str(self._folder)], check=True)


@contextmanager
def small_disk(folder: Path, size: str = "6m") -> Iterator[SmallDisk]:
    """A disk of so many bytes at ``folder``."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def faked_clock(rate_file: Path) -> dict[str, str]:
    """Environment of a process whose wall clock is off by what ``rate_file`` says; monotonic clocks are not.

    Raises:
        FileNotFoundError: if libfaketime is not installed (Debian: faketime).
    """
    library = next((path for path in _FAKETIME if Path(path).exists()), None)
    if library is None:
        raise FileNotFoundError("libfaketime is not installed; on Debian: apt install faketime")
    return {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(rate_file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
