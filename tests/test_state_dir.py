"""What is written to a state directory is there after a power cut: the old content or the new one, whole."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from sidestream.host.state_dir import write_atomically


def test_the_content_reaches_the_disk_before_the_name_and_the_name_before_anyone_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, temporary = tmp_path / "kept", tmp_path / "kept.tmp"
    path.write_bytes(b"old")
    synced: list[tuple[int, bytes, bytes]] = []
    fsync = os.fsync

    def spy(handle: int) -> None:
        """What would be found after a power cut once this is done: which file, what is under the names."""
        there = temporary.read_bytes() if temporary.exists() else b""
        synced.append((os.fstat(handle).st_ino, path.read_bytes(), there))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    write_atomically(path, b"new")
    assert synced == [(path.stat().st_ino, b"old", b"new"), (tmp_path.stat().st_ino, b"new", b"")]


@pytest.mark.parametrize("fails", ["content", "name"])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "kept"
    if fails == "name":
        path.mkdir()
    else:
        path.write_bytes(b"old")

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space|directory"):
        write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.is_dir() or path.read_bytes() == b"old"


def test_what_a_crash_left_of_an_earlier_write_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.with_name("kept.tmp").write_bytes(b"half of an earlier, longer content")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("public", "mode"), [(False, 0o600), (True, 0o644)])
def test_others_may_read_only_what_is_public(tmp_path: Path, public: bool, mode: int) -> None:
    path = tmp_path / "kept"
    before = os.umask(0o022)
    try:
        write_atomically(path, b"new", public=public)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
