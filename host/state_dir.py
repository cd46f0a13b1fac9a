"""A process's state directory: made, checked, locked against a second process, written to atomically."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from contract.errors import StateError


def default_dir(*parts: str) -> Path:
    """Where state belongs that nobody gave a place: below ``$XDG_STATE_HOME``, or ``~/.local/state``."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    base = given if given.is_absolute() else Path.home() / ".local" / "state"
    return base.joinpath("sidestream", *parts)


def prepare(path: Path) -> Path:
    """Make the directory if needed and check that it can be written to.

    Raises:
        StateError: naming the directory and what to do.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as exc:
        raise StateError(
            f"state directory {path} cannot be written to ({exc.strerror}); give another with --state-dir, "
            "or mend its owner and permissions"
        ) from exc
    return path


@contextlib.contextmanager
def locked(path: Path, holder: str) -> Iterator[None]:
    """Hold the directory for this process; the system lets go of it when the process ends, however it ends.

    Args:
        path: The directory.
        holder: What holds it, for the message of whoever comes second, such as ``"an agent"``.

    Raises:
        StateError: if another process holds it.
    """
    with (path / "lock").open("a+b") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise StateError(
                f"state directory {path} is in use by {holder} that is still running; stop it first, or give "
                "another --state-dir"
            ) from exc
        yield


def write_atomically(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace the file's content as a whole and durably: after a crash it is the old one or the new one.

    Args:
        path: The file.
        data: Its content.
        private: Only its owner may read it, from its first byte on.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        mode = 0o600 if private else 0o666
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError:  # on a full disk, what was written of it must not stay in the way
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
