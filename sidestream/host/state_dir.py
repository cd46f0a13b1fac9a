"""A process's state directory: made, checked, locked against a second process, written to atomically.

It holds what others on the machine are not to read: raw texts, activations, weights. So it is its owner's
only, whoever made it and under whichever umask, and so is each file in it from its first byte on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sidestream.contract.errors import StateError

_log = logging.getLogger(__name__)


def default_dir(*parts: str) -> Path:
    """Where state belongs that nobody gave a place: below ``$XDG_STATE_HOME``, or ``~/.local/state``."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    base = given if given.is_absolute() else Path.home() / ".local" / "state"
    return base.joinpath("sidestream", *parts)


def prepare(path: Path) -> Path:
    """Make the directory if needed, keep others out of it, and check that it can be written to.

    Raises:
        StateError: naming the directory and what to do.
    """
    try:
        make_private(path)
        probe = path / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as exc:
        raise StateError(
            f"state directory {path} cannot be written to ({exc.strerror}); give another with --state-dir, "
            "or mend its owner and permissions"
        ) from exc
    return path


def make_private(path: Path) -> None:
    """Make the directory if needed, mode 0700; close one that is there to all but its owner.

    With it its files, if it has been used as this before: they may be an older version's. Where that cannot
    be done, in somebody else's directory or on a file system without modes, a warning says so.

    Raises:
        OSError: it is not there and cannot be made, or it is meant to be everybody's, such as /tmp.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    used = (path / "lock").exists() or any(path.glob("*.db"))
    if path.stat().st_mode & stat.S_ISVTX and not used and any(path.iterdir()):  # an empty one is a new mount
        raise OSError(errno.EPERM, "it is everybody's; name a folder in it", str(path))
    try:
        for one in (path.resolve(), *(path.glob("*") if used else ()), *(path.glob("*/*") if used else ())):
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                _close_to_others(one)
    except OSError as exc:
        _log.warning(
            "others on this machine may be able to read %s (%s); have its owner run this, or name another",
            *(path, exc.strerror),
        )


def _close_to_others(path: Path) -> None:
    mode = path.lstat().st_mode
    if not stat.S_ISLNK(mode) and mode & 0o077:
        path.chmod(stat.S_IMODE(mode) & 0o700)


def private(path: str, flags: int) -> int:
    """An ``opener`` for :func:`open`: a new file is its owner's only."""
    return os.open(path, flags, 0o600)


def touch_private(path: Path) -> None:
    """Make the file if it is missing, its owner's only; SQLite gives the files beside it the same mode.

    Raises:
        OSError: it cannot be made.
    """
    os.close(private(str(path), os.O_RDWR | os.O_CREAT))


@contextlib.contextmanager
def locked(path: Path, holder: str) -> Iterator[None]:
    """Hold the directory for this process; the system lets go of it when the process ends, however it ends.

    Args:
        path: The directory.
        holder: What holds it, for the message of whoever comes second, such as ``"an agent"``.

    Raises:
        StateError: if another process holds it.
    """
    with open(path / "lock", "a+b", opener=private) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise StateError(
                f"state directory {path} is in use by {holder} that is still running; stop it first, or give "
                "another --state-dir"
            ) from exc
        yield


def write_atomically(path: Path, data: bytes, *, public: bool = False) -> None:
    """Replace the file's content as a whole and durably: after a crash it is the old one or the new one.

    Args:
        path: The file.
        data: Its content.
        public: Others may read it, as the umask has it; otherwise only its owner, from its first byte on.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        mode = 0o666 if public else 0o600
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
