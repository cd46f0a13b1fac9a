"""Weights that lie in a mapped file: pages of it that were read, and are not needed now, can be let go of.

They count as the process's memory as long as they are there, and the system would take them back only when
there is none left. What is needed again comes back from the file by itself.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from torch import Tensor

_DONT_NEED: Final = 4  # of madvise, on Linux
_STEP_BYTES: Final = 8 * 2**20
T = TypeVar("T", bound=Tensor)
_HEADER: Final = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +(/.*)$")


class MappedWeights:
    """The mapped files that parameters lie in; none where there is no such thing, or no Linux.

    A file of which any page was written to is left alone: such a page would be read anew, as it was.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        places = [parameter.data_ptr() for parameter in parameters]
        self._ranges = [
            (start, end) for start, end in _untouched_files() if any(start <= place < end for place in places)
        ]

    def sparing(self, parameters: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """The same parameters, letting go on the way of what has been looked at."""
        self.let_go()
        since = 0
        for name, parameter in parameters:
            yield name, parameter
            since += parameter.nbytes
            if since > _STEP_BYTES:
                self.let_go()
                since = 0
        self.let_go()

    def let_go(self) -> None:
        """Of every page, until it is read again."""
        for start, end in self._ranges:
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)


def trim_heap() -> None:
    """Give free heap back to the system, where the C library can."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _untouched_files() -> list[tuple[int, int]]:
    """Address ranges of mapped files without a page of our own."""
    try:
        lines = Path("/proc/self/smaps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    found: list[tuple[int, int]] = []
    current: tuple[int, int] | None = None
    for line in lines:
        if header := _HEADER.match(line):
            current = int(header[1], 16), int(header[2], 16)
        elif re.match(r"^[0-9a-f]+-", line):
            current = None
        elif current is not None and line.startswith("Anonymous:") and line.split()[1] == "0":
            found.append(current)
    return found
