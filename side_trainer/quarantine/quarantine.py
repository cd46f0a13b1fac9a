"""Devices whose batches are kept and not folded, and the batches that wait because of that.

Beside the journal's records, in the same file: a held batch is receipted like any other, so that its device
can delete it, and becomes a record when the operator releases the device. Commands of the operator are rows
too, so that they can be given while a trainer runs; it looks every second.
"""

from __future__ import annotations

import time
from typing import Final, Literal, get_args

import msgspec

from side_trainer.journal.holding import Held
from side_trainer.journal.journal import Journal
from sidestream.contract.errors import ConfigError
from sidestream.contract.wire import prepared

State = Literal["quarantined", "excluded", "released"]
STATES: Final[tuple[State, ...]] = get_args(State)


_NOTHING: Final = Held(0, 0, 0)


@prepared
class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided about a device."""

    device: str
    """Its id."""
    state: State
    """Quarantined: by the trainer, until somebody looks. Excluded: by the operator, for good. Released: by
    the operator, and never quarantined by itself again."""
    reason: str
    """Why."""
    since_unix_s: float
    """When."""
    held_batches: int
    """Kept and not folded."""
    held_samples: int
    """In them."""
    held_bytes: int
    """Of their payloads."""


class Quarantine:
    """The verdicts in a journal. Safe between threads as far as the journal is."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._states: dict[str, State] = {}
        self._read()

    def refresh(self) -> list[tuple[str, int]]:
        """Look at what the operator has decided meanwhile, and let go of what is held of released devices.

        Returns:
            Tier and samples of each batch that became a record.
        """
        self._read()
        let_go: list[tuple[str, int]] = []
        for device in self._journal.holding.held():
            if self._states.get(device, "released") == "released":
                let_go += self._journal.holding.release(device)
        return let_go

    def holds(self, device: str) -> bool:
        """Whether a device's batches are kept and not folded."""
        return self._states.get(device) in ("quarantined", "excluded")

    def _read(self) -> None:
        self._states = {row[0]: _state(row[1]) for row in self._journal.holding.verdicts()}

    @property
    def count(self) -> int:
        """Devices that are held, the excluded ones included."""
        return sum(state != "released" for state in self._states.values())

    def suspect(self, device: str, reason: str) -> bool:
        """Quarantine a device, unless the operator has decided about it; return whether it was."""
        if device in self._states:
            return False
        # The operator may have decided since we looked, in another process.
        noted = self._journal.holding.set_verdict(device, "quarantined", reason, time.time(), replace=False)
        self._read()
        return noted

    def decide(self, device: str, state: State, reason: str) -> None:
        """Note a decision."""
        self._journal.holding.set_verdict(device, state, reason, time.time())
        self._states[device] = state

    def order(self, device: str, state: State, reason: str) -> None:
        """The operator's decision about a device that the journal knows.

        Raises:
            ConfigError: if it knows none of that name.
        """
        known = {stream.device for stream in self._journal.streams()} | set(self._states)
        if device not in known:
            names = ", ".join(sorted(known)[:20]) or "none yet"
            raise ConfigError("DEVICE", f"no batch of {device!r} is in this journal; its devices: {names}")
        self.decide(device, state, reason)


def judgements(journal: Journal) -> list[Judgement]:
    """All of them, by device."""
    held = journal.holding.held()
    return [
        Judgement(
            device=device,
            state=_state(state),
            reason=reason,
            since_unix_s=since,
            held_batches=kept.batches,
            held_samples=kept.samples,
            held_bytes=kept.bytes,
        )
        for device, state, reason, since in journal.holding.verdicts()
        for kept in [held.get(device, _NOTHING)]
    ]


def _state(text: str) -> State:
    for state in STATES:
        if state == text:
            return state
    return "quarantined"  # a newer version's word: the careful reading of it
