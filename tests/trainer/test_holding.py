"""What is held back is bounded, becomes records only by a decision, and a decision stands."""

from __future__ import annotations

import pytest

from side_trainer.journal.holding import Held
from side_trainer.journal.journal import Claim, Journal
from side_trainer.quarantine.quarantine import STATES, Quarantine, State, judgements
from sidestream.contract.errors import ConfigError, NoRoomError, StateError
from tests.trainer.test_journal import batch, put, take, watermark

OTHER = {"stream": "b" * 32, "device": "e"}


def test_all_that_is_held_is_bounded_to_the_byte_and_what_found_no_room_left_no_trace(
    journal: Journal,
) -> None:
    for sequence in (1, 2):
        with journal.transaction():
            assert journal.append_batch(batch(sequence), held=True, held_max_bytes=4).claim is Claim.NEW
    assert journal.holding.size_bytes == 4
    with pytest.raises(NoRoomError, match="4 bytes already"), journal.transaction():
        journal.append_batch(batch(3), held=True, held_max_bytes=5)
    assert watermark(journal) == 2 and journal.holding.held() == {"d": Held(2, 4, 4)}
    with journal.transaction():
        assert journal.append_batch(batch(3), held=True, held_max_bytes=6).claim is Claim.NEW
    assert journal.holding.size_bytes == 6


def test_what_was_held_in_a_transaction_that_failed_takes_no_room(journal: Journal) -> None:
    with pytest.raises(ZeroDivisionError), journal.transaction():
        journal.append_batch(batch(1), held=True, held_max_bytes=2)
        raise ZeroDivisionError
    assert journal.holding.size_bytes == 0 and journal.holding.held() == {}
    with journal.transaction():
        journal.append_batch(batch(1), held=True, held_max_bytes=2)


def test_a_release_makes_records_of_one_devices_batches_in_the_order_in_which_they_came(
    journal: Journal,
) -> None:
    put(journal, 3, held=True, payload=b"three", tier="u")
    put(journal, 1, held=True, **OTHER)
    put(journal, 2, held=True, payload=b"two", samples=1)
    assert journal.samples() == 0 and journal.tail == 0, "none of it counts"
    assert journal.holding.check() == 3
    assert journal.holding.held() == {"d": Held(2, 3, 8), "e": Held(1, 2, 2)}
    assert journal.holding.release("d") == [("u", 2), ("t", 1)]
    assert [(one.payload, one.tier, one.samples) for one in journal.read(0)] == [
        (b"three", "u", 2),
        (b"two", "t", 1),
    ]
    assert journal.holding.held() == {"e": Held(1, 2, 2)} and journal.holding.size_bytes == 2
    assert journal.holding.release("d") == [] and journal.samples() == 3


@pytest.mark.parametrize("changed", ["payload = x'6f'", "payload = CAST(payload AS TEXT)", "digest = x'6f'"])
def test_a_held_batch_that_changed_on_the_disk_is_noticed_and_nothing_is_released(
    journal: Journal, changed: str
) -> None:
    put(journal, 1, held=True)
    put(journal, 2, held=True)
    journal.db.execute(f"UPDATE held SET {changed} WHERE sequence = 2")
    for look in (journal.holding.check, lambda: journal.holding.release("d")):
        with pytest.raises(StateError, match="held batch 2 has changed; restore"):
            look()
    assert journal.tail == 0 and journal.holding.held()["d"].batches == 2


# --- verdicts -------------------------------------------------------------------------------------------


def test_of_two_verdicts_the_later_stands_unless_it_was_not_to_replace_any(journal: Journal) -> None:
    holding = journal.holding
    assert holding.set_verdict("d", "quarantined", "first", 1.0, replace=False)
    assert not holding.set_verdict("d", "excluded", "second", 2.0, replace=False)
    assert holding.verdicts() == [("d", "quarantined", "first", 1.0)]
    assert holding.set_verdict("d", "released", "third", 3.0)
    assert holding.set_verdict("c", "excluded", "", 4.0)
    assert holding.verdicts() == [("c", "excluded", "", 4.0), ("d", "released", "third", 3.0)]


@pytest.mark.parametrize(("state", "holds"), [("quarantined", True), ("excluded", True), ("released", False)])
def test_a_decision_says_whether_a_device_is_held_from_then_on_and_after_a_restart(
    journal: Journal, state: State, holds: bool
) -> None:
    put(journal, 1)
    decided = Quarantine(journal)
    assert not decided.holds("d") and decided.count == 0
    decided.order("d", state, "because")
    for quarantine in (decided, Quarantine(journal)):
        assert quarantine.holds("d") is holds and not quarantine.holds("e")
        assert quarantine.count == holds
        assert not quarantine.suspect("d", "again"), "it was decided about"
    assert [(one.device, one.state, one.reason) for one in judgements(journal)] == [("d", state, "because")]


@pytest.mark.parametrize("state", STATES)
def test_only_a_released_devices_batches_become_records(journal: Journal, state: State) -> None:
    put(journal, 1, held=True)
    put(journal, 1, held=True, **OTHER)
    quarantine = Quarantine(journal)
    for device in ("d", "e"):
        assert quarantine.suspect(device, "because") and quarantine.holds(device)
    assert quarantine.refresh() == [] and quarantine.count == 2
    Quarantine(journal).decide("d", state, "by another process")
    assert quarantine.refresh() == ([("t", 2)] if state == "released" else [])
    assert "e" in journal.holding.held() and quarantine.holds("e")
    assert [(one.held_batches, one.held_samples, one.held_bytes) for one in judgements(journal)] == [
        (0, 0, 0) if state == "released" else (1, 2, 2),
        (1, 2, 2),
    ]


def test_what_is_held_of_a_device_that_nothing_was_decided_about_is_let_go(journal: Journal) -> None:
    put(journal, 1, held=True)
    assert Quarantine(journal).refresh() == [("t", 2)]
    assert take(journal, 1).claim is Claim.KNOWN and journal.samples() == 2


def test_a_word_of_a_newer_version_holds_a_device(journal: Journal) -> None:
    journal.holding.set_verdict("d", "watched", "", 1.0)
    assert Quarantine(journal).holds("d") and judgements(journal)[0].state == "quarantined"


def test_an_order_about_a_device_that_never_sent_names_those_that_did(journal: Journal) -> None:
    with pytest.raises(ConfigError, match="none yet"):
        Quarantine(journal).order("nobody", "excluded", "")
    put(journal, 1)
    journal.holding.set_verdict("x", "released", "", 1.0)
    with pytest.raises(ConfigError, match="no batch of 'nobody' is in this journal; its devices: d, x"):
        Quarantine(journal).order("nobody", "excluded", "")
    Quarantine(journal).order("x", "excluded", "")
    assert Quarantine(journal).holds("x")
