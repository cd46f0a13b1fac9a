"""What memory the machine has. Linux; elsewhere it does not tell."""

from __future__ import annotations

import re
from pathlib import Path


def free_memory_bytes(info: Path = Path("/proc/meminfo")) -> int:
    """Memory that there is for another process; 0 where that cannot be told."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", info.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
