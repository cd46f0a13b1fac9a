"""A random name that a state directory keeps for itself: who does not know it cannot pass for its owner."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Final

from sidestream.contract.errors import StateError
from sidestream.host.state_dir import write_atomically

FILE_NAME: Final = "client_id"
_ID: Final = re.compile(r"[0-9a-f]{32}")


def secret_id(folder: Path) -> str:
    """The directory's own: made at first, the same ever after. It is published nowhere and logged nowhere.

    Returns:
        32 hexadecimal digits.

    Raises:
        StateError: it can be neither read nor written.
    """
    path = folder / FILE_NAME
    try:
        known = path.read_text(errors="replace").strip() if path.exists() else ""
        if _ID.fullmatch(known):
            path.chmod(0o600)
            return known
        made = secrets.token_hex(16)
        write_atomically(path, made.encode())
    except OSError as exc:
        raise StateError(
            f"{path} cannot be used ({exc.strerror or exc}); mend its owner and permissions, or give "
            "another --state-dir"
        ) from exc
    return made
