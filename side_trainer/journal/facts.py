"""What a journal remembers beside its records: small facts of the trainer that writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from side_trainer.journal.file import JournalFile


class JournalFacts(JournalFile):
    """The file with its facts by name."""

    _version_base: int | None = None  # read once: it is asked for again and again

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

    @property
    def backups(self) -> int:
        """How many backups have been made of it."""
        with self.reading():
            return int(self.meta("backups", "0"))

    @property
    def lost(self) -> dict[str, int]:
        """By stream, samples that were receipted before the journal was set back and cannot be had back."""
        with self.reading():
            found: dict[str, int] = json.loads(self.meta("lost", "{}"))
            return found

    def note_lost(self, stream: str, samples: int) -> None:
        """Note what a device told of that."""
        self.set_meta("lost", json.dumps({**self.lost, stream: samples}))

    @property
    def forks(self) -> frozenset[str]:
        """Streams that devices began because their states were set back or copied."""
        with self.reading():
            return frozenset(json.loads(self.meta("forks", "[]")))

    def note_fork(self, stream: str) -> None:
        """Note that a device told of one."""
        self.set_meta("forks", json.dumps(sorted({*self.forks, stream})))

    def next_epoch(self) -> int:
        """Count a start of the trainer; return how many there have been."""
        with self.reading():
            epoch = int(self.meta("epoch")) + 1
            self.set_meta("epoch", str(epoch))
            return epoch

    @property
    def fence(self) -> int:
        """The highest fence that a trainer of this journal ever had."""
        with self.reading():
            return int(self.meta("fence", "0"))

    @fence.setter
    def fence(self, fence: int) -> None:
        self.set_meta("fence", str(fence))

    @property
    def published(self) -> dict[int, dict[str, int]]:
        """Weights versions that may be on the broker, with their chunks by tier; the highest is the last."""
        with self.reading():
            return {int(version): chunks for version, chunks in json.loads(self.meta("published")).items()}

    def set_published(self, versions: dict[int, dict[str, int]]) -> None:
        """Note versions before they are published, so that a restart can tidy up and never goes back."""
        with self.lock:
            self.set_meta("published", json.dumps(versions))

    @property
    def policies(self) -> dict[str, frozenset[str]]:
        """By tier, the token-sampling policies that its plans have had."""
        with self.reading():
            return {tier: frozenset(names) for tier, names in json.loads(self.meta("policies", "{}")).items()}

    @policies.setter
    def policies(self, policies: Mapping[str, AbstractSet[str]]) -> None:
        self.set_meta("policies", json.dumps({tier: sorted(names) for tier, names in policies.items()}))

    @property
    def plan_revision(self) -> int:
        """The highest plan revision ever published from this journal."""
        with self.reading():
            return int(self.meta("plan_revision"))

    @plan_revision.setter
    def plan_revision(self, revision: int) -> None:
        with self.lock:
            self.set_meta("plan_revision", str(revision))
