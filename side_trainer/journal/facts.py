"""What a journal remembers beside its records: small facts of the trainer that writes it."""

from __future__ import annotations

from typing import Any, Final, Generic, TypeVar

import msgspec

from side_trainer.journal.file import JournalFile

T = TypeVar("T")
LOST: Final = "lost "
"""Before a stream: the name of what was lost of it."""
_FORK: Final = "fork "


class _Fact(Generic[T]):
    """One of them, by its name; read anew each time, for a command of the operator's may have written it.

    Args:
        kind: T.
        default: Of a journal that was not told, as JSON.
    """

    def __init__(self, kind: Any, default: str) -> None:
        self._kind = kind
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, journal: JournalFile, owner: type) -> T:
        with journal.reading():
            found: T = msgspec.json.decode(journal.meta(self._name, self._default), type=self._kind)
            return found

    def __set__(self, journal: JournalFile, value: T) -> None:
        journal.set_meta(self._name, msgspec.json.encode(value).decode())


class JournalFacts(JournalFile):
    """The file with its facts by name."""

    _version_base: int | None = None  # read once: it is asked for again and again

    epoch: _Fact[int] = _Fact(int, "0")
    """How often a trainer was started on it."""
    backups: _Fact[int] = _Fact(int, "0")
    """How many backups have been made of it."""
    fence: _Fact[int] = _Fact(int, "0")
    """The highest fence that a trainer of this journal ever had."""
    plan_revision: _Fact[int] = _Fact(int, "0")
    """The highest plan revision ever published from this journal."""
    policies: _Fact[dict[str, frozenset[str]]] = _Fact(dict[str, frozenset[str]], "{}")
    """By tier, the token-sampling policies that its plans have had."""
    privacy: _Fact[dict[str, str]] = _Fact(dict[str, str], "{}")
    """By tier, what its latest plan has devices do to vectors; an exported model does it, too."""
    published: _Fact[dict[int, dict[str, int]]] = _Fact(dict[int, dict[str, int]], "{}")
    """Weights versions that may be on the broker, with their chunks by tier; the highest is the last. Noted
    before they are published, so that a restart can tidy up and never goes back."""
    signers: _Fact[tuple[bytes, ...]] = _Fact(tuple[bytes, ...], "[]")
    """Public keys that its trainers have signed with, the newest last."""

    @property
    def lost(self) -> dict[str, int]:
        """By stream, samples that were receipted before the journal was set back and cannot be had back."""
        return {stream: int(samples) for stream, samples in self._of_streams(LOST)}

    def note_lost(self, stream: str, samples: int) -> None:
        """So many of a stream, all told."""
        self.set_meta(LOST + stream, str(samples))

    @property
    def forks(self) -> frozenset[str]:
        """Streams that devices began because their states were set back or copied."""
        return frozenset(stream for stream, _ in self._of_streams(_FORK))

    def note_fork(self, stream: str) -> None:
        """One more of them."""
        self.set_meta(_FORK + stream, "")

    def _of_streams(self, what: str) -> list[tuple[str, str]]:
        """Facts of streams: each has a row of its own, for a fleet may be set back all at once."""
        with self.reading() as db:
            rows = db.execute("SELECT key, value FROM meta WHERE key BETWEEN ? AND ?", (what, what + "~"))
            return [(key.removeprefix(what), value) for key, value in rows]

    @property
    def highest(self) -> int:
        """The highest weights version that may be on the broker."""
        return max(self.published, default=0)

    @property
    def version_base(self) -> int:
        """What a weights version counts beside records.

        Raised by a rebuild, and after the journal was set back, so that versions only rise.
        """
        if self._version_base is None:
            with self.reading():
                self._version_base = int(self.meta("version_base", "0"))
        return self._version_base

    @version_base.setter
    def version_base(self, base: int) -> None:
        self.set_meta("version_base", str(base))
        self._version_base = base
